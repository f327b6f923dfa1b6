"""Needles by length and depth: read from a log, averaged in bins, drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from learnevict.evals.heat_map import BINS, grid, heat_map, read_needles
from learnevict.evals.plan import Key
from learnevict.evals.records import KEYS, write_rows
from learnevict.evals.sample_log import SampleLog, log_path


def test_needles_are_averaged_by_length_and_depth(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows_file = tmp_path / "rows.jsonl"
    log, rows = SampleLog(log_path(rows_file), {}), []
    for family in ("needle@400", "needle@800", "multi_key@400"):
        for name, budget in (("full", None), ("snapkv", "1/4")):
            found = {"depth": [0.0, 0.19, 0.5, 1.0], "exact": [1, 1 if budget is None else 0, 1, 0]}
            log.add(Key(name, family, budget or "full", "after"), range(4), found)
            place = {"method": name, "family": family, "budget": budget and 100, "budget_share": budget, "samples": 4}
            rows.append({**dict.fromkeys(KEYS), **place})
    write_rows(rows_file, rows)
    needles = read_needles([rows_file])
    assert len(needles) == 16 and {one.length for one in needles} == {400, 800}
    shares = grid([one for one in needles if one.method == "snapkv"], [400, 800])
    assert shares.shape == (2, BINS)
    np.testing.assert_equal(shares[1], [0.5, np.nan, 1.0, np.nan, 0.0])
    assert heat_map(needles, tmp_path / "needles.png").read_bytes().startswith(b"\x89PNG")
