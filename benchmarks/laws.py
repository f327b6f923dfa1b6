"""Checks the laws of eviction on the device at hand, in float32 and bfloat16, without pytest.

    python benchmarks/laws.py [--device cuda] [--seconds 60] [--smoke] [--out FILE]

The same methods, tiny random models and naive reference as the tests (tests/laws), plus the trained testbed model.

float32    identity    a budget that holds everything changes no logit of the eager model
           masking     the logits of a stock model told what each head may see, and of the replayed trace
           padding     a left-padded row answers as it does alone under the same trace; free traces agree
           bounded     never more than budget + slack slots per head, by count and by bytes
bfloat16   replay      logits equal those of the replayed trace within a few times the distance of bfloat16 from float32
           bounded     as above; how far free traces agree with float32 is reported
on CUDA    no sync     no decode step waits for the card; kernels: within rounding of the reference

Cells are visited so that every method meets one model before any meets the next; what the time does not allow is counted.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, Results, begin, parser, table
from rich.console import Console
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Which cells, and how close is equal; tolerances are relative to the largest logit."""

    models: tuple[str, ...] = ("qwen3", "llama", "gemma2", "testbed")
    methods: tuple[str, ...] = ()
    same: float = 1e-5
    close: float = 1e-4
    noise: float = 4.0
    agree: float = 0.98


CONFIG = Config()
SMOKE = Config(models=("qwen3",), methods=("snapkv", "adakv"))


