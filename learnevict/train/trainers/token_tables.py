"""Table baselines are fitted to the mean golden label of each entry, per layer and head (methods lexical and clausal).

A policy that only learned "digits stay, filler goes" is not learned eviction; every learned method must beat these.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.hub import Gates
from learnevict.oracle import golden_labels
from learnevict.train.trainers.replay_states import look_ahead


@torch.no_grad()
def fit_tables(
    model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]], gates: list[Gates], block: int
) -> None:
    """Sets each entry of the gates' tables to the mean, over a training set, of the largest label after a token's own block.

    Args:
        model: the base.
        batches: (input_ids, attention_mask) pairs, int64 [B, T].
        gates: of methods whose gate has a `table` [L, H, entries] and tells the `entries` of a text; filled in place.
        block: event period.
    """
    fitted: list[Any] = [one.gate for one in gates]
    tables = [torch.zeros_like(one.table) for one in fitted]
    counts = [torch.zeros(table.shape[-1]) for table in tables]
    for input_ids, mask in batches:
        labels, _ = golden_labels(model, input_ids, mask, block=block)
        unpadded = (mask.cumsum(-1) - 1).clamp_min(0)
        real = mask.bool()
        entries = [one.entries(input_ids, mask)[real] for one in fitted]
        for entry, count in zip(entries, counts, strict=True):
            count += torch.bincount(entry, minlength=len(count)).float()
        for layer, part in enumerate(labels):
            if part is None:
                continue
            ahead = look_ahead(part)
            index = (unpadded // block + 1).clamp_max(ahead.shape[-1] - 1)
            target = ahead.gather(-1, index[:, None, :, None].expand(*ahead.shape[:3], 1)).squeeze(-1)
            for head in range(target.shape[1]):
                for entry, table in zip(entries, tables, strict=True):
                    table[layer, head].index_add_(0, entry, target[:, head][real])
    for one, table, count in zip(fitted, tables, counts, strict=True):
        one.table.copy_(table / count.clamp_min(1))
