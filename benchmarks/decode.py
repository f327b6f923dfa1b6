"""Measures how long a decode step takes under a policy, after prompts of any length, beside stock caches.

    python benchmarks/decode.py [--profile] [--device cuda] [--smoke] [--out FILE]

(a) Latency of a step at 1k, 8k and 32k tokens seen: amortised over one period (127 plain steps and one event), plain
steps and event steps apart; and the ratio to a stock DynamicCache that holds all 32k tokens.
(b) Overhead over a stock model with sdpa that attends to as many cached tokens: budget ... budget + period.

A repetition is one period of every cell. Cells take turns every few steps, in an order that rotates, so that a busy
moment of the machine hits all of them; ratios are taken within a repetition, then medians and quartiles over
repetitions. Prompts are read in chunks; stock caches of a given length are filled with random keys and values, which
costs the same.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from measuring import Results, Shape, begin, goal, parser, quartiles, read, synchronize, table
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel, StaticCache

from learnevict import EvictingCache, Gates, attach, methods
from learnevict.ops import using_kernels
from learnevict.policy import Policy


@dataclass(frozen=True)
class Config:
    """The settings of the benchmark, fixed so that figures of different commits compare."""

    shape: Shape
    policies: tuple[str, ...] = ("streaming_llm", "h2o", "snapkv", "foresightkv")
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    budget: int = 512
    period: int = 128
    chunk: int = 2048
    turn: int = 16
    repetitions: int = 7
    warmup: int = 1
    flat: float = 0.10
    overhead: float = 0.15


CONFIG = Config(Shape())
SMOKE = Config(
    Shape(hidden=64, layers=2, intermediate=64, head_dim=16, vocabulary=64),
    contexts=(32, 64),
    budget=24,
    period=8,
    chunk=32,
    turn=4,
    repetitions=1,
    warmup=0,
)


class Cell:
    """One cache whose decode steps are timed; `renew` makes the cache anew for every repetition."""

    def __init__(
        self, name: str, context: int, model: PreTrainedModel, cache: Any, renew: Callable[[], Any] | None = None
    ) -> None:
        self.name, self.context, self.model, self.cache, self.renew = name, context, model, cache, renew
        self.wall: list[list[float]] = []
        self.cpu: list[list[float]] = []

    def begin(self) -> None:
        """Starts a repetition."""
        self.wall.append([])
        self.cpu.append([])
        if self.renew is not None:
            self.cache = self.renew()

    @torch.no_grad()
    def steps(self, ids: Tensor, device: str) -> None:
        """Runs one forward per column of ids [1, n], each timed."""
        for token in ids.split(1, dim=1):
            synchronize(device)
            cpu, wall = time.process_time(), time.perf_counter()
            self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
            synchronize(device)
            self.wall[-1].append(time.perf_counter() - wall)
            self.cpu[-1].append(time.process_time() - cpu)

    def amortised(self, kind: str = "wall") -> list[float]:
        """Returns milliseconds per step, one figure a repetition."""
        return [1e3 * statistics.mean(period) for period in vars(self)[kind]]

    def plain(self, kind: str = "wall") -> list[float]:
        """Returns median milliseconds of the steps without an event, one figure a repetition."""
        return [1e3 * statistics.median(period[:-1]) for period in vars(self)[kind]]

    def row(self) -> dict[str, Any]:
        """Returns its figures, in milliseconds; the last step of a period is the event step."""
        return {
            "cache": self.name,
            "tokens_seen": self.context,
            "amortised_ms": quartiles(self.amortised(), 4),
            "plain_step_ms": quartiles([1e3 * step for period in self.wall for step in period[:-1]], 4),
            "event_step_ms": quartiles([1e3 * period[-1] for period in self.wall], 4),
            "amortised_cpu_ms": quartiles(self.amortised("cpu"), 4),
        }


def filled(cache: Any, model: PreTrainedModel, length: int) -> Any:
    """Returns the stock cache with random keys and values of `length` tokens in every layer."""
    config = model.config
    shape = (1, config.num_key_value_heads, length, config.head_dim)
    part = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(model.device)
    for layer in range(config.num_hidden_layers):
        cache.update(part, part.flip(-1), layer)
    return cache


def make_policy(name: str, config: Config, model: PreTrainedModel) -> Policy:
    """Returns the policy with its published defaults; a learned method gets untrained gates, which cost the same."""
    options: dict[str, Any] = {"budget": config.budget, "slack": config.period}
    if config.budget < CONFIG.budget:
        options["recent"] = 2  # published windows do not fit the smoke run
    if name == "foresightkv":
        policy = Gates.make(name, model).policy(**options)
        policy.scorer.to(model.device)
        return policy
    return methods.load(name).policy(**options)


def make_cells(config: Config, device: str, console: Console) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Returns every cell, its prompt read; and how long the prompts took."""
    model, stock = config.shape.model(device), config.shape.model(device)
    stock.load_state_dict(model.state_dict(), assign=True)  # one set of weights: equal luck in the processor's caches
    attach(model)
    ids = config.shape.tokens(max(config.contexts), device)
    cells: list[Cell] = []
    prompts = []
    for name in config.policies:
        policy = make_policy(name, config, model)
        cache = EvictingCache(model.config, policy)
        start, begun = 0, time.perf_counter()
        for context in config.contexts:
            read(model, ids[:, start:context], cache, config.chunk)
            synchronize(device)
            prompts.append({"cache": name, "tokens": context, "seconds": round(time.perf_counter() - begun, 3)})
            cells.append(Cell(name, context, model, copy.deepcopy(cache, {id(policy): policy})))
            start = context
        console.print(f"{name}: read {start} tokens in {prompts[-1]['seconds']:.1f} s")
    return cells + stock_cells(config, stock), prompts


