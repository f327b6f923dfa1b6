"""Compares labels: which one, followed with hindsight, costs the model least, and is one better than golden attention?

    python recipes/compare_labels.py                          # all variants; half an hour on one core
    python recipes/compare_labels.py --variants "golden; CAOTE" --families recall --shares 1/8
    scripts/write_tables                                      # then: the table in docs/results.md

Every variant turns a full-cache pass into an eviction trace of the same total size, which is replayed in one pass and measured
on answer-mask tokens.
- Labels: golden attention (Section 3.1 of arXiv 2602.03203) and other reductions of it; weighted by values; CAOTE's form (arXiv
  2504.14051), attention / (1 - attention) x distance between value and output; the gradient of the loss.
- Horizons: max, sums, squares, and an optimal plan ("priced": the dual of keeping what the future uses most, per head).
- The evicted run: labels recomputed from its queries and keys, beside what is left in it, event by event, or with queries
  weighted by the loss that eviction caused.
- Search: hill climbing on golden's scores, measured by the loss itself.
- Allocation: golden labels whose slots are pooled over a layer or the model, or fixed per head by a profile of training texts.

Texts are short, so attention is held as [T, T], and padded on the right. What is finished is kept in --out, and not done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnevict import testbed
from learnevict.config import Budget
from learnevict.errors import UsageError, told_in_one_line
from learnevict.evals.methods import COMPARISON
from learnevict.evals.tasks import FamilyTask, family_tasks, read, resolve
from learnevict.files import locked
from learnevict.hub import weight_hash
from learnevict.oracle import horizon
from learnevict.oracle.collect import gradient_utility
from learnevict.oracle.traces import Share
from learnevict.signals import Trace
from learnevict.train.run.flags import check_fields, flag, read_flags
from tools.results.hindsight import (
    Case,
    by_value,
    caote,
    contribution,
    distance,
    from_the_left,
    largest,
    profile,
    slots_of,
)
from tools.results.label_table import Tried, TriedLabels


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    families: str = flag("program,recall", "names between commas")
    shares: str = flag("1/6,1/8,1/12,1/15", "budgets between commas")
    variants: str = flag("", "names between semicolons; otherwise all")
    samples: int = flag(48, "of each family")
    fitting: int = flag(24, "training texts of each family behind a profile")
    climbs: int = flag(100, "replays per text in the search")
    batch_size: int = flag(24, "samples at a time")
    split: str = flag("validation", f"one of {', '.join(testbed.SPLITS)}")
    out: str = flag("docs/results/labels.json", "what is finished is kept there")
    threads: int = flag(1, "of torch", most=1024)
    smoke: bool = flag(False, "seconds, the same code")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.split not in testbed.SPLITS:
            raise UsageError(f"--split {self.split!r}: choose from {', '.join(testbed.SPLITS)}")
        for share in self.shares.split(","):
            Budget.parse(share)


SMOKE = {
    "families": "recall", "shares": "1/8", "samples": 4, "fitting": 2, "climbs": 2, "out": "runs/labels-smoke.json"
}  # fmt: skip


@dataclass(frozen=True)
class Hints:
    """What some variants need besides the texts: mean slots per head [L, H] of training texts, and replays to search with."""

    slots: Tensor
    climbs: int


# --- labels and horizons: what one query says of one key, and the future as a whole ---


def useful(case: Case) -> Trace:
    """Returns the trace by the first-order utility of every key to the response's likelihood, the same at all events."""
    texts = case.texts
    worth = gradient_utility(case.model, texts.input_ids, texts.attention_mask, scored=texts.loss_mask)
    scores = torch.stack([part for part in worth if part is not None])
    return case.roll().trace(lambda m, _: scores)


def fading_max(labels: Tensor, factor: float) -> Tensor:
    """Returns the max over the future, a block further away counting `factor` as much."""
    found = labels.clone()
    for m in reversed(range(labels.shape[-1] - 1)):
        found[..., m] = torch.maximum(found[..., m], factor * found[..., m + 1])
    return found


