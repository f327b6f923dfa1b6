"""Events that wait for the end of a forward: those of policies that rank all layers together, or run tokens to ask.

While the layers run, each one only takes down what its event needs. After the last layer the policy decides: for heads of
all layers at once, or layer by layer as the probe passes through them. A forward holds at most one event per row, at the
row's last token, so what has been attended to until then is what an event inside the layers would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from learnevict.errors import CacheError
from learnevict.infer.cache import EvictingCache
from learnevict.infer.eviction import Event
from learnevict.infer.layer import EvictingLayer
from learnevict.infer.probe import run_probe
from learnevict.infer.questions import Reader
from learnevict.policy import Governor


@torch.no_grad()
def hold_events(cache: EvictingCache, decoder: nn.Module, model: Any, hidden: Tensor) -> None:
    """Holds the events that the layers of a forward have left, when its last layer has run.

    The decoder reads probes; `model` and `hidden`, what it returned for the forward [B, S, E], tell what follows.
    """
    policy, layers = cache.policy, [layer for layer in cache.layers if isinstance(layer, EvictingLayer) and layer.due]
    if not layers:
        return
    if policy.scorer.asks:
        Reader(cache, decoder, model, hidden).ask()
    if policy.scope == "model":
        if any(any(rows) for rows in _crowded(layers)):
            attended: dict[int, Tensor] = {}
            if policy.probe is not None:
                run_probe(decoder, cache, policy.probe, attended.__setitem__)
            _decide_together(policy, layers, attended)
    elif policy.probe is not None and any(any(event.crowded()) for layer in layers for event in layer.due):
        # a layer evicts while the probe is on its way to the next: the attention of one layer is held at a time
        run_probe(decoder, cache, policy.probe, lambda index, found: cache.layers[index].decide(found))
    elif policy.scorer.asks:
        for layer in layers:
            layer.decide()
    for layer in layers:
        layer.due = []


def _crowded(layers: list[EvictingLayer]) -> list[list[bool]]:
    """Returns, for each event of a forward, which rows are due and hold more than their budget in all layers together."""
    found: list[list[bool]] = []
    for events in zip(*(layer.due for layer in layers), strict=True):
        held = [sum(rows) for rows in zip(*(event.storage.held for event in events), strict=True)]
        room = [sum(rows) for rows in zip(*map(_room, events), strict=True)]
        due = events[0].block.due
        found.append([now and slots > most for now, slots, most in zip(due, held, room, strict=True)])
    return found


def _room(event: Event) -> list[int]:
    """Returns the slots that the budget leaves to each row in all heads of one layer."""
    heads = event.signals.position.shape[1]
    return [heads * target for target in event.targets()]


def _decide_together(policy: Governor, layers: list[EvictingLayer], attended: dict[Any, Tensor]) -> None:
    """Asks the policy for all layers at once, evicts, and fits every layer's pages to what it holds then.

    This waits for the device once: how much each layer holds must be known to give back what it does not.
    """
    drops: list[Tensor] = [torch.zeros_like(layer.due[0].signals.occupied) for layer in layers]
    rows = [False] * len(drops[0])
    for events, crowded in zip(zip(*(layer.due for layer in layers), strict=True), _crowded(layers), strict=True):
        if not any(crowded):
            continue
        shown = [replace(event.signals, probe_attention=attended.get(event.signals.layer)) for event in events]
        given: Any = policy.keep_together(shown)
        keeps = list(given) if isinstance(given, Iterable) else [given]
        if len(keeps) != len(layers):
            raise CacheError(
                f"keep_together(layers) returned {type(given).__name__} of {len(keeps)}, not a list of the slots to keep, one "
                f"mask for each of {len(layers)} layers"
            )
        drops = [drop | event.drop(keep, crowded) for drop, event, keep in zip(drops, events, keeps, strict=True)]
        rows = [now or before for now, before in zip(crowded, rows, strict=True)]
    last = [layer.due[-1] for layer in layers]
    counts = [(event.signals.occupied & ~drop).sum(-1) for event, drop in zip(last, drops, strict=True)]
    found: list[Any] = torch.stack([torch.stack([count.sum(-1), count.amax(-1)]) for count in counts]).tolist()
    _check_room(last, rows, [held for held, _ in found])
    for layer, event, drop in zip(layers, last, drops, strict=True):
        layer.evict(drop, event.block.rows.now + 1)
    growth = [sum(held) - event.storage.fitted for event, (held, _) in zip(last, found, strict=True)]
    for index in sorted(range(len(last)), key=growth.__getitem__):  # what shrinks makes room for what grows
        last[index].storage.settle(*found[index])


def _check_room(events: list[Event], rows: list[bool], held: list[list[int]]) -> None:
    totals = [sum(slots) for slots in zip(*held, strict=True)]
    room = [sum(slots) for slots in zip(*map(_room, events), strict=True)]
    wrong = [row for row, over in enumerate(rows) if over and totals[row] > room[row]]
    if wrong:
        raise CacheError(
            f"the policy keeps {[totals[row] for row in wrong]} slots in all heads of all layers of rows {wrong}, but its "
            f"budget leaves {[room[row] for row in wrong]}; keep_together(layers) must not exceed signals.budget"
        )
