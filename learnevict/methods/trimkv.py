"""TRIM-KV: a token gets a retention when it is written and fades geometrically (arXiv 2512.03324); DBTrimKV ranks globally.

    log beta_i = logsigmoid(W2 gelu(W1 h_i + b1) + b2)      per kv head; h_i is the input of the attention module
    training:  (t - i) log beta_i is added to the logit of key i at query t
    inference: keep the slots with the largest (t + 1 - i) log beta_i

`scope="model"` is DBTrimKV (arXiv 2605.09649): the slots of all layers and heads compete by what they are worth over the next
`horizon` tokens, the sum of beta_i^(s - i) over s = t + 1 ... t + horizon. A gate made with `tied=True` shares its output
projection over layers, so that worths compare, and learns under one capacity for all heads.

Departures: the bias is added, as in version 2 of the paper, and never a factor as in its eager code, which raises forgotten
keys with negative logits; retentions are float32, by logsigmoid and not log(sigmoid), which is 0 from a bias of 17 on; of equal
scores the older goes; DBTrimKV's horizon is fixed, because nobody knows how long a text will get.

Departures of TRAINING, for the bundled model: attention as peaked as its own finds a faded token through a hundredth of its
weight, where eviction has taken it away, so capacity counts weights to the power of 0.5, and logistic noise on the logits, in
place of dropout, keeps the gate from living on such remains; losses count answers only, because the model never learned to
predict prompts; bias, budgets and width are those of texts of a few hundred tokens.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import Budget, Layout
from learnevict.errors import GateError, TrainedOtherwiseWarning, UsageError
from learnevict.methods import Paper
from learnevict.parts.admission import logistic
from learnevict.parts.allocators import Together
from learnevict.parts.learned import expect, stacked
from learnevict.parts.options import Options, compose
from learnevict.policy import DecayBias, Policy, Scorer, SoftGate
from learnevict.signals import Signals, StateColumn

PAPER = Paper("Cache What Lasts: Token Retention for Memory-Bounded KV Cache in LLMs", "2512.03324", 2025, "learned")
PUBLISHED = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.retention_gate\.(linear[123]\.(?:weight|bias)|bias)")
"""Names of the authors' tensors (ngocbh/TrimKV-*, ngocbh/DBTrimKV-*): layer, and name within it."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": nn.functional.gelu, "silu": nn.functional.silu}

TRAINING: dict[str, Any] = {
    "hidden": 128,  # 512
    "bias": 6.0,  # 18: beta 1 - 1.5e-8, for texts of 16,384 tokens; here 1 - 2.5e-3, for texts of 350
    "dropout": 0.0,  # 0.1
    "noise": 1.0,  # none
    "budgets": (12, 32),  # M = 256 or 512 for reasoning; below the budgets meant, which guards take a part of
    "power": 0.5,  # 1
    "answers_only": True,  # the whole text
    "capacity": 1.0,  # lambda = 1
    "learning_rate": 4e-3,  # 2e-4
    "weight_decay": 0.01,  # the same
    "max_steps": 600,  # 564 M tokens
    "per_device_train_batch_size": 4,  # the same, as accumulated batches of 1
}


class TrimGate(SoftGate):
    """Retention of every token, per layer and kv head.

    Args:
        layout: of the base model.
        hidden: width of the hidden layer; 512 in the paper's code.
        bias: initial b2. At 18, of the paper's recipe, beta is 1 - 1.5e-8: the model starts with full attention.
        tied: DBTrimKV's gate: two hidden layers, and one output projection for all layers.
        dropout: on hidden units while training; 0.1 in the paper's recipe.
        noise: scale of logistic noise on logits while training; 0 in the paper.
        activation: gelu, or silu as in published gates, which take that of their base model.
        shared_output: False gives each layer of a tied gate its own output projection, as published DBTrimKV gates have.
    """

    columns = (StateColumn("retention"),)

    def __init__(
        self,
        layout: Layout,
        hidden: int = 512,
        bias: float = 18.0,
        tied: bool = False,
        dropout: float = 0.1,
        noise: float = 0.0,
        activation: str = "gelu",
        shared_output: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UsageError(f"a retention gate has no activation {activation!r}; choose {' or '.join(ACTIVATIONS)}")
        self.made = {
            "hidden": hidden, "bias": bias, "tied": tied, "dropout": dropout, "noise": noise, "activation": activation,
            "shared_output": shared_output,
        }  # fmt: skip
        self.activation, self.shared = ACTIVATIONS[activation], tied and shared_output
        self.tied, self.dropout, self.noise = tied, dropout, noise
        self.losses: Mapping[str, float] = {
            "divergence": 1.0,
            "next_token": 1.0,
            "hinge_together" if tied else "hinge": 1.0,
        }
        layers, outputs = layout.num_layers, 1 if self.shared else layout.num_layers
        self.weight_in = normal(layers, layout.hidden_size, hidden)
        self.bias_in = nn.Parameter(torch.zeros(layers, hidden))
        if tied:
            self.weight_mid = normal(layers, hidden, hidden)
            self.bias_mid = nn.Parameter(torch.zeros(layers, hidden))
        self.weight_out = normal(outputs, hidden, layout.num_heads)
        self.bias_out = nn.Parameter(torch.full((outputs, layout.num_heads), float(bias)))

    def settings(self) -> dict[str, Any]:
        """What __init__ needs to build this gate again, as JSON."""
        return self.made

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """{"retention": log beta of fresh tokens, float32 [B, H, S]}."""
        if signals.hidden is None:
            raise GateError("trimkv reads what attention modules are given, but this run has no hidden states")
        layer = signals.layer
        x = signals.hidden.to(self.weight_in.dtype)
        x = self._drop(self.activation(x @ self.weight_in[layer] + self.bias_in[layer]))
        if self.tied:
            x = self._drop(self.activation(x @ self.weight_mid[layer] + self.bias_mid[layer]))
        output = 0 if self.shared else layer
        logits = ((x @ self.weight_out[output]).float() + self.bias_out[output].float()).transpose(1, 2)
        if self.training and self.noise:
            logits = logits + self.noise * logistic(logits, signals, self.random_keys)
        return {"retention": nn.functional.logsigmoid(logits)}

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)

    def score(self, signals: Signals) -> Tensor:
        """Log retention after the next token, float32 [B, H, N]."""
        return next_age(signals) * signals.state["retention"]

    def decay_bias(self, state: dict[str, Tensor]) -> DecayBias:
        """Geometric."""
        return DecayBias(state["retention"])


