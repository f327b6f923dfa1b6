"""The results page: goals reached or missed as the rows say, the gates of every row, and how old a benchmark is."""

from __future__ import annotations

import json
import subprocess

import pytest

from learnevict import methods, testbed
from learnevict.evals import tuning
from learnevict.evals.plan import Key
from learnevict.evals.sample_log import SampleLog
from tools.results import benchmarks, goals, sections, tables
from tools.results.goals import MET, MISSED, UNMEASURED, UNSCORED, Evidence
from tools.results.records import Records, of_run

LEARNED = ("lexical", "foresightkv-sl", "foresightkv", "dbtrimkv")
SEEDS = range(6)


def results(right: dict[tuple[str, str, str], int], exact: dict[tuple[str, str, str], float] | None = None) -> Records:
    """Six samples of ten answer-mask tokens each; every sample of a (method, family, budget) has so many right."""
    log, rows = SampleLog(None, {}), []
    for (method, family, budget), count in right.items():
        log.add(Key(method, family, budget, "teacher"), SEEDS, {"right": [count] * 6, "seen": [10] * 6})
        kind = "learned" if method in LEARNED else "reference" if method == "golden" else "heuristic"
        place = {"method": method, "family": family, "budget": 9, "budget_share": budget, "kind": kind}
        rows.append(place | {"seed": 0, "samples": 6, "step_accuracy": count / 10})
    for (method, family, budget), share in (exact or {}).items():
        log.add(Key(method, family, budget, "free"), SEEDS, {"exact": [share] * 6})
    return of_run(rows, log)


def tuned(*families: str) -> tuning.Tuned:
    """Keydiff was the best heuristic at every budget."""
    budgets = ("1/4", "1/6", "1/8", "1/12", "1/15")
    return tuning.Tuned({}, {}, {family: {budget: {"keydiff": 0.5} for budget in budgets} for family in families})


def everywhere(**right: int) -> dict[tuple[str, str, str], int]:
    return {
        (name.replace("_", "-"), family, budget): count
        for name, count in right.items()
        for family in testbed.FAMILIES
        for budget in ("1/4", "1/6", "1/8")
    }


def test_recovery_goals_are_met_missed_unscored_or_unmeasured():
    main = results(everywhere(keydiff=4, golden=9, foresightkv_sl=8))
    seen = Evidence(main, None, tuned(*testbed.FAMILIES))
    line = seen.recovery("foresightkv-sl", "program", "1/8", 0.75)
    assert (line.found, line.status) == ("0.800 [0.800, 0.800]", MET)
    assert seen.recovery("foresightkv-sl", "all families", "1/8", 0.85).status == MISSED
    narrow = Evidence(results(everywhere(keydiff=9, golden=9, foresightkv_sl=8)), None, tuned(*testbed.FAMILIES))
    assert narrow.recovery("foresightkv-sl", "all families", "1/8", 0.75).status == UNSCORED
    for place, evidence in (
        ("program", Evidence(main, None, None)),
        ("all families", Evidence(main, None, tuned("program"))),
    ):
        line = evidence.recovery("foresightkv-sl", place, "1/8", 0.75)
        assert line.status == UNMEASURED and "not tuned" in line.found
    assert seen.recovery("foresightkv", "program", "1/8", 0.75).found == "– (program not run)"


def test_goals_of_differences_are_met_by_interval_or_by_p():
    right = everywhere(golden=9, foresightkv_sl=8, foresightkv=9)
    exact = {("foresightkv", family, "1/6"): 1.0 for family in testbed.FAMILIES}
    exact |= {("foresightkv-sl", family, "1/6"): float(family != "program") for family in testbed.FAMILIES}
    main = results(right, exact)
    seen = Evidence(main, main, None)
    pair = ("foresightkv", "foresightkv-sl")
    line = seen.difference(pair, "program", "1/6", "teacher", "tested")
    assert (line.found, line.status) == ("+0.100 [+0.100, +0.100], p = 0.0001", MET)
    line = seen.difference(pair, "all families", "1/6", "free", "tested")
    assert (line.found.split(" ")[0], line.status) == ("+0.200", MET)
    assert seen.difference(pair, "program", "1/12", "teacher", "tested").status == UNMEASURED
    assert Evidence(main, None, None).difference(pair, "program", "1/6", "free", "tested").status == UNMEASURED
    assert seen.difference(("foresightkv", "golden"), "program", "1/6", "teacher", "reached").status == MET
    assert seen.difference(("foresightkv", "golden"), "program", "1/6", "teacher", "above").status == MISSED
    assert seen.difference(("foresightkv-sl", "golden"), "program", "1/6", "teacher", "reached").status == MISSED