def stock_cells(config: Config, stock: PreTrainedModel) -> list[Cell]:
    """Returns cells of stock caches: from the budget to one period more, growing or static, and all that was ever read."""
    small, longest = config.budget, max(config.contexts)

    def dynamic() -> Any:
        return filled(DynamicCache(config=stock.config), stock, small)

    def static() -> Any:
        return filled(StaticCache(config=stock.config, max_cache_len=small + config.period), stock, small)

    full = filled(DynamicCache(config=stock.config), stock, longest)
    return [
        Cell("stock dynamic", small, stock, None, dynamic),
        Cell("stock static", small, stock, None, static),
        Cell("stock dynamic", longest, stock, full),
    ]


def measure(cells: list[Cell], config: Config, device: str, results: Results, console: Console) -> None:
    """Runs all repetitions, interleaved; figures are saved after each."""
    turns = -(-config.period // config.turn)
    for repetition in range(config.warmup + config.repetitions):
        ids = config.shape.tokens(config.period, device, seed=repetition + 1)
        for cell in cells:
            cell.begin()
        for turn, part in enumerate(ids.split(config.turn, dim=1)):
            first = (repetition * turns + turn) % len(cells)
            for cell in cells[first:] + cells[:first]:
                cell.steps(part, device)
        if repetition < config.warmup:
            for cell in cells:
                cell.wall, cell.cpu = [], []
            continue
        ratios, goals = compare(cells, config)
        results.save(rows=[cell.row() for cell in cells], ratios=ratios, goals=goals)
        console.print(f"repetition {repetition - config.warmup + 1} of {config.repetitions}")


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Returns quartiles of the quotient, repetition by repetition."""
    return quartiles([a / b for a, b in zip(over, under, strict=True)], 4)


def compare(cells: list[Cell], config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns ratios of latencies, and the two goals for every policy."""
    found = {(cell.name, cell.context): cell for cell in cells}
    shortest, longest = min(config.contexts), max(config.contexts)
    dynamic, static = found["stock dynamic", config.budget], found["stock static", config.budget]
    ratios, goals = [], []
    for name in config.policies:
        here, there = found[name, shortest], found[name, longest]
        row = {
            "cache": name,
            f"amortised, {longest} over {shortest} seen": ratio(there.amortised(), here.amortised()),
            f"amortised, over stock dynamic of {longest}": ratio(
                there.amortised(), found["stock dynamic", longest].amortised()
            ),
            "amortised, over stock dynamic of the budget": ratio(here.amortised(), dynamic.amortised()),
            "plain step, over stock dynamic of the budget": ratio(here.plain(), dynamic.plain()),
            "amortised, over stock static of the budget": ratio(here.amortised(), static.amortised()),
            "amortised cpu time, over stock dynamic of the budget": ratio(
                here.amortised("cpu"), dynamic.amortised("cpu")
            ),
        }
        ratios.append(row)
        flat = row[f"amortised, {longest} over {shortest} seen"]
        slower = row["amortised, over stock dynamic of the budget"]
        goals.append(goal(f"{name}: flat from {shortest} to {longest} tokens seen", flat["median"] - 1, config.flat))
        goals.append(goal(f"{name}: overhead at equal cached tokens", slower["median"] - 1, config.overhead))
    return ratios, goals


def profiled(cells: list[Cell], goals: list[dict[str, Any]], config: Config, device: str) -> dict[str, Any]:
    """Returns where one period goes, for the stock cache of the budget and every policy that missed a goal."""
    missed = {line["goal"].partition(":")[0] for line in goals if not line["met"]}
    chosen = [c for c in cells if (c.name in missed and c.context == min(config.contexts)) or c.renew is not None]
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device.startswith("cuda")
    out = {}
    for cell in chosen:
        cell.begin()
        with profile(activities=kinds) as record:
            cell.steps(config.shape.tokens(config.period, device), device)
        events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
        per_step = 1e-3 / config.period  # microseconds of a period to milliseconds of a step
        out[f"{cell.name} at {cell.context}"] = {
            "step_ms_while_profiled": round(1e3 * statistics.mean(cell.wall[-1]), 4),
            "operators_ms": round(sum(event.self_cpu_time_total for event in events) * per_step, 4),
            "operator_calls": round(sum(event.count for event in events) / config.period, 1),
            "top": [
                {"operator": e.key, "calls": e.count / config.period, "ms": round(e.self_cpu_time_total * per_step, 4)}
                for e in events[:15]
            ],
        }
    return out


def show(results: Results, console: Console) -> None:
    """Prints tables for the terminal."""
    content = results.content

    def cell(figures: dict[str, float]) -> str:
        return f"{figures['median']:.3f} ({figures['q1']:.3f}-{figures['q3']:.3f})"

    kinds = ("amortised_ms", "plain_step_ms", "event_step_ms", "amortised_cpu_ms")
    rows = [[row["cache"], str(row["tokens_seen"]), *(cell(row[kind]) for kind in kinds)] for row in content["rows"]]
    columns = ["cache", "tokens seen", *(kind.removesuffix("_ms").replace("_", " ") for kind in kinds)]
    console.print(table("milliseconds per decode step, median (quartiles)", columns, rows))
    for row in content["ratios"]:
        lines = [[name, cell(figures)] for name, figures in row.items() if name != "cache"]
        console.print(table(f"{row['cache']}: ratios", ["ratio", "median (quartiles)"], lines))
    for name, part in content.get("profile", {}).items():
        lines = [[line["operator"], f"{line['calls']:.1f}", f"{line['ms']:.4f}"] for line in part["top"]]
        step, inside = part["step_ms_while_profiled"], part["operators_ms"]
        title = f"{name}: {step:.2f} ms a step profiled, {inside:.2f} in operators"
        console.print(table(title, ["operator", "calls a step", "self ms a step"], lines))


def main() -> None:
    """Runs the benchmark, prints its tables and saves its results."""
    options = parser(__doc__)
    options.add_argument("--profile", action="store_true", help="profile the policies that miss a goal")
    options.add_argument("--repetitions", type=int, help="timed periods of every cell")
    options.add_argument("--kernels", action="store_true", help="decode through the Triton kernels (CUDA)")
    options = options.parse_args()
    begin(options)
    config = SMOKE if options.smoke else CONFIG
    config = replace(config, repetitions=options.repetitions or config.repetitions)
    console = Console()
    results = Results("decode", options, config)
    results.save(kernels=options.kernels)
    with using_kernels("on" if options.kernels else "off"):
        cells, prompts = make_cells(config, options.device, console)
    results.save(prompts=prompts)
    measure(cells, config, options.device, results, console)
    if options.profile:
        results.save(profile=profiled(cells, results.content["goals"], config, options.device))
    show(results, console)
    results.finish(console)


if __name__ == "__main__":
    main()
