"""Soft gates: a number written with each token, by which training weighs attention and inference ranks slots.

Retention gates (TRIM-KV, DBTrimKV) let a token decay with its age; admission gates (WG-KV, DMS) decide once, and the decision
takes effect when the token leaves the recent window.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from learnevict.config import Layout
from learnevict.errors import UsageError
from learnevict.ops.random import hashed, uniform
from learnevict.parts.learned import hidden_of
from learnevict.policy import DecayBias, SoftGate, WrappedScorer
from learnevict.signals import Signals, StateColumn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": nn.functional.gelu, "silu": nn.functional.silu}


class NoisyGate(SoftGate):
    """Writes the log of a number in (0, 1) into its only column.

    Args:
        noise: scale of logistic noise on the logits of that number while training.
    """

    noise: float

    @abstractmethod
    def logits(self, signals: Signals) -> Tensor:
        """Returns the logits for fresh tokens, float32 [B, H, S]."""

    def write(self, signals: Signals) -> dict[str, Tensor]:
        logits = self.logits(signals)
        if self.training and self.noise:
            logits = logits + self.noise * logistic(logits, signals, self.random_keys)
        return {self.columns[0].name: nn.functional.logsigmoid(logits)}


class RetentionGate(NoisyGate):
    """Writes log beta, the log-retention of each token, into the column "retention"; an MLP per layer, an output per kv head.

    Args:
        layout: of the base model.
        hidden: width of the hidden layers.
        bias: initial bias of the output. At 18 beta is 1 - 1.5e-8: the model starts with full attention.
        dropout, noise: on hidden units, and on the logits of beta, while training.
        activation: gelu, or silu as in published gates, which take that of their base model.
        num_hidden: hidden layers, 1 or 2.
        shared_output: one output projection for all layers.

    Attributes:
        scope: who competes in training: slots of a head ("layer"), or of all heads and layers ("model").
    """

    columns = (StateColumn("retention"),)
    scope: Literal["layer", "model"] = "layer"

    def __init__(
        self,
        layout: Layout,
        hidden: int,
        bias: float,
        dropout: float,
        noise: float,
        activation: str,
        *,
        num_hidden: int = 1,
        shared_output: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UsageError(f"a retention gate has no activation {activation!r}; choose {' or '.join(ACTIVATIONS)}")
        self.made = {"hidden": hidden, "bias": bias, "dropout": dropout, "noise": noise, "activation": activation}
        self.dropout, self.noise, self.activation = dropout, noise, ACTIVATIONS[activation]
        layers, outputs = layout.num_layers, 1 if shared_output else layout.num_layers
        self.weight_in = normal(layers, layout.hidden_size, hidden)
        self.bias_in = nn.Parameter(torch.zeros(layers, hidden))
        self.hidden_layers = [("weight_in", "bias_in"), ("weight_mid", "bias_mid")][:num_hidden]
        if num_hidden == 2:
            self.weight_mid = normal(layers, hidden, hidden)
            self.bias_mid = nn.Parameter(torch.zeros(layers, hidden))
        self.weight_out = normal(outputs, hidden, layout.num_heads)
        self.bias_out = nn.Parameter(torch.full((outputs, layout.num_heads), float(bias)))

    def logits(self, signals: Signals) -> Tensor:
        layer, x = signals.layer, hidden_of(signals, "a retention gate", self.weight_in.dtype)
        for weight, bias in self.hidden_layers:
            x = self.activation(x @ getattr(self, weight)[layer] + getattr(self, bias)[layer])
            x = nn.functional.dropout(x, self.dropout, self.training)
        output = layer if len(self.weight_out) > 1 else 0
        return ((x @ self.weight_out[output]).float() + self.bias_out[output].float()).transpose(1, 2)

    def score(self, signals: Signals) -> Tensor:
        """Returns the log of what is left of each token at the next one, float32 [B, H, N]."""
        return (signals.age + 1).float() * signals.state["retention"]

    def decay_bias(self, state: dict[str, Tensor]) -> DecayBias:
        """Returns the bias that grows with age."""
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
        return self.scorer.score(signals) + log_geometric(signals.state["retention"], self.horizon)


def log_geometric(log_ratio: Tensor, terms: int) -> Tensor:
    """Returns log(1 + e^r + ... + e^((terms - 1) r)) = log((1 - e^(terms r)) / (1 - e^r)) for r <= 0, also near 0."""
    log_ratio = log_ratio.clamp_max(-1e-30)  # at 0 both differences vanish; the limit is `terms`
    return torch.log(torch.expm1(terms * log_ratio) / torch.expm1(log_ratio))


def normal(*shape: int) -> nn.Parameter:
    """Returns random weights of standard deviation 0.02."""
    return nn.Parameter(0.02 * torch.randn(*shape))


class AdmissionGate(NoisyGate):
    """Writes log g, g in (0, 1), into the column "admission"; in training a bias on tokens at least `window` old.

    At inference a head keeps the tokens with the largest g that its budget allows, whatever g is. The papers keep all tokens
    above a threshold instead, so their caches have no bound.

    Args:
        window: age at which the bias begins, W.
        noise: see NoisyGate.

    Attributes:
        least: the smallest g in training; smaller ones count as this.
    """

    columns = (StateColumn("admission"),)
    least: float = 0.0

    def __init__(self, window: int, noise: float = 0.0) -> None:
        super().__init__()
        self.window_size, self.noise = window, noise

    def score(self, signals: Signals) -> Tensor:
        """Returns log g, float32 [B, H, N]; the same at every age."""
        return signals.state["admission"]

    def decay_bias(self, state: dict[str, Tensor]) -> DecayBias:
        """Returns log g, not below that of `least`, for tokens at least `window` old."""
        log_g = state["admission"]
        return DecayBias(log_g.clamp_min(math.log(self.least)) if self.least else log_g, self.window_size)


def logistic(logits: Tensor, signals: Signals, random_keys: Tensor | None = None) -> Tensor:
    """Returns standard logistic noise, the difference of two Gumbels, for logits of fresh tokens, float32 [B, H, S].

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
