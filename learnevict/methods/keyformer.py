"""Keyformer: heavy hitters by attention with Gumbel noise, at a rising temperature (arXiv 2403.09054).

f_j = sum over queries t of softmax_j((z_tj + g_tj) / tau_t), g ~ Gumbel(0, 1), tau_t = 1 + 0.01 * (tokens generated):
tokens that lost a close race get a share too, more so the longer the answer. A group of query heads contributes
its mean. Half of the budget is the recent window (the paper: 30 % of the prompt of 60 % kept).

Departures: noise is a hash of seed, layer, head, query and key, so a run can be repeated; logits are taken from probabilities,
which differ by a constant per query; attention sinks of the model take no part; original positions stay; events every `slack`
tokens; sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.ops.random import hashed
from learnevict.parts.draws import gumbel
from learnevict.parts.options import ScheduleOptions, compose
from learnevict.policy import Policy, Scorer
from learnevict.signals import Attention, Signals, StateColumn

PAPER = Paper(
    "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference", "2403.09054", 2024
)
TOGETHER = 16
"""Queries whose noise is drawn at a time."""


@dataclass(frozen=True)
class NoisyMass(Scorer):
    """Noisy attention received so far."""

    noise: float = 1.0
    temperature: float = 1.0
    rise: float = 0.01
    seed: int = 0
    columns = (StateColumn("noisy_mass"),)
    observes = True

    def observe(self, signals: Signals) -> dict[str, Tensor]:
        """Adds what the fresh queries gave, averaged over the group."""
        assert signals.fresh_attention is not None
        total, group = signals.state["noisy_mass"], signals.fresh_attention.shape[2]
        where = signals.query_position
        parts = zip(signals.fresh_attention.split(TOGETHER, 3), where.split(TOGETHER, 1), strict=True)
        for weights, queries in parts:
            noisy = (weights.log() + self.noise * self._noise(signals, queries, group)) / self._tau(signals, queries)
            total = total + Attention(1.0).probabilities(noisy, weights > 0).sum((2, 3)) / group
        return {"noisy_mass": total}

    def _noise(self, signals: Signals, queries: Tensor, group: int) -> Tensor:
        """Returns Gumbel noise, float32 [B, H, G, S, N], for queries at columns int32 [B, S]."""
        heads = signals.position.shape[1]
        head = torch.arange(heads * group, device=queries.device).view(1, heads, group, 1, 1)
        query = signals.rows.place(queries)[:, None, None, :, None]
        return gumbel(hashed(signals.place[:, :, None, None, :], query, head, signals.layer, self.seed))

    def _tau(self, signals: Signals, queries: Tensor) -> Tensor:
        rows = signals.rows
        generated = (rows.place(queries) - rows.place(rows.prompt_end.unsqueeze(1)) + 1).clamp_min(0)
        return self.temperature + self.rise * generated[:, None, None, :, None]

    def score(self, signals: Signals) -> Tensor:
        return signals.state["noisy_mass"]


def policy(
    budget: AnyBudget,
    *,
    noise: float = 1.0,
    rise: float = 0.01,
    seed: int = 0,
    recent: int | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Keep what wins noisy attention.

    Args:
        noise: scale of the Gumbel noise; with noise=0 and rise=0 it is h2o.
        rise: of the temperature per generated token (0.01: the authors' code).
        seed: of the noise.
        recent: last tokens that stay; None: half of the budget.
    """
    half: dict[str, Any] = {"recent": 0, "recent_share": 0.5} if recent is None else {"recent": recent}
    return compose("keyformer", budget, NoisyMass(noise, 1.0, rise, seed), **half, **options)
