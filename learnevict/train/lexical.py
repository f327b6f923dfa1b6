"""Fit the lexical baseline: the mean golden label of each token id, per layer and head.

A policy that only learned "digits stay, filler goes" is not learned eviction; every learned method must beat this one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.hub import Gates
from learnevict.oracle import golden_labels
from learnevict.train.states import look_ahead


@torch.no_grad()
def fit_lexical(
    model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]], *, block: int, bonus: float = 0.0
) -> Gates:
    """Average, over a training set, what the future beyond its own block pays to each token id.

    Args:
        model: the base.
        batches: (input_ids, attention_mask) pairs, int64 [B, T].
        block: event period.
        bonus: recency bonus, tuned on validation seeds.

    Returns:
        Gates of method "lexical": table [L, H, V].
    """
    gates = Gates.make("lexical", model)
    table = torch.zeros_like(gates.gate.table)
    count = torch.zeros(table.shape[-1])
    for input_ids, mask in batches:
        labels, _ = golden_labels(model, input_ids, mask, block=block)
        row_time = (mask.cumsum(-1) - 1).clamp_min(0)
        real = mask.bool()
        count += torch.bincount(input_ids[real], minlength=len(count)).float()
        for layer, part in enumerate(labels):
            if part is None:
                continue
            ahead = look_ahead(part)
            index = (row_time // block + 1).clamp_max(ahead.shape[-1] - 1)
            worth = ahead.gather(-1, index[:, None, :, None].expand(*ahead.shape[:3], 1)).squeeze(-1)
            for head in range(worth.shape[1]):
                table[layer, head].index_add_(0, input_ids[real], worth[:, head][real])
    gates.gate.table.copy_(table / count.clamp_min(1))
    gates.gate.bonus.fill_(bonus)
    return gates
