"""TRIM-KV: a token gets a retention when it is written, and its weight decays geometrically with age (arXiv 2512.03324).

    log beta_i = logsigmoid(W2 gelu(W1 h_i + b1) + b2)      per kv head; h_i is the input of the attention module
    training:  (t - i) log beta_i is added to the logit of key i at query t
    inference: keep the slots with the largest (t + 1 - i) log beta_i

Departures: the bias is added, as in version 2 of the paper, and never a factor as in its eager code, which raises forgotten
keys with negative logits; retentions are float32, by logsigmoid and not log(sigmoid), which is 0 from a bias of 17 on; of equal
scores the older goes.

Departures of TRAINING, for the bundled model: attention as peaked as its own finds a decayed token through a hundredth of its
weight, where eviction has taken it away, so capacity counts weights to the power of 0.5, and logistic noise on the logits, in
place of dropout, keeps the gate from relying on such remains; losses count answers only, because the model never learned to
predict prompts; bias, budgets and width are those of texts of a few hundred tokens.
"""

from __future__ import annotations

from typing import Any

from learnevict.config import AnyBudget, Layout
from learnevict.methods import Paper, dbtrimkv
from learnevict.parts.options import compose
from learnevict.parts.soft_gates import RetentionGate
from learnevict.policy import Policy

PAPER = Paper("Cache What Lasts: Token Retention for Memory-Bounded KV Cache in LLMs", "2512.03324", 2025, "learned")
TRAINING: dict[str, Any] = {
    "hidden": 128,  # paper: 512
    "bias": 6.0,  # paper: 18, beta = 1 - 1.5e-8, for texts of 16,384 tokens; here 1 - 2.5e-3, for texts of 350
    "dropout": 0.0,  # paper: 0.1
    "noise": 1.0,  # paper: none
    "budgets": (12, 32),  # paper: M = 256 or 512 for reasoning; below the budgets meant, which guards take a part of
    "power": 0.5,  # paper: 1
    "answers_only": True,  # paper: the whole text
    "capacity": 1.0,  # paper: lambda = 1
    "learning_rate": 4e-3,  # paper: 2e-4
    "weight_decay": 0.01,  # paper: 0.01
    "max_steps": 600,  # paper: 564 M tokens
    "per_device_train_batch_size": 4,  # paper: 4, as accumulated batches of 1
}


class TrimGate(RetentionGate):
    """A network per layer with one hidden layer and an output per kv head; arguments as of RetentionGate."""

    losses = {"divergence": 1.0, "next_token": 1.0, "hinge": 1.0}  # noqa: RUF012

    def __init__(
        self,
        layout: Layout,
        hidden: int = 512,  # the paper's code
        bias: float = 18.0,  # the paper's recipe
        dropout: float = 0.1,
        noise: float = 0.0,
        activation: str = "gelu",  # paper: the base model's
    ) -> None:
        super().__init__(layout, hidden, bias, dropout, noise, activation)


def build(layout: Layout, *, tied: bool = False, **settings: Any) -> RetentionGate:
    """Returns fresh gates for a base model; `tied` makes those of dbtrimkv, which gates on disk may call trimkv."""
    if not tied:
        settings.pop("shared_output", None)  # older gates name it here too
        return TrimGate(layout, **settings)
    gate = dbtrimkv.build(layout, **settings)
    gate.made = {**gate.made, "tied": True}
    return gate


def policy(budget: AnyBudget, *, gate: RetentionGate, **options: Any) -> Policy:
    """Evict what has decayed most (paper: every 128 tokens); gates that are tied are dbtrimkv's, and so are their options."""
    if gate.scope == "model":
        return dbtrimkv.policy(budget, gate=gate, **options)
    return compose("trimkv", budget, gate, **options)
