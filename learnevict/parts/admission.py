"""Gates that decide once per token whether it stays after its time in the recent window: WG-KV, DMS.

The column "admission" holds log g, g in (0, 1), written with the token. In training it is a bias on the token's logit once the
token is `window` old. At inference it ranks: a head keeps the tokens with the largest g that its budget allows, whatever g is.
The papers keep all tokens above a threshold instead, so their caches have no bound.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import Budget
from learnevict.ops.random import hashed, uniform
from learnevict.parts.options import Options, compose
from learnevict.policy import DecayBias, Policy, SoftGate
from learnevict.signals import Signals, StateColumn


class AdmissionGate(SoftGate):
    """A gate that writes log g into the column "admission".

    Args:
        window: age at which the bias begins, W.
        noise: scale of the logistic noise on the logits of g while training.

    Attributes:
        least: the smallest g in training; smaller ones count as this.
    """

    columns = (StateColumn("admission"),)
    least: float = 0.0

    def __init__(self, window: int, noise: float = 0.0) -> None:
        super().__init__()
        self.window_size, self.noise = window, noise

    @abstractmethod
    def logits(self, signals: Signals) -> Tensor:
        """Returns the logits of g for fresh tokens, float32 [B, H, S]."""

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """{"admission": log g, float32 [B, H, S]}."""
        logits = self.logits(signals)
        if self.training and self.noise:
            logits = logits + self.noise * logistic(logits, signals, self.random_keys)
        return {"admission": torch.nn.functional.logsigmoid(logits)}

    def score(self, signals: Signals) -> Tensor:
        """log g, float32 [B, H, N]; the same at every age."""
        return signals.state["admission"]

    def decay_bias(self, state: dict[str, Tensor]) -> DecayBias:
        """log g, not below that of `least`, on tokens at least `window` old."""
        rate = state["admission"]
        return DecayBias(rate.clamp_min(math.log(self.least)) if self.least else rate, self.window_size)


def logistic(logits: Tensor, signals: Signals, random_keys: Tensor | None = None) -> Tensor:
    """Standard logistic noise, the difference of two Gumbels, for logits of fresh tokens, float32 [B, H, S].

    Args:
        logits: they give the shape.
        signals: the tokens.
        random_keys: int64 [B] of ops.random. A token's noise depends on its row's key, layer, head and place in the row, and
            so neither on padding nor on other rows. None: it comes from the global generator.
    """
    if random_keys is None:
        draws = torch.rand_like(logits, dtype=torch.float32)
    else:
        head = torch.arange(logits.shape[1], device=logits.device).view(-1, 1)
        place = signals.rows.place(signals.query_position).unsqueeze(1)
        draws = uniform(hashed(random_keys.view(-1, 1, 1), signals.layer, head, place))
    return draws.clamp(1e-6, 1 - 1e-6).logit()


def admit(name: str, budget: int | str | Budget, gate: AdmissionGate, **options: Unpack[Options]) -> Policy:
    """The policy of an admission gate: its window is the recent window, unless `recent` says otherwise."""
    given: dict[str, Any] = {"recent": gate.window_size, **options}
    return compose(name, budget, gate, **given)
