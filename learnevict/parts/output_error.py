"""What the output of attention loses with a slot: to second order if key or value is zeroed, exactly if the slot is evicted."""

from __future__ import annotations

import torch
from torch import Tensor

from learnevict.parts.window import HIGHEST
from learnevict.policy import WrappedScorer
from learnevict.signals import Signals

LEAST = 1e-6
"""Attention that is left beside a slot, at least."""


def saliency(signals: Signals, logits: Tensor, where: Tensor, part: str) -> Tensor:
    """Returns the squared error of attention's output if a slot's value, key or both were zero, to second order: float32
    [B, H, N], summed over queries and their group (arXiv 2510.07651).

    With probabilities A, logits z and output o:  value A^2 |v|^2,  key (A z)^2 |v - o|^2,  joint A^2 |v + z (v - o)|^2.

    Args:
        logits: unscaled, [B, H, G, w, N].
        where: columns of the queries, int32 [B, w], -1 for none.
        part: "value", "key" or "joint".
    """
    weights = signals.attention.probabilities(logits, signals.visible(where)).flatten(2, 3)
    scores = signals.attention.scores(logits).flatten(2, 3)
    rows, width = weights.shape[2], signals.query.shape[-1]
    output: Tensor | float = 0.0
    for piece, _, values in signals.pieces(width):
        output = output + weights[..., piece] @ values.float()
    assert isinstance(output, Tensor)
    found = torch.empty_like(weights[:, :, 0])
    own = output.square().sum(-1, keepdim=True)  # [B, H, R, 1]
    for piece, _, values in signals.pieces(rows):
        size = values.float().square().sum(-1).unsqueeze(2)
        weight, score = weights[..., piece].square(), scores[..., piece]
        error = size
        if part != "value":
            along = output @ values.float().mT
            error = score.square() * (size + own - 2 * along)
            error = error + size + 2 * score * (size - along) if part == "joint" else error
        found[..., piece] = (weight * error).sum(2)
    return found


class OutputChange(WrappedScorer):
    """How far attention's output moves if a slot goes and the rest is renormalised: A / (1 - A) |o - v| (arXiv 2504.14051).

    A is another scorer's score over its sum. Slots that it puts above all others stay there and take no part.
    """

    def score(self, signals: Signals) -> Tensor:
        base = self.scorer.score(signals).float()
        scored = signals.occupied & (base < HIGHEST)
        share = base.masked_fill(~scored, 0.0)
        share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        output = weighted(signals, self.weights(signals, share)).unsqueeze(2)
        width = signals.query.shape[-1]
        apart = signals.per_slot(lambda _, values: torch.linalg.vector_norm(values.float() - output, dim=-1), width)
        return (share / (1 - share).clamp_min(LEAST) * apart).masked_fill(~scored, HIGHEST)

    def weights(self, signals: Signals, share: Tensor) -> Tensor:
        """Returns what the output is the average of values by, float32 [B, H, N]."""
        return share


class OutputChangeOfMean(OutputChange):
    """The same with the plain mean of all values held in place of the output: the output need not be known."""

    def weights(self, signals: Signals, share: Tensor) -> Tensor:
        return signals.occupied / signals.occupied.sum(-1, keepdim=True).clamp_min(1)


def weighted(signals: Signals, weights: Tensor) -> Tensor:
    """Returns the sum of values by weights [B, H, N], float32 [B, H, dv]."""
    total: Tensor | float = 0.0
    for piece, _, values in signals.pieces(signals.query.shape[-1]):
        total = total + (weights[..., piece].unsqueeze(2) @ values.float()).squeeze(2)
    assert isinstance(total, Tensor)
    return total
