"""Measures what it costs to label a million tokens of the testbed with golden attention, by one process and by two.

    python benchmarks/labelling.py [--smoke] [--out FILE]

Runs recipes/oracle.py as a person would, alone and under torchrun, in turn, each into a folder of its own, and compares the
files. Seconds are those of labelling, from the first shard to the moment when all processes are done; the whole program also
loads the model and writes the texts. One thread per process, so two processes have two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import ROOT, Results, begin, goal, parser, quartiles, table
from rich.console import Console


@dataclass(frozen=True)
class Config:
    """The settings of the benchmark, fixed so that figures of different commits compare."""

    documents: int = 2900  # of 345 tokens each, a million in all
    per_shard: int = 100
    batch_size: int = 16
    processes: tuple[int, ...] = (1, 2)
    repetitions: int = 1
    at_most: float = 0.6  # of the seconds of one process


CONFIG = Config()
SMOKE = Config(documents=8, per_shard=2, batch_size=2)


def one_run(processes: int, config: Config, threads: int, out: Path) -> dict[str, Any]:
    """Returns tokens, seconds of labelling and of the whole program, and what the files hold."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    sizes = ["--documents", config.documents, "--per_shard", config.per_shard, "--batch_size", config.batch_size]
    command = [sys.executable, *launcher, "recipes/oracle.py", "--out", out, "--threads", threads, *sizes]
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    began = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False
    )
    wall = time.perf_counter() - began
    record = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
    if record.get("status") != "finished":  # the exit code is not asked: gloo may abort when all is done
        raise RuntimeError(f"{processes} processes ended with {done.returncode}: {done.stderr[-500:]}")
    files = {path.name: path.read_bytes() for path in sorted((out / "data").glob("*.parquet"))}
    assert record["num_processes"] == processes, "the processes did not find each other"
    return {"tokens": record["num_tokens"], "seconds": record["labelling_seconds"], "wall": wall, "files": files}


def row(processes: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one number of processes."""
    tokens = runs[-1]["tokens"]
    return {
        "processes": processes,
        "tokens": tokens,
        "seconds": quartiles([run["seconds"] for run in runs]),
        "program_seconds": quartiles([run["wall"] for run in runs]),
        "seconds_per_million": quartiles([run["seconds"] / tokens * 1e6 for run in runs]),
        "tokens_per_second": quartiles([tokens / run["seconds"] for run in runs]),
    }


def main() -> None:
    """Runs both, compares their files and saves the results."""
    options = parser(__doc__)
    options.add_argument("--repetitions", type=int, help="runs of every number of processes")
    options = options.parse_args()
    begin(options)
    if options.device != "cpu":
        raise SystemExit("this benchmark is about processes on CPU cores; leave --device out")
    config = SMOKE if options.smoke else CONFIG
    console, results = Console(), Results("labelling", options, config)
    runs: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for repetition in range(options.repetitions or config.repetitions):
        for processes in config.processes[:: 1 if repetition % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                runs[processes].append(one_run(processes, config, options.threads, Path(folder)))
            last = runs[processes][-1]
            console.print(f"{processes} processes: {last['tokens']} tokens in {last['seconds']:.1f} s")
            results.save(rows=[row(number, found) for number, found in runs.items()])
    alone, together = (results.content["rows"][place]["seconds"]["median"] for place in (0, -1))
    same = all(run["files"] == runs[1][0]["files"] for found in runs.values() for run in found)
    results.save(
        goals=[
            goal(f"seconds of {config.processes[-1]} processes over those of one", together / alone, config.at_most)
        ],
        files_agree=same,
    )
    lines = [
        [
            str(r["processes"]),
            str(r["tokens"]),
            *(f"{r[name]['median']:.1f}" for name in ("seconds", "program_seconds")),
        ]
        for r in results.content["rows"]
    ]
    console.print(table("labels of the testbed", ["processes", "tokens", "seconds", "whole program"], lines))
    results.finish(console)
    if not same:
        raise SystemExit("the numbers of processes wrote different files: no figure above means anything")


if __name__ == "__main__":
    main()
