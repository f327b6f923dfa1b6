"""Retention gates (TRIM-KV, DBTrimKV): a token gets a log-retention when it is written, which is multiplied by its age."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from learnevict.errors import GateError, UsageError
from learnevict.parts.admission import logistic
from learnevict.policy import DecayBias, SoftGate, WrappedScorer
from learnevict.signals import Signals, StateColumn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": nn.functional.gelu, "silu": nn.functional.silu}


class RetentionGate(SoftGate):
    """A gate that writes log beta, the log-retention of each token, into the column "retention".

    Args:
        dropout: on hidden units while training.
        noise: scale of logistic noise on the logits of beta while training.
        activation: gelu, or silu as in published gates, which take that of their base model.

    Attributes:
        scope: who competes in training: slots of a head ("layer"), or of all heads and layers ("model").
        made: arguments of __init__, as JSON.
    """

    columns = (StateColumn("retention"),)
    scope: Literal["layer", "model"] = "layer"
    made: dict[str, Any]

    def __init__(self, dropout: float, noise: float, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UsageError(f"a retention gate has no activation {activation!r}; choose {' or '.join(ACTIVATIONS)}")
        self.dropout, self.noise, self.activation = dropout, noise, ACTIVATIONS[activation]

    @abstractmethod
    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits of beta, float32 [B, S, H], for what the attention module of a layer reads, [B, S, E]."""

    def settings(self) -> dict[str, Any]:
        """What the method's `build` needs besides the layout, as JSON."""
        return self.made

    def units(self, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """One hidden layer: dropout(activation(inputs @ weight + bias))."""
        return nn.functional.dropout(self.activation(inputs @ weight + bias), self.dropout, self.training)

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """{"retention": log beta of fresh tokens, float32 [B, H, S]}."""
        if signals.hidden is None:
            raise GateError("retention gates read what attention modules are given, but this run has no hidden states")
        logits = self.logits(signals.layer, signals.hidden.to(next(self.parameters()).dtype)).transpose(1, 2)
        if self.training and self.noise:
            logits = logits + self.noise * logistic(logits, signals, self.random_keys)
        return {"retention": nn.functional.logsigmoid(logits)}

    def score(self, signals: Signals) -> Tensor:
        """Log of what is left of each token at the next one, float32 [B, H, N]."""
        return (signals.age + 1).float() * signals.state["retention"]

    def decay_bias(self, state: dict[str, Tensor]) -> DecayBias:
        """The bias that grows with age."""
        return DecayBias(state["retention"])


@dataclass(frozen=True)
class RetentionSum(WrappedScorer):
    """Scores by the log of what a token's retention sums up to over the next `horizon` tokens."""

    scorer: RetentionGate
    horizon: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon < 1:
            raise UsageError(f"retention sums to nothing over {self.horizon} tokens; give a horizon of at least 1")

    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]."""
        return self.scorer.score(signals) + log_geometric(signals.state["retention"], self.horizon)


def log_geometric(log_ratio: Tensor, terms: int) -> Tensor:
    """Returns log(1 + e^r + ... + e^((terms - 1) r)) = log((1 - e^(terms r)) / (1 - e^r)) for r <= 0, also near 0."""
    log_ratio = log_ratio.clamp_max(-1e-30)  # at 0 both differences vanish; the limit is `terms`
    return torch.log(torch.expm1(terms * log_ratio) / torch.expm1(log_ratio))


def normal(*shape: int) -> nn.Parameter:
    """Returns random weights of standard deviation 0.02."""
    return nn.Parameter(0.02 * torch.randn(*shape))