def test_the_best_supervised_method_is_named_with_what_the_choice_rests_on():
    right = everywhere(keydiff=4, golden=9, lexical=9, foresightkv_sl=7, dbtrimkv=8, foresightkv=9)
    page = "\n".join(goals.goal_tables(results(right), None, tuned(*testbed.FAMILIES)))
    assert "Supervised is dbtrimkv: of 2 learned methods" in page and "next is foresightkv-sl with 0.7000" in page
    assert (
        "test rows" in page
        and "| dbtrimkv: recovery, program, 1/8 | at least 75 % | 0.800 [0.800, 0.800] | met |" in page
    )
    assert "| dbtrimkv minus lexical: step accuracy, all families, 1/8 | interval above 0 | -0.100" in page
    assert "foresightkv minus foresightkv-sl: exact match in free generation, program, 1/12" in page
    assert page.count("| not measured |") > 5
    del right["dbtrimkv", "recall", "1/8"]
    page = "\n".join(goals.goal_tables(results(right), None, None))
    assert "Supervised is foresightkv-sl, the only such method" in page and "Not run everywhere: dbtrimkv." in page
    nobody = "\n".join(goals.goal_tables(results(everywhere(keydiff=4)), None, None))
    assert "No supervised method was run on all families" in nobody and nobody.startswith("## Goals")


@pytest.mark.parametrize(
    ("settings", "said"), [({"demand": [4, 1, 43]}, "as learned in refinement"), ({}, "equal shares")]
)
def test_the_page_says_who_is_who(settings, said, tmp_path):
    for name, config in (
        ("foresightkv", {"settings": settings}),
        ("trimkv-long", {"method": "trimkv", "settings": {}}),
    ):
        folder = tmp_path / f"testbed-{name}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"method": "foresightkv", **config}))
    names = {"foresightkv", "foresightkv-sl", "foresightkv-equal", "trimkv-long", "lexical"}
    refined, start, equal, other = tables.who_is_who(names, tmp_path)
    assert said in refined and "refined by reinforcement" in refined
    assert "supervised scorer" in start and equal == "foresightkv-equal was refined with equal shares."
    assert other == "trimkv-long are gates of trimkv."
    assert tables.who_is_who({"lexical"}, tmp_path) == []


def test_tokens_per_second_are_no_benchmark():
    main = results({("random", "recall", "1/4"): 4}, {("random", "recall", "1/4"): 1.0})
    main.rows[0] |= {"exact_match": 1.0, "tokens_generated": 9.0, "tokens_per_second": 50.0, "kv_bytes_peak": 2048}
    page = "\n".join(sections.family_parts(main, "recall", "free", None))
    assert "a single pass in batches of at most 6 samples on a shared CPU" in page and "no benchmark" in page
    assert "(#speed-and-memory)" in page and "| random | 50 / 2 |" in page


def test_a_benchmark_older_than_the_code_it_measured_says_so(tmp_path, monkeypatch):
    """In a repository of its own: code is committed, measured, and changed."""

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    for name in ("learnevict/infer/cache.py", "learnevict/oracle/labels.py", "learnevict/inference.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "measured")
    commit = git("rev-parse", "--short=12", "HEAD")
    monkeypatch.setattr(benchmarks, "ROOT", tmp_path)
    (tmp_path / "learnevict" / "inference.py").write_text("2\n")
    assert benchmarks.age({"benchmark": "decode", "commit": commit}) == []
    (tmp_path / "learnevict" / "infer" / "cache.py").write_text("2\n")
    git("commit", "-q", "-a", "-m", "later")
    (said,) = benchmarks.age({"benchmark": "decode", "commit": f"{commit}-dirty"})
    assert said == f"**Older than the code**: since commit {commit}-dirty learnevict/infer changed; run it again."
    assert benchmarks.age({"benchmark": "labels", "commit": commit}) == []
    for unknown in ("0123abcd", "--output=x", ""):
        (said,) = benchmarks.age({"benchmark": "decode", "commit": unknown})
        assert "cannot be told" in said


def test_only_learned_methods_without_rows_are_missed():
    """Rows of dbtrimkv that say gates_of: trimkv, made before it was a method of its own, are rows of dbtrimkv."""
    right = {(name, "recall", "1/4"): 4 for name in methods.METHODS if name not in ("kvp", "trimkv")}
    main = results(right)
    for row in main.rows:
        row["gates_of"] = "trimkv" if row["method"] == "dbtrimkv" else None
    assert sections.notes(main) == ["No gates, so not here: kvp."]
