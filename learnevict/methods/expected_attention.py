"""Expected Attention: what queries to come will attend to, taken as Gaussian (arXiv 2510.00636).

Recent queries without RoPE have mean mu and covariance Sigma; rotated to the average of the next T = 512 positions,
R = mean of R_p, they give the expected logit  z_j = R mu . k_j / sqrt(d) + k_j' (R Sigma R') k_j / (2 d)  (section
3.1); s_j = (mean over the group of softmax_j(z) + epsilon) * ||v_j||.  Queries of the first 4 tokens are outliers and
left out, and so are those tokens in the softmax; they rank highest.

Departures: statistics of the last 64 queries, whose rotation is undone, where the paper takes the whole prompt's; ||v||
for ||W_o v||, as in kvpress; sinks of attention and soft caps are not modelled. Rank-W form: (1/W) sum of ((R q_i - R
mu) . k_j)^2 is the quadratic term without any d x d matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.parts.rotary import frequencies_of, turned
from learnevict.parts.window import HIGHEST
from learnevict.policy import Policy, Scorer
from learnevict.signals import Attention, Signals

PAPER = Paper(
    "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries", "2510.00636", 2025
)


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Attention expected of the next `future` queries, times the norm of the value."""

    window: int = 64
    future: int = 512
    skip: int = 4
    epsilon: float = 0.0

    def score(self, signals: Signals) -> Tensor:
        support = signals.occupied & (signals.place >= self.skip)
        expected = self.logits(signals).unsqueeze(3)
        share = Attention(1.0).probabilities(expected, support[:, :, None, None, :]).mean((2, 3))
        size = signals.per_slot(lambda _, values: torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32))
        return ((share + self.epsilon) * size).masked_fill(~support, HIGHEST)

    def logits(self, signals: Signals) -> Tensor:
        """Returns the logarithm of the expected exponential of future logits, float32 [B, H, G, N]."""
        assert signals.ring is not None
        batch, heads, num = signals.position.shape
        counts = signals.rows.place(signals.ring[1]) >= self.skip
        count = counts.sum(-1).clamp_min(1).view(-1, 1, 1, 1)

        def products(query: Tensor) -> Tensor:
            grouped = query.view(batch, heads, -1, query.shape[-1]).to(signals.query.dtype)
            return signals.slots.logits(grouped).float()

        mean = spread = torch.zeros((), device=signals.position.device)
        for query, real in self._ahead(signals, counts):
            mean = mean + (query * real).sum(2, keepdim=True) / count
        for query, real in self._ahead(signals, counts):
            apart = products((query - mean) * real).view(batch, heads, -1, query.shape[2], num)
            spread = spread + apart.square().sum(3) / count
        scaling = signals.attention.scaling
        return scaling * products(mean) + 0.5 * scaling**2 * spread

    def _ahead(self, signals: Signals, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields queries moved to the average of the next positions, float32 [B, Hq, w, d], and which count, [B, 1, w, 1].

        A few at a time. Only distances enter, so it does not matter whether positions count padding.
        """
        assert signals.ring is not None
        frequency = frequencies_of(signals, "expected_attention")
        steps = torch.arange(1, self.future + 1, device=frequency.device).unsqueeze(-1) * frequency
        cos, sin = steps.cos().mean(0), steps.sin().mean(0)
        (queries, where), room = signals.ring, signals.slots.room
        group = queries.shape[1] // signals.position.shape[1]
        size = max(1, min(room, queries.shape[-1] * room // signals.position.shape[-1]) // (4 * group))
        for start in range(0, where.shape[1], size):
            part = slice(start, start + size)
            angle = signals.rows.age(where[:, part]).unsqueeze(-1) * frequency
            to_cos = (cos * angle.cos() - sin * angle.sin()).unsqueeze(1)
            to_sin = (sin * angle.cos() + cos * angle.sin()).unsqueeze(1)
            yield turned(queries[:, :, part], to_cos, to_sin), counts[:, None, part, None].float()


def policy(
    budget: AnyBudget,
    *,
    window: int = 64,
    future: int = 512,
    epsilon: float = 0.0,
    **options: Unpack[Options],
) -> Policy:
    """Keep what queries to come are expected to attend to.

    Args:
        window: recent queries that give the statistics.
        future: positions ahead that are averaged over (512: section 4.1).
        epsilon: share every token gets before the value's norm (0.02 with Ada-KV in kvpress).
    """
    return compose("expected_attention", budget, ExpectedAttention(window, future, 4, epsilon), **options)
