"""DBTrimKV: tokens of all layers and heads compete by the retention they have left, summed over a horizon (arXiv 2605.09649).

    log beta_i = logsigmoid(W3 gelu(W2 gelu(W1 h_i + b1) + b2) + b3)      per kv head; W3 and b3 are shared by all layers
    training:  as trimkv, under one capacity for all heads
    inference: of all layers and heads keep the slots with the largest  sum over s = t + 1 ... t + horizon of beta_i^(s - i)

The shared output makes retentions of different layers comparable.

Departures: those of trimkv; the horizon is fixed, because nobody knows how long a text will get; every head keeps a floor of
the slots that an equal split would give it. Departures of TRAINING: those of trimkv.
"""

from __future__ import annotations

import warnings
from typing import Any

from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.errors import TrainedOtherwiseWarning
from learnevict.methods import Paper
from learnevict.parts.allocators import Together
from learnevict.parts.options import Options, compose
from learnevict.parts.soft_gates import RetentionGate, RetentionSum
from learnevict.policy import Policy

PAPER = Paper(
    "Make Each Token Count: Towards Improving Long-Context Performance with KV Cache Eviction",
    "2605.09649",
    2026,
    "learned",
    ("score", "allocation"),
)
TRAINING: dict[str, Any] = {  # trimkv compares them with its paper
    "hidden": 128, "bias": 6.0, "dropout": 0.0, "noise": 1.0, "budgets": (12, 32), "power": 0.5, "answers_only": True,
    "capacity": 1.0, "learning_rate": 4e-3, "weight_decay": 0.01, "max_steps": 300, "per_device_train_batch_size": 4,
}  # fmt: skip


class DBTrimGate(RetentionGate):
    """A network per layer with two hidden layers, and one output projection for all layers.

    Args:
        layout: of the base model.
        hidden, bias, dropout, noise, activation: see RetentionGate.
        shared_output: False gives each layer its own output projection, as published gates have.
    """

    losses = {"divergence": 1.0, "next_token": 1.0, "hinge_together": 1.0}  # noqa: RUF012
    scope = "model"

    def __init__(
        self,
        layout: Layout,
        hidden: int = 512,
        bias: float = 18.0,
        dropout: float = 0.1,
        noise: float = 0.0,
        activation: str = "gelu",
        shared_output: bool = True,
    ) -> None:
        super().__init__(layout, hidden, bias, dropout, noise, activation, num_hidden=2, shared_output=shared_output)
        self.made = {**self.made, "shared_output": shared_output}


build = DBTrimGate


def policy(
    budget: AnyBudget,
    *,
    gate: RetentionGate,
    floor: float = 0.2,
    horizon: int = 128,
    **options: Unpack[Options],
) -> Policy:
    """Evict what has least retention left, wherever it is.

    Args:
        floor: share of the budget beside guards that no head falls below.
        horizon: tokens ahead over which retention is summed.

    Raises:
        UsageError: a floor beyond 0 to 1, or a horizon below 1.
    """
    if gate.scope != "model":
        warnings.warn(
            "this gate is one of trimkv, so its retentions in one layer need not compare with those of another; train one "
            'of dbtrimkv, or use allocation="equal"',
            TrainedOtherwiseWarning,
            stacklevel=2,
        )
    scorer = RetentionSum(gate, horizon)
    return compose("dbtrimkv", budget, scorer, allocator=Together(floor), scope="model", **options)
