"""How many slots a layer needs: the fewest that hold most of a query's attention, measured with the full cache."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.infer.teacher_forcing import Received, replay
from learnevict.oracle.collect import full_trace
from learnevict.parts.demand import num_needed

TOGETHER = 64
"""Queries whose attention is looked at at a time."""


@torch.no_grad()
def layer_demand(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"] | None = None,
    *,
    share: float = 0.93,
) -> list[float]:
    """Returns how many slots hold `share` of a query's attention at least, on average, for each evicting layer in order.

    For `reasonalloc` (0.93 on up to 8 prompts: arXiv 2606.11164); the mean is over real queries and all query heads.
    """
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    found: dict[int, float] = {}

    def observe(layer: int, received: Received) -> None:
        heads, total = received.key.shape[1], torch.zeros((), dtype=torch.float64)
        for start in range(0, len(column), TOGETHER):
            query = received.query[:, :, start : start + TOGETHER].unflatten(1, (heads, -1))
            visible = (column <= column[start : start + TOGETHER].view(-1, 1)) & valid[:, None, None, None, :]
            logits = query @ received.key.unsqueeze(2).mT
            needed = num_needed(received.attention.probabilities(logits, visible), share)
            total += (needed * valid[:, None, None, start : start + TOGETHER]).sum().cpu()
        found[layer] = float(total / (int(valid.sum()) * received.query.shape[1]))

    replay(model, input_ids, full_trace(model, input_ids), attention_mask, observe=observe, logits_to_keep=1)
    return [found[layer] for layer in sorted(found)]
