"""The variants of recipes/compare_labels.py, each a way to make a trace with hindsight: labels, horizons, runs, allocations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learnevict.oracle import horizon
from learnevict.oracle.collect import gradient_utility
from learnevict.oracle.traces import Share
from learnevict.signals import Trace
from tools.results.hindsight import Case, by_value, caote, contribution, distance, largest, slots_of


@dataclass(frozen=True)
class Hints:
    """What some variants need besides the texts: mean slots per head [L, H] of training texts, and replays to search with."""

    slots: Tensor
    climbs: int


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
    own = torch.arange(length) // case.settings.block
    pays = (torch.arange(blocks) > own[:, None]) & (torch.arange(length) >= case.settings.guard.sinks)[:, None]
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
        lambda m, expiry: future(m, expiry) if (m + 1) * case.settings.block < case.valid.shape[1] else expiry * 0.0
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