@dataclass
class Outcome:
    """The outcome of one law in one cell: a distance and what it may be at most."""

    error: float
    limit: float
    holds: bool | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is within the limit, unless told otherwise."""
        return self.error <= self.limit if self.holds is None else self.holds


class Bench:
    """The laws over cases of tests/laws, which must be imported after LAWS_DEVICE is set."""

    def __init__(self, config: Config) -> None:
        from learnevict import replay
        from learnevict.signals import NEVER, Trace
        from tests.laws import cases, naive, run, zoo

        self.config, self.cases, self.naive, self.run, self.zoo = config, cases, naive, run, zoo
        self.replay, self.trace, self.never = replay, Trace, NEVER

    def cells(self) -> Iterator[tuple[str, str, str]]:
        """Returns cells (method, model, dtype): all methods on rotating models, in both types, before the next round."""
        models = [name for name in self.config.models if name in self.zoo.MODELS]
        methods = [name for name in self.cases.VARIANTS if not self.config.methods or name in self.config.methods]
        for turn in range(len(models)):
            for dtype in ("float32", "bfloat16"):
                for index, method in enumerate(methods):
                    yield method, models[(index + turn) % len(models)], dtype

    def laws(self, dtype: str, device: str) -> dict[str, Callable[[Any], Outcome]]:
        """Returns the laws that are checked in a dtype."""
        if dtype == "bfloat16":
            return {"replay": self.replay_in_bfloat16, "bounded": self.bounded_in_bfloat16}
        found = {"identity": self.identity, "masking": self.masking, "padding": self.padding, "bounded": self.bounded}
        return found | ({"no sync": self.no_sync} if device.startswith("cuda") else {})

    def _distance(self, one: Tensor, other: Tensor, mask: Tensor, limit: float, **rest: Any) -> Outcome:
        real = mask.bool()
        return Outcome(relative_error(one[real], other[real]), limit, **rest)

    def identity(self, case: Any) -> Outcome:
        """Compares a budget that holds everything with the stock model."""
        run = case.fresh_run(budget=self.cases.AMPLE)
        return self._distance(run.logits, self.naive.stock(case.model, run.ids, run.mask), run.mask, self.config.same)

    def masking(self, case: Any) -> Outcome:
        """Compares with a model told what each head may see, and with replay."""
        run = case.run
        expiry = run.trace.expiry
        told = self.naive.masked_logits(case.model, run.ids, run.mask, expiry)
        with torch.no_grad():
            again = self.replay(case.model, run.ids, run.trace, run.mask).logits
        masked = self._distance(run.logits, told, run.mask, self.config.close)
        replayed = self._distance(run.logits, again, run.mask, self.config.close)
        evicted = f"{case.count} evictions"
        return Outcome(max(masked.error, replayed.error), self.config.close, note=evicted)

    def padding(self, case: Any) -> Outcome:
        """Compares row by row; on a card sums of another order may break a near tie, so traces are compared as shares."""
        run, worst, equal, count = case.run, 0.0, 0, 0
        for row, pad in enumerate(self.run.PADS):
            ids = run.ids[row : row + 1, pad:]
            mask = torch.ones_like(ids)
            pieces = self.run.pieces(self.run.PROMPT - pad, ids.shape[1])
            alone = self.run.read(case.model, case.policy(ids, mask), ids, mask, pieces)
            mine = run.trace.expiry[:, row : row + 1, :, pad:]
            shifted = torch.where(mine == self.never, self.never, mine - pad)
            equal += int((alone.trace.expiry == shifted).sum())
            count += shifted.numel()
            with torch.no_grad():
                forced = self.replay(case.model, ids, self.trace(shifted)).logits
            worst = max(worst, self._distance(run.logits[row : row + 1, pad:], forced, mask, self.config.close).error)
        share = equal / count
        holds = worst <= self.config.close and share >= self.config.agree
        return Outcome(worst, self.config.close, holds, f"traces agree {share:.1%}")

    def bounded(self, case: Any, run: Any = None) -> Outcome:
        """Returns the largest share of budget + slack ever held; ragged storage may take 5 % more in bytes."""
        run = run or case.run
        if (case.method, "bounded") in self.cases.EXEMPT:
            return Outcome(0.0, 1.0, note="exempt: " + self.cases.EXEMPT[case.method, "bounded"])
        peak = self.cases.BUDGET + case.slack
        share = 0.0
        for moment in run.moments:
            counts = [(held >= 0).sum((1, 2)).float() / held.shape[1] for held in moment.positions.values()]
            share = max(share, float(torch.stack(counts).mean(0).max()) / peak)
        layers = [run.cache.layers[index] for index in run.cache.evicting]
        held = sum(layer.peak_nbytes for layer in layers)
        one = sum(part.shape[-1] * part.element_size() for part in (layers[0].store.keys, layers[0].store.values))
        heads = layers[0].store.position.shape[1]
        slots = held / (len(layers) * len(self.run.PADS) * heads * one * peak)
        return Outcome(max(share, slots / (1.05 if run.policy.allocator.ragged else 1.0)), 1.0)

    def _bfloat16(self, case: Any) -> tuple[Any, Any]:
        model = self.zoo.fresh(case.model_name).to(torch.bfloat16)
        ids, mask = case.text()
        return model, self.run.read(model, case.policy(ids, mask), ids, mask)

    def replay_in_bfloat16(self, case: Any) -> Outcome:
        """Forces the trace; the yardstick is how far the stock model moves when rounded to bfloat16."""
        model, run = self._bfloat16(case)
        with torch.no_grad():
            again = self.replay(model, run.ids, run.trace, run.mask).logits.float()
        rounded = self.naive.stock(model, run.ids, run.mask).float()
        exact = self.naive.stock(case.model, run.ids, run.mask)
        noise = max(self._distance(rounded, exact, run.mask, 1.0).error, torch.finfo(torch.bfloat16).eps)
        agree = (run.trace.expiry == case.run.trace.expiry).float().mean().item()
        note = f"free traces agree {agree:.1%} with float32"
        return self._distance(run.logits.float(), again, run.mask, self.config.noise * noise, note=note)

    def bounded_in_bfloat16(self, case: Any) -> Outcome:
        """Checks as in float32."""
        return self.bounded(case, self._bfloat16(case)[1])

    def no_sync(self, case: Any) -> Outcome:
        """Counts the places in learnevict that wait for the card in the second decode step and the event steps after it.

        Events of scope "model" may: how much each layer holds is read by the host (tests/infer/test_decode_step.py).
        """
        ids, mask = case.text()
        from learnevict import attach

        policy = case.policy(ids, mask)
        with attach(case.model, policy) as cache:
            reader = self.run.Reader(case.model, cache, ids, mask, self.run.pieces(self.run.PROMPT, ids.shape[1]))
            next(moment for moment in reader if moment.length > self.run.PROMPT)
            places: set[str] = set()
            for step in range(self.run.PROMPT + 1, self.run.PROMPT + 1 + 2 * max(case.slack, 1)):
                found = waits(case.model, cache, ids[:, step : step + 1], mask[:, : step + 1])
                event = any((step + 1 - pad) % max(case.slack, 1) == 0 for pad in self.run.PADS)
                places |= set() if event and policy.scope == "model" else found
        ours = sorted(place for place in places if place.startswith("learnevict/"))
        return Outcome(float(len(ours)), 0.0, note="; ".join(ours))


@torch.no_grad()
def waits(model: Any, cache: Any, ids: Tensor, mask: Tensor) -> set[str]:
    """Returns where one forward synchronises with the card: file:line."""
    positions = mask.long().sum(-1, keepdim=True) - 1
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = set()
    for one in caught:
        if "synchroniz" in str(one.message):
            path = Path(one.filename)
            name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT / "learnevict") else path.name
            places.add(f"{name}:{one.lineno}")
    return places


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, in units of the largest magnitude expected, as float32 rounds in proportion."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def kernel_rows(device: str) -> list[dict[str, Any]]:
    """Compares the Triton decode kernel with the float64 reference at odd sizes; nothing without CUDA and Triton."""
    if not device.startswith("cuda"):
        return []
    from learnevict.ops import slot_attention, slot_attention_reference
    from learnevict.ops.kernels import load, refused_by

    if (reason := refused_by(torch.device(device))) is not None:
        return [cell_row("kernel", "slot_attention", "-", "-", Outcome(0.0, 0.0, note=f"not run: {reason}"))]
    load("cuda")
    rows = []
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for batch, heads, group, num, width in ((1, 2, 4, 63, 64), (3, 2, 1, 640, 64), (2, 8, 5, 1000, 128)):
            generator = torch.Generator().manual_seed(num)
            sizes = ((batch, heads, group, width), (batch, heads, num, width), (batch, heads, num, width))
            query, keys, values = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
            empty = torch.rand(batch, heads, num, generator=generator) < 0.3
            bias = torch.zeros(batch, heads, num).masked_fill_(empty, -torch.inf).to(device, dtype)
            exact = slot_attention_reference(*(part.double() for part in (query, keys, values, bias)), width**-0.5)
            error = relative_error(slot_attention(query, keys, values, bias, width**-0.5, True), exact)
            name = f"slot_attention B{batch} H{heads} G{group} N{num} d{width}"
            rows.append(cell_row("kernel", name, "-", str(dtype).removeprefix("torch."), Outcome(error, limit)))
    return rows


def cell_row(law: str, method: str, model: str, dtype: str, outcome: Outcome) -> dict[str, Any]:
    """Returns one line of the results file."""
    return {
        "law": law,
        "method": method,
        "model": model,
        "dtype": dtype,
        "ok": outcome.ok,
        "error": outcome.error,
        "at_most": outcome.limit,
        "note": outcome.note,
    }


def check(bench: Bench, cell: tuple[str, str, str], device: str) -> list[dict[str, Any]]:
    """Checks every law of one cell; an exception is that law's outcome, and the others go on."""
    method, model, dtype = cell
    case = bench.cases.Case(method, model)
    rows = []
    for law, holds in bench.laws(dtype, device).items():
        try:
            outcome = holds(case)
        except Exception as error:  # noqa: BLE001 - one broken cell must not cost the others
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            outcome = Outcome(float("inf"), 0.0, False, said)
        rows.append(cell_row(law, method, model, dtype, outcome))
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints a line for every law and type, and one for every failure."""
    lines = []
    for law, dtype in sorted({(row["law"], row["dtype"]) for row in rows}):
        cells = [row for row in rows if (row["law"], row["dtype"]) == (law, dtype)]
        worst = max((row["error"] for row in cells), default=0.0)
        lines.append([f"{law} {dtype}", str(len(cells)), str(sum(row["ok"] for row in cells)), f"{worst:.2e}"])
    console.print(table("laws", ["law", "cells", "hold", "largest error"], lines))
    for row in rows:
        if not row["ok"]:
            console.print(
                f"BROKEN {row['law']} {row['method']} {row['model']} {row['dtype']}: {row['error']:.2e} {row['note']}"
            )


def main() -> None:
    """Runs the laws, prints their table and saves the results; the exit code is 1 if a law is broken."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=3600, help="stop starting new cells after this long")
    options = options.parse_args()
    started = time.perf_counter()
    begin(options)
    os.environ["LAWS_DEVICE"] = options.device
    from learnevict.errors import StockLayersWarning

    warnings.simplefilter("ignore", StockLayersWarning)
    config = SMOKE if options.smoke else CONFIG
    console = Console()
    results = Results("laws", options, config)
    bench = Bench(config)
    rows = kernel_rows(options.device)
    cells = list(bench.cells())
    for index, cell in enumerate(cells):
        if time.perf_counter() - started > options.seconds:
            break
        rows += check(bench, cell, options.device)
        results.save(rows=rows, cells_left=len(cells) - index - 1)
    show(rows, console)
    results.finish(console)
    raise SystemExit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