@dataclass(frozen=True)
class Worth(Scorer):
    """Log of what a token's retention sums up to over the next `horizon` tokens."""

    gate: TrimGate
    horizon: int

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise UsageError(f"a token is worth nothing over {self.horizon} tokens; give a horizon of at least 1")
        object.__setattr__(self, "columns", self.gate.columns)

    @property
    def soft(self) -> TrimGate:
        """The gate."""
        return self.gate

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """As the gate."""
        return self.gate.write(signals)

    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]."""
        rate = signals.state["retention"]
        return next_age(signals) * rate + log_geometric(rate, self.horizon)

    def to(self, device: torch.device) -> Scorer:
        """Moves the gate."""
        self.gate.to(device)
        return self


def next_age(signals: Signals) -> Tensor:
    """Ages at the next token, float32 [B, H, N]."""
    return (signals.age + 1).float()


def log_geometric(rate: Tensor, terms: int) -> Tensor:
    """log of 1 + e^r + ... + e^((terms - 1) r) = log((1 - e^(terms r)) / (1 - e^r)) for rates r <= 0, also near 0."""
    rate = rate.clamp_max(-1e-30)  # at 0 both differences vanish; the limit is `terms`
    return torch.log(torch.expm1(terms * rate) / torch.expm1(rate))


def normal(*shape: int) -> nn.Parameter:
    """Weights of standard deviation 0.02."""
    return nn.Parameter(0.02 * torch.randn(*shape))


def convert(layers: Sequence[Mapping[str, Tensor]], activation: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the gate that the authors' weights are.

    Args:
        layers: tensors of each, by the names of PUBLISHED.
        activation: of the base model, which theirs take over.

    Raises:
        GateError: other tensors than theirs, or an activation that this gate does not have.
    """
    ends = {"weight_in": "linear1.weight", "bias_in": "linear1.bias", "bias_out": "bias"}
    one = ends | {"weight_out": "linear2.weight"}
    two = ends | {"weight_mid": "linear2.weight", "bias_mid": "linear2.bias", "weight_out": "linear3.weight"}
    names = next((names for names in (one, two) if expect(layers, *names.values())), None)
    if names is None:
        raise GateError(
            f"a retention gate has {', '.join(two.values())}, but a layer has {', '.join(sorted(layers[0]))}"
        )
    if activation not in ACTIVATIONS:
        raise GateError(
            f"activation {activation!r} of the base model is unknown here; known are {', '.join(ACTIVATIONS)}"
        )
    state = {own: stacked(layers, theirs) for own, theirs in names.items()}
    output = ("weight_out", "bias_out")
    shared = names is two and all(bool((state[name] == state[name][:1]).all()) for name in output)
    state |= {name: state[name][:1] for name in output} if shared else {}
    made = {"hidden": state["bias_in"].shape[-1], "tied": names is two, "shared_output": shared or names is one}
    return made | {"activation": activation}, state


def build(layout: Layout, **settings: Any) -> TrimGate:
    """A fresh gate for a base model."""
    return TrimGate(layout, **settings)


def policy(
    budget: int | str | Budget,
    *,
    gate: TrimGate,
    scope: str | None = None,
    floor: float = 0.2,
    horizon: int = 128,
    **options: Unpack[Options],
) -> Policy:
    """Evict what has faded most (paper: every 128 tokens).

    Args:
        budget: slots per (layer, kv head): tokens, "25%" or "64MiB".
        gate: trained, from `Gates.from_pretrained(...)`.
        scope: "layer": every head holds the budget; "model": heads of all layers compete (DBTrimKV). None: as the gate was
            made, "model" if it is tied.
        floor: share of the budget beside guards that no head falls below; only with scope="model".
        horizon: tokens ahead over which worth is summed; only with scope="model".
        **options: sinks, recent, prompt, slack, schedule; see parts.options.Options.

    Raises:
        UsageError: another scope, a floor beyond 0 to 1, or a horizon below 1.
    """
    scope = scope or ("model" if gate.tied else "layer")
    if scope == "layer":
        return compose("trimkv", budget, gate, **options)
    if scope != "model":
        raise UsageError(f"trimkv has no scope {scope!r}; choose layer or model")
    if not gate.tied:
        warnings.warn(
            "this gate was not made with tied=True, so what it says in one layer need not compare with another; train a "
            'tied one, or use scope="layer"',
            TrainedOtherwiseWarning,
            stacklevel=2,
        )
    worth = Worth(gate, horizon)
    return replace(compose("trimkv", budget, worth, allocator=Together(floor), **options), scope="model")