def priced(case: Case, steps: int = 150) -> Tensor:
    """Slots have a price after every event, so that as many tokens pay as there are slots; a score is what is left over.

    Keeping token i until block j gains the squared labels of blocks up to j and costs the prices until then. Prices solve the
    dual of the best plan for a whole text, by subgradient steps, per head.
    """
    gain = torch.nn.functional.pad(case.golden_labels[..., 1:], (0, 1)).square()
    length, blocks = gain.shape[-2:]
    own = torch.arange(length) // case.rules.block
    pays = (torch.arange(blocks) > own[:, None]) & (torch.arange(length) >= case.rules.guard.sinks)[:, None]
    room = case.budget - case.reserved
    start = gain.masked_fill(~pays, 0).sort(-2, descending=True).values[..., room, :].mean(-1)[..., None, None]
    price, mean = torch.zeros(*gain.shape[:3], 1, blocks), 0.0
    for step in range(steps):
        held = ((_surplus(gain - price) > 0) | ~pays).int().cumprod(-1).bool() & pays
        demand = held.sum(-2, keepdim=True)
        price = (price + start * 2 / (1 + step) ** 0.7 * (demand - room) / max(room, 1)).clamp_min(0)
        mean = mean + price / (steps // 2) if step >= steps - steps // 2 else mean
    return torch.nn.functional.pad(_surplus(gain - mean), (1, 0))[..., :-1]


def _surplus(net: Tensor) -> Tensor:
    found, rest = torch.empty_like(net), torch.zeros_like(net[..., 0])
    for m in reversed(range(net.shape[-1])):
        rest = net[..., m] + rest.clamp_min(0)
        found[..., m] = rest
    return found


# --- labels of the evicted run, and search ---


def again(case: Case, times: int, competing: bool) -> Trace:
    """Labels from queries and keys of the run that the last labels led to; competing: beside what that run has left."""
    trace = case.golden
    for _ in range(times):
        labels = case.labels(received=case.run(trace)[1], trace=trace if competing else None)
        trace = case.follow(labels)
    return trace


def step_by_step(case: Case) -> Trace:
    """Labels recomputed at every event, in the run evicted so far: several steps of regret."""

    def future(m: int, expiry: Tensor) -> Tensor:
        so_far = Trace(expiry)
        return horizon(case.labels(received=case.run(so_far)[1], trace=so_far))[..., m + 1]

    return case.roll().trace(
        lambda m, expiry: future(m, expiry) if (m + 1) * case.rules.block < case.valid.shape[1] else expiry * 0.0
    )


def hurt(case: Case, times: int) -> Trace:
    """Queries count 1 + the loss that eviction has added at them, summed over rounds: labels of what went wrong."""
    full, weight, trace = case.losses(case.logits), torch.ones_like(case.valid, dtype=torch.float32), case.golden
    for _ in range(times):
        weight = weight + (case.losses(case.run(trace)[0]) - full).clamp_min(0)
        trace = case.follow(case.labels(weight=weight))
    return trace


def searched(case: Case, hints: Hints) -> Trace:
    """Returns the trace of golden's scores x noise, kept where a text's loss goes down."""
    future = torch.nn.functional.pad(horizon(case.golden_labels), (0, 1))
    roll, random = case.roll(), torch.Generator().manual_seed(0)
    log = torch.zeros(future.shape[:-1])
    best = case.losses(case.run(case.golden)[0]).sum(-1)
    for step in range(hints.climbs):
        noise = torch.randn(log.shape, generator=random) * (1.5 if step % 3 == 0 else 0.5)
        noise *= torch.rand(log.shape, generator=random) < (0.3 if step % 2 else 0.05)
        tried = (log + noise).exp()
        loss = case.losses(case.run(roll.trace(lambda m, _, tried=tried: future[..., m + 1] * tried))[0]).sum(-1)
        log = torch.where((loss < best)[:, None, None], log + noise, log)
        best = torch.minimum(loss, best)
    return roll.trace(lambda m, _: future[..., m + 1] * log.exp())


def static(case: Case, hints: Hints, change: Any = None, *, by_layer: bool = False) -> Trace:
    """Slots per head fixed by a profile of training texts."""
    free = hints.slots.mean(1, keepdim=True).expand_as(hints.slots) if by_layer else hints.slots
    slots = slots_of(free, case.budget, case.reserved)
    return case.follow(case.labels(change), share=Share("head", slots=slots))


VARIANTS: dict[str, Callable[[Case, Hints], Trace]] = {
    "golden": lambda c, _: c.golden,
    "max over the group": lambda c, _: c.follow(c.labels(largest)),
    "sum over the future": lambda c, _: c.follow(c.golden_labels, "sum"),
    "sum fading by 0.9": lambda c, _: c.follow_future(horizon(c.golden_labels, "discounted", discount=0.9)),
    "max fading by 0.9": lambda c, _: c.follow_future(fading_max(c.golden_labels, 0.9)),
    "sum of squares": lambda c, _: c.follow(c.golden_labels.square(), "sum"),
    "optimal plan (priced)": lambda c, _: c.follow_future(priced(c)),
    "x |v|": lambda c, _: c.follow(c.labels(by_value)),
    "x |W_O v|": lambda c, _: c.follow(c.labels(partial(contribution, c))),
    "x |v - o|": lambda c, _: c.follow(c.labels(lambda p, one, layer: p * distance(p, one, layer))),
    "CAOTE": lambda c, _: c.follow(c.labels(caote)),
    "gradient utility": lambda c, _: useful(c),
    "evicted run, once": lambda c, _: again(c, 1, False),
    "evicted run, 3 times": lambda c, _: again(c, 3, False),
    "competing, 3 times": lambda c, _: again(c, 3, True),
    "step by step": lambda c, _: step_by_step(c),
    "loss-weighted, once": lambda c, _: hurt(c, 1),
    "loss-weighted, 3 times": lambda c, _: hurt(c, 3),
    "searched": searched,
    "golden by layer, floor 0.2": lambda c, _: c.follow(c.golden_labels, share=Share("layer", 0.2)),
    "golden by model, floor 0": lambda c, _: c.follow(c.golden_labels, share=Share("model", 0.0)),
    "golden by model, floor 0.2": lambda c, _: c.follow(c.golden_labels, share=Share("model", 0.2)),
    "golden by model, floor 0.5": lambda c, _: c.follow(c.golden_labels, share=Share("model", 0.5)),
    "CAOTE by model, floor 0.2": lambda c, _: c.follow(c.labels(caote), share=Share("model", 0.2)),
    "golden, static slots per head": static,
    "golden, static slots per layer": lambda c, hints: static(c, hints, by_layer=True),
    "x |v|, static slots per head": lambda c, hints: static(c, hints, by_value),
    "CAOTE, static slots per head": lambda c, hints: static(c, hints, caote),
}


# --- the program ---


def main(config: Config) -> None:
    """Measures the cells that are missing."""
    families, shares = listed(config.families), listed(config.shares)
    family_tasks(families)  # refuses those that do not exist
    names = listed(config.variants, ";") or list(VARIANTS)
    if twice := [name for name in (*shares, *names) if (*shares, *names).count(name) > 1]:
        raise UsageError(f"{twice[0]!r} is given twice; give each share and each variant only once")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UsageError(f"no variant {', '.join(unknown)}; choose from {'; '.join(VARIANTS)}")
    torch.set_num_threads(config.threads)
    model, tokenizer = testbed.load()
    origin = {
        "weights": weight_hash(model), "tasks": testbed.fingerprint(), "split": config.split, "samples": config.samples,
        "fitting": config.fitting, "climbs": config.climbs,
    }  # fmt: skip
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out):
        done = TriedLabels.open(out, origin)
        for share in shares:
            missing = {family: [name for name in names if not done.has(family, share, name)] for family in families}
            if any(missing.values()):
                hints = Hints(fitted(config, (model, tokenizer), share), config.climbs)
                for family, some in missing.items():
                    for one in measure(config, (model, tokenizer), (family, share), some, hints):
                        done.add(one)


