"""A budget in fixed shares of layers and heads: made of golden labels, written to a file, and read by `allocation`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnevict.errors import DataError, UsageError
from learnevict.files import write
from learnevict.parts.allocators import Competing, in_proportion, largest_remainder, whole_shares
from learnevict.policy import Uniform

FORMAT = "learnevict allocation 1"
START = b'{"format": "learnevict allocation'
MILLION = 1_000_000


@dataclass(frozen=True)
class HeadShares(Competing):
    """Heads of one layer in fixed proportions."""

    heads: tuple[float, ...]

    def shares(self, ordered: Tensor, room: Tensor, free: Tensor) -> Tensor:
        if room.shape[1] != len(self.heads):
            raise UsageError(f"this allocation is for {len(self.heads)} kv heads, but the layer has {room.shape[1]}")
        whole = sum(self.heads)
        parts = whole_shares([MILLION * head / whole if whole else MILLION / len(self.heads) for head in self.heads])
        return largest_remainder(free.unsqueeze(-1) * torch.tensor(parts, device=free.device), MILLION, free)


@dataclass(frozen=True)
class Shares(Uniform):
    """Layers and heads in fixed proportions; the sum over layers is L * budget.

    Of what budgets hold beyond the floor (guards, fresh block, one slot), each layer gets its part, and of a layer's slots
    beside protected ones each head.

    Args:
        layers: shares of the kv heads of each evicting layer, in order; of any sum.
        indices: which layers of the model these are.
        made: what they were made of, for the reader of the file.
    """

    layers: tuple[tuple[float, ...], ...]
    indices: tuple[int, ...]
    made: Mapping[str, Any] = field(default_factory=dict, compare=False)
    ragged = True

    def layer_budget(self, budget: int, rank: int, num_layers: int, floor: int) -> int:
        if num_layers != len(self.layers):
            raise UsageError(
                f"this allocation is for {len(self.layers)} layers, but {num_layers} layers of the model evict; make one for "
                "this model: learnevict profile"
            )
        return in_proportion([sum(heads) for heads in self.layers], budget, rank, floor)

    def in_layer(self, layer: int) -> HeadShares:
        if layer not in self.indices:
            raise UsageError(
                f"this allocation says nothing of layer {layer}; make one for this model: learnevict profile"
            )
        return HeadShares(self.layers[self.indices.index(layer)])

    def whole_heads(self, number: int) -> Shares:
        """Returns equal shares of the `number` heads with the largest ones, and none of the others.

        Heads that have room for all they read keep it all, as the retrieval heads of DuoAttention do (arXiv 2410.10819); the
        others hold what is protected. Such heads then need no ranking.

        Raises:
            UsageError: more heads than there are, or none.
        """
        places = [(index, head) for index, heads in enumerate(self.layers) for head in range(len(heads))]
        if not 1 <= number <= len(places):
            raise UsageError(f"there are {len(places)} heads; let 1 to {len(places)} be whole, not {number}")
        most = set(sorted(places, key=lambda place: -self.layers[place[0]][place[1]])[:number])
        layers = [
            tuple(float((index, head) in most) for head in range(len(heads))) for index, heads in enumerate(self.layers)
        ]
        return replace(self, layers=tuple(layers), made={**self.made, "heads": number})

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Writes the file that `allocation` takes.

        Raises:
            DataError: it cannot be written, or is no such file and `overwrite` is not set.
        """
        found = {"format": FORMAT, "indices": self.indices, "layers": self.layers, "made": dict(self.made)}
        write(path, json.dumps(found) + "\n", START, overwrite=overwrite)


def read_shares(path: Path) -> Shares:
    """Returns the shares of a file. Raises DataError: no such file, or something else in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        layers = tuple(tuple(float(head) for head in heads) for heads in found["layers"])
        indices = tuple(int(index) for index in found["indices"])
        right = found["format"] == FORMAT and len(layers) == len(indices) > 0
        if not right or not all(heads and 0 <= min(heads) <= max(heads) < float("inf") for heads in layers):
            raise ValueError("shares are numbers from 0 on, for every head of every layer")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} holds no allocation; make one with learnevict profile: {error}") from error
    return Shares(layers=layers, indices=indices, made=dict(found.get("made") or {}))


def shares_of(labels: Sequence[Sequence[Tensor | None]], budgets: Sequence[float], **made: Any) -> Shares:
    """Returns the shares in which pooled golden spends its slots, averaged over texts and budgets.

    Args:
        labels: of every text, per layer [B, H, T], comparable over the model (KVZIP); None where a layer stays stock.
        budgets: shares of the text that are kept, such as 0.25.
        **made: see Shares.

    Raises:
        UsageError: no labels, or a budget that is no share.
    """
    if not labels or not budgets or not all(0 < budget <= 1 for budget in budgets):
        raise UsageError("an allocation is made of one text or more, for budgets above 0 and at most 1")
    indices = tuple(index for index, layer in enumerate(labels[0]) if layer is not None)
    total = torch.zeros(len(indices), 0)
    for text in labels:
        scores = torch.stack([layer.float() for layer in text if layer is not None])  # [L, B, H, T]
        flat = scores.movedim(1, 0).flatten(1)
        for budget in budgets:
            least = flat.topk(max(round(budget * flat.shape[1]), 1)).values[:, -1]
            won = (scores >= least.view(1, -1, 1, 1)).float().mean((1, 3)).cpu()
            total = won if not total.shape[1] else total + won
    shares = (total / total.sum()).tolist()
    return Shares(layers=tuple(tuple(round(head, 8) for head in heads) for heads in shares), indices=indices, made=made)
