"""Measures what golden labels cost: `oracle.future_attention` against attention written out as T x T.

    python benchmarks/labels.py [--device cuda] [--smoke] [--out FILE]

One layer of 8 query and 2 kv heads, head size 64, in float32. The baseline is the obvious program, which is also the published
one (ForesightKV): softmax of all scores, then means over blocks of queries; all heads at once where that fits (T < 6,000),
one head at a time above. On a CPU every run is a process of its own; the two take turns. Memory is the peak above what was
resident (on a card: allocated) once the inputs existed: labels included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measuring import Results, Watermark, begin, goal, in_child, parser, quartiles, table, timed
from rich.console import Console
from torch import Tensor

from learnevict.oracle import future_attention


@dataclass(frozen=True)
class Config:
    """The settings of the benchmark, fixed so that figures of different commits compare."""

    lengths: tuple[int, ...] = (4096, 16384)
    query_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    block: int = 128
    at_once_below: int = 6000
    warmup: int = 512
    repetitions: int = 5
    slower: float = 1.0
    memory: float = 0.1


CONFIG = Config()
SMOKE = Config(lengths=(256,), warmup=128, repetitions=1)
SAME = 1e-5  # of checksums that lie between -1 and 1: float32 sums in another order


def square(query: Tensor, key: Tensor, config: Config) -> Tensor:
    """Returns labels [B, H, T, M] from [.., T, T] probabilities; mean over the queries of a block, then over the group."""
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
    step = query.shape[1] if length < config.at_once_below else 1
    parts = []
    for start in range(0, query.shape[1], step):
        heads = torch.arange(start, start + step, device=query.device) // group
        logits = query[:, start : start + step] @ key[:, heads].mT * query.shape[-1] ** -0.5
        weights = torch.softmax(logits.masked_fill_(hidden, -torch.inf), -1)
        del logits
        parts.append(weights.unflatten(2, (-1, config.block)).mean(3))
        del weights
    return torch.cat(parts, 1).unflatten(1, (-1, group)).mean(2).mT


def streaming(query: Tensor, key: Tensor, config: Config) -> Tensor:
    """Returns what learnevict computes."""
    return future_attention(query, key, block=config.block)


PROGRAMS: dict[str, Callable[[Tensor, Tensor, Config], Tensor]] = {"streaming": streaming, "square": square}


def inputs(length: int, config: Config, device: str) -> tuple[Tensor, Tensor]:
    """Returns random queries [1, Hq, T, d] and keys [1, H, T, d]."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, config.head_dim) for heads in (config.query_heads, config.kv_heads)]
    query, key = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return query, key


def one_run(name: str, length: int, config: Config, device: str) -> dict[str, float]:
    """Returns seconds, peak bytes and a checksum of the labels of one run in this process, which lies between -1 and 1."""
    program = PROGRAMS[name]
    program(*inputs(config.warmup, config, device), config)
    query, key = inputs(length, config, device)
    labels: list[Tensor] = []
    watermark = Watermark(device)
    wall, cpu = timed(lambda: labels.append(program(query, key, config)), device)
    peak = watermark.peak
    flat = labels[0].flatten()
    weighted = flat * torch.linspace(-1, 1, len(flat), device=flat.device)
    checksum = float(weighted.sum(dtype=torch.float64) / flat.sum(dtype=torch.float64))
    return {"seconds": wall, "cpu_seconds": cpu, "peak_bytes": peak, "checksum": checksum}


def row(name: str, length: int, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Returns quartiles over the runs of one program at one length."""
    figures = {kind: quartiles([run[kind] for run in runs]) for kind in ("seconds", "cpu_seconds", "peak_bytes")}
    return {"program": name, "tokens": length, **figures, "checksum": runs[-1]["checksum"]}


def compare(runs: dict[tuple[str, int], list[dict[str, float]]], config: Config) -> list[dict[str, Any]]:
    """Returns the two goals at every length that both programs have run at."""
    goals = []
    for length in config.lengths:
        ours, theirs = runs.get(("streaming", length), []), runs.get(("square", length), [])
        pairs = list(zip(ours, theirs, strict=False))
        if not pairs:
            continue
        for kind, name, limit in (("seconds", "time", config.slower), ("peak_bytes", "memory", config.memory)):
            quotient = quartiles([a[kind] / (b[kind] or 1) for a, b in pairs])
            goals.append(goal(f"{name} over T x T at {length} tokens", quotient["median"], limit))
    return goals


def show(results: Results, console: Console) -> None:
    """Prints tables for the terminal."""

    def cell(figures: dict[str, float], unit: float) -> str:
        return f"{figures['median'] / unit:.3f} ({figures['q1'] / unit:.3f}-{figures['q3'] / unit:.3f})"

    rows = [
        [r["program"], str(r["tokens"]), cell(r["seconds"], 1), cell(r["cpu_seconds"], 1), cell(r["peak_bytes"], 2**20)]
        for r in results.content["rows"]
    ]
    columns = ["program", "tokens", "seconds", "cpu seconds", "peak MiB"]
    console.print(table("labels of one layer, median (quartiles)", columns, rows))


def main() -> None:
    """Runs the benchmark, prints its tables and saves its results."""
    options = parser(__doc__)
    options.add_argument("--repetitions", type=int, help="runs of every program at every length")
    options = options.parse_args()
    begin(options)
    config = SMOKE if options.smoke else CONFIG
    console = Console()
    results = Results("labels", options, config)
    runs: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for repetition in range(options.repetitions or config.repetitions):
        for length in config.lengths:
            for name in sorted(PROGRAMS, reverse=repetition % 2 == 0):
                case = (name, length, config, options.device)
                runs[name, length].append(in_child(one_run, *case) if options.device == "cpu" else one_run(*case))
                console.print(f"{repetition + 1}: {name} at {length}: {runs[name, length][-1]['seconds']:.2f} s")
                results.save(rows=[row(*key, found) for key, found in runs.items()], goals=compare(runs, config))
    show(results, console)
    wrong = [
        length
        for length in config.lengths
        if abs(runs["streaming", length][0]["checksum"] - runs["square", length][0]["checksum"]) > SAME
    ]
    results.save(labels_agree=not wrong)
    results.finish(console)
    if wrong:
        raise SystemExit(f"the two programs disagree at {wrong} tokens: no figure above means anything")


if __name__ == "__main__":
    main()