def listed(text: str, between: str = ",") -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(between) if name.strip()]


def measure(config: Config, subject: Any, cell: tuple[str, str], names: list[str], hints: Hints) -> list[Tried]:
    """Returns the measures of some variants on one family at one budget."""
    family, share = cell
    tried = {name: Tried(family, share, resolved(family, share), name) for name in names}
    for start in range(0, config.samples, config.batch_size):
        seeds = range(start, min(start + config.batch_size, config.samples))
        case = opened(subject, cell, seeds, config.split)
        for name in names:
            began = time.perf_counter()
            scores = case.measure(VARIANTS[name](case, hints))
            tried[name].add(scores, case.losses(case.logits).sum(-1).tolist(), time.perf_counter() - began)
    for name, one in tried.items():
        print(f"{family} {share} {name}: step accuracy {one.accuracy:.4f}, loss ratio {one.loss_ratio:.3g}", flush=True)
    return list(tried.values())


def fitted(config: Config, subject: Any, share: str) -> Tensor:
    """Returns the mean slots per head of golden pooled over the model, on training texts, as shares of the mean."""
    found: list[Tensor] = []
    for family in testbed.FAMILIES:
        case = opened(subject, (family, share), range(config.fitting), "train")
        held = profile(case.follow(case.golden_labels, share=Share("model", 0.1)), case.roll().position)
        found.append((held - case.reserved) / (case.budget - case.reserved))
    return torch.stack(found).mean(0)


def opened(subject: Any, cell: tuple[str, str], seeds: range, split: Any) -> Case:
    """Texts at a budget."""
    model, tokenizer = subject
    samples = [testbed.generate(cell[0], seed, split=split) for seed in seeds]
    return Case(model, from_the_left(read(tokenizer, samples)), resolved(*cell), COMPARISON)


def resolved(family: str, share: str) -> int:
    """Returns the budget in slots.

    Raises:
        UsageError: a budget that is no number of slots.
    """
    found = resolve(share, FamilyTask(family).mean_length)
    if not isinstance(found, int):
        raise UsageError(f"traces are rolled for a number of slots, not {share!r}; give 1/8 or tokens (64)")
    return found


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns the settings that a command line asks for."""
    return read_flags({"options": Config}, arguments, __doc__, smoke=SMOKE).of(Config)


if __name__ == "__main__":
    with told_in_one_line("run the same command again to go on"):
        main(parse())
