"""The benchmarks run and report what they promise; no figure is compared here, except the bytes of a long prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.results.benchmarks import benchmark_tables

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {"median", "q1", "q3", "n"}


def call(*command: str, expect: int = 0, **environment: str) -> str:
    """Runs a program in the repository and returns its error output."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment}
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=900)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stderr


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What scripts/gpu writes on a CPU: every part but the kernels, as a smoke run."""
    folder = tmp_path_factory.mktemp("results")
    call("scripts/gpu", "--device", "cpu", "--smoke", "--out", str(folder), LEARNEVICT_COMMIT="0123abcd")
    (path,) = folder.iterdir()
    assert path.name == "cpu-smoke-0123abcd.json"
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_part_of_the_gpu_script_runs(report):
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(
        ("laws", "labels", "memory", "decode"), "ok"
    )
    for name, part in report["parts"].items():
        result = part["result"]
        assert result["finished"], name
        assert result["smoke"], name
        assert result["commit"] == report["commit"] == "0123abcd"
        assert {"cpu", "gpu", "cores", "threads", "torch", "transformers"} <= set(result["machine"])
        assert all({"goal", "measured", "at_most", "met"} == set(line) for line in result["goals"])


@pytest.mark.slow
def test_decode_reports_steps_events_and_ratios(report):
    result = report["parts"]["decode"]["result"]
    caches = {(row["cache"], row["tokens_seen"]) for row in result["rows"]}
    contexts, budget = result["config"]["contexts"], result["config"]["budget"]
    policies = {"streaming_llm", "h2o", "snapkv", "foresightkv"}
    stock = {("stock dynamic", budget), ("stock static", budget), ("stock dynamic", max(contexts))}
    assert caches == {(name, context) for name in policies for context in contexts} | stock
    for row in result["rows"]:
        for kind in ("amortised_ms", "plain_step_ms", "event_step_ms", "amortised_cpu_ms"):
            assert set(row[kind]) == FIGURES
            assert row[kind]["median"] > 0
    assert {row["cache"] for row in result["ratios"]} == policies
    assert len(result["goals"]) == 2 * len(policies)


@pytest.mark.slow
def test_labels_of_both_programs_agree(report):
    result = report["parts"]["labels"]["result"]
    assert result["labels_agree"]
    assert {row["program"] for row in result["rows"]} == {"streaming", "square"}
    assert all(set(row[kind]) == FIGURES for row in result["rows"] for kind in ("seconds", "peak_bytes"))


@pytest.mark.slow
def test_laws_name_every_cell(report):
    rows = report["parts"]["laws"]["result"]["rows"]
    assert all(row["ok"] for row in rows)
    assert {row["law"] for row in rows} == {"identity", "masking", "padding", "bounded", "replay"}
    assert report["parts"]["laws"]["result"]["cells_left"] == 0


@pytest.mark.slow
def test_figures_ratios_and_goals_reach_the_results_page(report, tmp_path):
    """As scripts/gpu wrote them, and as each program writes its own file."""
    (tmp_path / "cpu-smoke.json").write_text(json.dumps(report))
    for name, part in report["parts"].items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part["result"]))
    broken = {**report, "parts": {"memory": {"status": "cut off after 35 s", "seconds": 35.0, "result": None}}}
    (tmp_path / "late.json").write_text(json.dumps(broken))
    first, *parts = benchmark_tables(tmp_path)
    assert first == "## Speed and memory"
    page = "\n\n".join(parts)
    assert page.count("### ") == 2 * len(report["parts"]) + 1
    assert "### late: memory\n\nThis part cut off after 35 s." in page
    for name, part in report["parts"].items():
        result, machine = part["result"], part["result"]["machine"]
        where = f"{machine['cpu']}, 1 thread; torch {machine['torch']}, transformers {machine['transformers']}"
        for title in (name, f"cpu-smoke: {name}"):
            shown = page.split(f"### {title}\n\n")[1].split("\n\n### ")[0]
            assert shown.startswith(f"{where}; commit 0123abcd. A smoke run")
            for line in result["goals"]:
                met = "yes" if line["met"] else "**missed**"
                assert f"| {line['goal']} | {line['measured']:.4g} | {line['at_most']:.4g} | {met} |" in shown
            for row in result["rows"] if name != "laws" else []:
                for figures in (value for value in row.values() if isinstance(value, dict)):
                    assert f"{figures['median']:.4g}" in shown
                    assert figures["n"] == 1 or f"({figures['q1']:.4g}–{figures['q3']:.4g})" in shown
            for row in result.get("ratios", []):
                assert f" {row['cache']} |" in shown
                assert all(f"\n| {title} | " in shown for title in row if title != "cache")
    laws = page.split("### laws\n\n")[1]
    assert "| masking | float32 | " in laws


@pytest.mark.slow
def test_without_a_card_the_gpu_script_says_so():
    said = call("scripts/gpu", expect=2, CUDA_VISIBLE_DEVICES="")
    assert said.count("\n") == 1
    assert "--device cpu --smoke" in said


@pytest.mark.slow
def test_an_unknown_part_is_named():
    said = call("scripts/gpu", "--parts", "laws,speed", expect=2)
    assert said.count("\n") == 1
    assert "speed" in said


@pytest.mark.slow
def test_a_long_prompt_takes_the_memory_of_the_budget(report):
    """2,048 tokens in chunks of 256 at a budget of 96, heads wide enough: by nbytes and by the memory of the process."""
    result = report["parts"]["memory"]["result"]
    rows = {row["cache"]: row for row in result["rows"]}
    slots = result["config"]["budget"] + result["config"]["period"]
    assert rows["snapkv"]["slots_per_head"] <= slots
    assert rows["adakv"]["slots_per_head"] <= 1.05 * slots
    assert rows["full"]["slots_per_head"] == result["config"]["tokens"] == 16 * slots
    for name in ("snapkv", "adakv"):
        saved = rows["full"]["kv_bytes"] - rows[name]["kv_bytes"]
        assert rows["full"]["process_peak_bytes"] - rows[name]["process_peak_bytes"] >= 0.9 * saved
    assert all(line["met"] for line in result["goals"])
