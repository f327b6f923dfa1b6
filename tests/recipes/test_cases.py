"""Chats with bookkeeping cases: the same for the same seeds, and none that the adapter learned from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from learnevict.errors import DataError
from recipes import adapt, cases


def test_chats_hold_cases_that_the_adapter_did_not_learn_from(tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        cases.main(cases.parse(["--cases", "4", "--out", str(tmp_path / name)]))
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    rows = [json.loads(line)["messages"] for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [[said["role"] for said in row] for row in rows] == [["user", "assistant"]] * 4
    assert len({row[0]["content"] for row in rows}) == 4
    learned = {seed for _, seed, _ in adapt.drawn(adapt.Config())}
    assert not learned & set(range(cases.Config().first, cases.Config().first + cases.Config().cases))
    (tmp_path / "other.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match=r"other\.jsonl"):
        cases.main(cases.parse(["--cases", "4", "--out", str(tmp_path / "other.jsonl")]))
    assert (tmp_path / "other.jsonl").read_text() == "mine\n"
