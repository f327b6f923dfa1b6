"""What a trace costs: the language model's loss along it against the loss with everything kept, token by token.

Eviction hurts where the model was sure: at tokens of low entropy its loss grows most (ForesightKV, arXiv 2602.03203), while
at forks either branch is fine. Costs stand at the column that predicts; they are 0 where nothing is counted.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.oracle.reference import token_losses

COSTS = ("low_entropy", "thresholded", "plain")
THRESHOLD = 1.5  # eta of the paper's reward
QUANTILE = 0.8  # the paper leaves out the 20 % of tokens with the highest entropy
CERTAIN = 0.1
"""Nats below which a token always counts: a model that is sure of nearly everything would lose its hardest tokens, which
eviction hits first."""


def token_costs(
    kind: str,
    logits: Float[Tensor, "B T V"],
    full: Float[Tensor, "B T V"],
    input_ids: Int[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    ceiling: float = 2.0,
) -> Float[Tensor, "B T"]:
    """Returns the cost of every prediction.

    Args:
        kind: one of COSTS. "low_entropy": the loss that eviction adds, from 0 to `ceiling`, where the full cache is sure;
            "thresholded": the paper's square of it where it exceeds 1.5, without ceiling; "plain": from 0 to `ceiling`
            everywhere.
        logits: along the trace; full: with everything kept.
        input_ids: the text.
        loss_mask: tokens whose prediction counts, in the column of the token.
        ceiling: in nats; a token lost is a token lost, however surely.
    """
    assert kind in COSTS
    added = token_losses(logits, input_ids) - token_losses(full, input_ids)
    predicts = torch.nn.functional.pad(loss_mask[:, 1:], (0, 1))
    if kind != "plain":
        predicts = predicts & sure(full, predicts)
    if kind == "thresholded":
        return added.square() * (added > THRESHOLD) * predicts
    return added.clamp(0.0, ceiling) * predicts


def sure(full: Float[Tensor, "B T V"], predicts: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Returns the columns whose entropy is at most the QUANTILE of the row's over `predicts`, or below CERTAIN."""
    log_share = full.float().log_softmax(-1)
    spread = -(log_share.exp() * log_share).sum(-1)
    limit = torch.nanquantile(spread.masked_fill(~predicts, torch.nan), QUANTILE, dim=-1, keepdim=True)
    return spread <= limit.clamp_min(CERTAIN)
