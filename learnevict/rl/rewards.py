"""What a trace costs the language model, token by token, and the credit that every single eviction gets for it.

Eviction hurts where the model was sure: at tokens of low entropy its loss grows most (ForesightKV, arXiv 2602.03203), while at
forks either branch is fine. Costs stand at the column that predicts. Credit is assigned from costs in one of three ways:

    trace      one number per trace, for all of its evictions (ForesightKV); TRL computes it
    to_go      per event: only the cost that comes after it
    attention  per eviction: the cost that comes after it, weighted by how much the full cache attends there to the token

All are relative to the mean of the group at the same token, so what no eviction can change cancels. The last is no unbiased
estimate: it leaves out what a token does for later ones through other tokens, and gives up that signal for two orders of
magnitude less noise: of 16 slots evicted in each of 8 heads at an event, mostly one or two mattered.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from learnevict.infer.teacher_forcing import Received, replay
from learnevict.oracle.collect import full_trace
from learnevict.oracle.reference import token_losses
from learnevict.rl.distribution import NOTHING
from learnevict.rl.trajectory import CandidateSets

THRESHOLD = 1.5  # eta of the paper's reward
QUANTILE = 0.8  # the paper leaves out the 20 % of tokens with the highest entropy
CERTAIN = 0.1
"""Nats below which a token always counts, for a model that is sure of nearly everything."""
TILE = 32
"""Queries whose attention is held at one time."""


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
        kind: "low_entropy": the loss that eviction adds, from 0 to `ceiling`, where the full cache is sure;
            "thresholded": the paper's square of it where it exceeds 1.5, without ceiling; "plain": from 0 to `ceiling`
            everywhere.
        logits, full: along the trace, and with everything kept.
        loss_mask: tokens whose prediction counts, in the column of the token.
        ceiling: in nats.
    """
    added = token_losses(logits, input_ids) - token_losses(full, input_ids)
    predicts = pad(loss_mask[:, 1:], (0, 1))
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


def group_relative(costs: Float[Tensor, "B T"], group: int) -> Float[Tensor, "B T"]:
    """Returns costs minus their group's mean at every token; rows of a group follow each other."""
    grouped = costs.view(-1, group, costs.shape[-1])
    return (grouped - grouped.mean(1, keepdim=True)).view_as(costs)


def to_go_credit(costs: Float[Tensor, "B T"], sets: CandidateSets) -> Float[Tensor, "B E R K"]:
    """Returns minus the relative cost of the tokens read after each event; costs stand at the column that predicts."""
    behind = pad(costs.flip(-1).cumsum(-1).flip(-1), (0, 1))
    found = behind.gather(-1, sets.end.clamp_max(costs.shape[-1]))
    return -found[:, :, None, None].expand(sets.permutation.shape)


@torch.no_grad()
def attention_credit(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "S T"],
    attention_mask: Int[Tensor, "S T"],
    costs: Float[Tensor, "B T"],
    expiry: Int[Tensor, "L B H T"],
) -> Float[Tensor, "L B H T"]:
    """Returns the credit of each evicted token: minus the sum over columns from its expiry on of attention x relative cost.

    Attention is that of the full cache, mean over the group of query heads. Tokens that stay have credit 0.

    Args:
        model: the base.
        input_ids, attention_mask: each text once.
        costs: relative costs of B = S * group traces.
        expiry: of the traces, the length of the text where a token stays.
    """
    texts = len(input_ids)
    credit = torch.zeros(expiry.shape, device=costs.device)
    own = costs.view(texts, -1, costs.shape[-1])

    def observe(layer: int, received: Received) -> None:
        query, key = received.query, received.key
        ends = expiry[layer].view(texts, -1, *expiry.shape[2:])
        found = credit[layer].view_as(ends)
        heads, length, width = key.shape[1:]
        for start in range(0, length, TILE):
            stop = min(start + TILE, length)
            rows = query[:, :, start:stop].reshape(texts, heads, -1, width)
            logits = (rows @ key[:, :, :stop].transpose(-1, -2)).view(texts, heads, -1, stop - start, stop)
            column = torch.arange(length, device=key.device)
            causal = column[:stop] <= column[start:stop].unsqueeze(-1)
            visible = causal & attention_mask[:, None, None, None, :stop].bool()
            weights = received.attention.probabilities(logits, visible).mean(2)
            missed = ends[..., None, :stop] <= column[start:stop].view(-1, 1)
            found[..., :stop] -= torch.einsum("shqt,sgq,sghqt->sght", weights, own[:, :, start:stop], missed.float())

    replay(model, input_ids, full_trace(model, input_ids), attention_mask, observe=observe, logits_to_keep=1)
    return credit


def of_evictions(credit: Float[Tensor, "L B H T"], sets: CandidateSets) -> Float[Tensor, "B E R K"]:
    """Returns the credit of the evicted tokens."""
    by_token = credit[list(sets.layers)].transpose(0, 1).flatten(1)
    found = by_token.gather(-1, sets.tokens.clamp_min(0).flatten(1)).view(sets.tokens.shape)
    return found.masked_fill(sets.permutation == NOTHING, 0.0)
