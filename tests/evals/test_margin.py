"""What is there to be learned: tables of a log made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from learnevict.errors import DataError, LearnevictWarning
from learnevict.evals.contests import read_contests
from learnevict.evals.margin import margin_tables
from learnevict.evals.plan import Key
from learnevict.evals.records import KEYS, read_rows, write_rows
from learnevict.evals.sample_log import SampleLog, log_path

NUM = 4
PROFILE = "profile 0123456789abcdef"
FOUND: dict[tuple[str, str | None, str], list[float]] = {
    ("random", "equal", "reference"): [0, 0, 0, 1], ("random+pooled", "pooled", "reference"): [0, 0, 0, 0],
    ("random+prompt", "equal", "reference"): [1, 1, 1, 1], ("snapkv", "equal", "heuristic"): [1, 0, 0, 0],
    ("snapkv+shares", PROFILE, "heuristic"): [1, 0, 1, 0], ("adakv", None, "heuristic"): [0, 0, 0, 0],
    ("kvzap", "equal", "learned"): [0, 1, 0, 0], ("kvzap+pooled", "pooled", "learned"): [1, 1, 1, 0],
    ("golden", "equal", "reference"): [1, 1, 1, 0], ("golden+pooled", "pooled", "reference"): [1, 1, 1, 1],
}  # fmt: skip
"""Samples right, by name, allocation and kind."""


def write_found(path: Path, found: dict[tuple[str, str | None, str], list[float]], first: int = 3) -> Path:
    log, rows = SampleLog(log_path(path), {}), []
    for (name, allocation, kind), exact in {("full", None, "reference"): [1.0] * NUM, **found}.items():
        budget: Any = None if name == "full" else 100
        log.add(
            Key(name, "needle@400", "full" if budget is None else "1/4", "after"),
            range(first, first + NUM),
            {"exact": exact},
        )
        rows.append({
            **dict.fromkeys(KEYS), "method": name, "family": "needle@400", "budget": budget, "samples": NUM, "seed": first,
            "budget_share": budget and "1/4", "kind": kind, "allocation": allocation, "kv_bytes_peak": 2048,
            "options": {"prompt": True} if "prompt" in name else {},
        })  # fmt: skip
    write_rows(path, rows)
    return path


def test_the_margin_lies_between_the_best_training_free_method_and_pooled_golden(tmp_path: Path) -> None:
    page = margin_tables([write_found(tmp_path / "rows.jsonl", FOUND)])
    (line,) = [line for line in page.split("\n") if line.startswith("| needle@400 | 1/4 |")]
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    assert [cell.split(" ")[0] for cell in cells] == [
        "1.000", "0.250", "1.000", "0.500", "0.750", "0.750", "1.000", "+0.500"
    ]  # fmt: skip
    assert cells[3].endswith("(snapkv, profile shares 0123)") and cells[4].endswith("(kvzap, pooled)")


def test_allocations_stand_side_by_side_with_recovery(tmp_path: Path) -> None:
    page = margin_tables([write_found(tmp_path / "rows.jsonl", FOUND)])
    assert "| method | own | equal | profile | pooled |" in page
    assert "recovery from snapkv, profile shares 0123 to golden, pooled; 2 to 2 KiB at the peak" in page
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in page.split("\n") if line.startswith("| ")}
    own, equal, profile, pooled = (cell.strip() for cell in lines["kvzap"])
    assert own == profile == "–" and "(-50%" in equal and "(50%" in pooled
    assert "%" not in "".join(lines["random"] + lines["golden"]) and lines["adakv"][0].strip().startswith("0.000")
    (contest,) = read_contests([tmp_path / "rows.jsonl"])
    assert contest.best() is contest.of("snapkv", "profile") and contest.full is not None


def test_the_best_is_chosen_on_validation_samples_if_there_are_any(tmp_path: Path) -> None:
    test = write_found(tmp_path / "test.jsonl", FOUND)
    tried = {**FOUND, ("adakv", None, "heuristic"): [1.0, 1, 1, 1], ("never-tested", None, "heuristic"): [1.0, 1, 1, 1]}
    validation = write_found(tmp_path / "validation.jsonl", tried)
    write_rows(validation, [{**row, "split": "validation"} for row in read_rows(validation)])
    (contest,) = read_contests([test, validation])
    assert contest.best() is contest.of("adakv", "own") and contest.best("learned") is contest.of("kvzap", "pooled")
    assert [one.name for one in contest.scored].count("adakv") == 1
    (alone,) = read_contests([validation])
    assert alone.best() is alone.of("adakv", "own")


def test_allocations_may_come_from_several_files(tmp_path: Path) -> None:
    files = [
        write_found(tmp_path / f"{part}.jsonl", {key: exact for key, exact in FOUND.items() if (key[1] == "pooled") == one})
        for part, one in (("equal", False), ("pooled", True))
    ]  # fmt: skip
    (contest,) = read_contests(files)
    assert {(one.name, one.allocation) for one in contest.scored if one.name == "golden"} == {
        ("golden", "equal"), ("golden", "pooled")
    }  # fmt: skip
    assert "| golden | – | 0.750" in margin_tables(files)


def test_other_models_and_other_texts_are_not_compared(tmp_path: Path) -> None:
    one, two = (
        write_found(tmp_path / f"{name}.jsonl", {(name, "equal", "heuristic"): [0, 1, 0, 1]})
        for name in ("snapkv", "h2o")
    )
    rows = [{**row, "model": "another"} for row in read_rows(two)]
    assert len(list(read_contests([one, two]))) == 1
    write_rows(one, [{**row, "model": "a model"} for row in read_rows(one)])
    write_rows(two, rows)
    with pytest.raises(DataError, match="several values of model"):
        list(read_contests([one, two]))


def test_only_samples_that_all_were_measured_on_are_compared(tmp_path: Path) -> None:
    snapkv = write_found(tmp_path / "one.jsonl", {("snapkv", "equal", "heuristic"): [0, 1, 0, 1]})
    golden = write_found(tmp_path / "two.jsonl", {("golden", "equal", "reference"): [1, 1, 0, 0]}, first=5)
    (contest,) = read_contests([snapkv, golden])
    assert [one.scores for one in contest.scored] == [[0, 1], [1, 1]]
    assert contest.full is not None and contest.full.scores == [1, 1]
    golden = write_found(tmp_path / "three.jsonl", {("golden", "equal", "reference"): [1, 1, 0, 0]}, first=7)
    with pytest.warns(LearnevictWarning, match="no sample that all methods were measured on"):
        assert not list(read_contests([snapkv, golden]))


def test_an_allocation_that_is_unknown_has_a_column_of_its_own(tmp_path: Path) -> None:
    path = write_found(tmp_path / "rows.jsonl", {**FOUND, ("h2o+x", "of an\nearlier run", "heuristic"): [1, 1, 0, 0]})
    page = margin_tables([path])
    assert "| method | own | equal | profile | pooled | of an earlier run |" in page


def test_a_plain_comparison_has_no_margin(tmp_path: Path) -> None:
    plain = {("snapkv", None, "heuristic"): [1.0, 0, 0, 0]}
    assert margin_tables([write_found(tmp_path / "rows.jsonl", plain)]) == ""
    log_path(tmp_path / "rows.jsonl").unlink()
    assert margin_tables([tmp_path / "rows.jsonl"]) == ""
