"""Measures whether evicting frees memory: a long prompt read in chunks, under a full cache, snapkv and adakv.

    python benchmarks/memory.py [--device cuda] [--smoke] [--out FILE]

One process each (on a card: one after the other): the random model reads 32k tokens in chunks of 2,048. Keys and values are
counted by `cache.nbytes`, and by what the process held (on a card: allocated) at its highest, above what it held once the
model was loaded and warm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from measuring import Results, Shape, Watermark, begin, goal, in_child, parser, read, table, timed
from rich.console import Console
from transformers import DynamicCache

from learnevict import EvictingCache, attach, methods


@dataclass(frozen=True)
class Config:
    """The settings of the benchmark, fixed so that figures of different commits compare."""

    shape: Shape
    tokens: int = 32768
    chunk: int = 2048
    budget: int = 512
    period: int = 128
    policies: tuple[str, ...] = ("snapkv", "adakv")
    ragged: float = 1.05
    freed: float = 0.1


CONFIG = Config(Shape())
SMOKE = Config(
    Shape(hidden=64, query_heads=4, kv_heads=4, intermediate=64, vocabulary=64),  # keys and values outweigh work memory
    tokens=2048,
    chunk=256,
    budget=96,
    period=32,
)


def one_run(name: str, config: Config, device: str) -> dict[str, Any]:
    """Returns bytes and seconds of one prompt in this process."""
    model = config.shape.model(device)
    ids = config.shape.tokens(config.tokens, device)
    if name == "full":
        read(model, ids[:, : config.chunk], DynamicCache(config=model.config), config.chunk)
        cache: Any = DynamicCache(config=model.config)
    else:
        policy = methods.load(name).policy(config.budget, slack=config.period)
        with attach(model, policy) as warm:
            read(model, ids[:, : config.chunk], warm, config.chunk)
        del warm
        attach(model)
        cache = EvictingCache(model.config, policy)
    watermark = Watermark(device)
    wall, cpu = timed(lambda: read(model, ids, cache, config.chunk), device)
    figures = {"cache": name, "seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}
    figures |= {"process_peak_bytes": watermark.peak, "process_end_bytes": watermark.now}
    if name == "full":
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        figures |= {"kv_bytes": held, "kv_bytes_peak": held, "kv_bytes_full": held, "aux_bytes": 0}
    else:
        figures |= {"kv_bytes": cache.nbytes, "kv_bytes_peak": cache.peak_nbytes, "kv_bytes_full": cache.full_nbytes}
        figures |= {"aux_bytes": cache.aux_nbytes}
    figures["slots_per_head"] = round(figures["kv_bytes"] / config.shape.kv_heads / config.shape.slot_bytes, 2)
    return figures


def compare(rows: list[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    """Returns the goals that the rows at hand can answer."""
    found = {row["cache"]: row for row in rows}
    allowed = (config.budget + config.period) * config.shape.kv_heads * config.shape.slot_bytes
    goals = []
    for name in config.policies:
        if name not in found:
            continue
        ragged = methods.load(name).policy(config.budget, slack=config.period).allocator.ragged
        for kind in ("kv_bytes", "kv_bytes_peak"):
            title = f"{name}: {kind} over (budget + slack) slots per head"
            goals.append(goal(title, found[name][kind] / allowed, config.ragged if ragged else 1.0))
        if "full" in found:
            # Work memory is the same or less; so what the process saves is what the cache saves, within `freed`.
            saved = found["full"]["kv_bytes"] - found[name]["kv_bytes"]
            less = found["full"]["process_peak_bytes"] - found[name]["process_peak_bytes"]
            goals.append(
                goal(f"{name}: share of the saved bytes that the process did not save", 1 - less / saved, config.freed)
            )
    return goals


def main() -> None:
    """Runs the benchmark, prints its table and saves its results."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, help="a shorter prompt")
    options = options.parse_args()
    begin(options)
    config = SMOKE if options.smoke else CONFIG
    config = replace(config, tokens=options.tokens or config.tokens)
    console = Console()
    results = Results("memory", options, config)
    rows: list[dict[str, Any]] = []
    for name in (*config.policies, "full"):
        case = (name, config, options.device)
        rows.append(in_child(one_run, *case) if options.device == "cpu" else one_run(*case))
        results.save(rows=rows, goals=compare(rows, config))
        console.print(f"{name}: {config.tokens} tokens in {rows[-1]['seconds']:.1f} s")
    kinds = [kind for kind in rows[0] if kind.endswith("bytes") or "kv_bytes" in kind]
    lines = [[r["cache"], *(f"{r[kind] / 2**20:.2f}" for kind in kinds), f"{r['slots_per_head']}"] for r in rows]
    columns = ["cache", *(kind.replace("_", " ") + ", MiB" for kind in kinds), "slots per head"]
    console.print(table(f"bytes after {config.tokens} tokens", columns, lines))
    results.finish(console)


if __name__ == "__main__":
    main()
