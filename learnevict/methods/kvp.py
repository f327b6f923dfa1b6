"""KVP: a small ranker per head orders the cache for all budgets at once (arXiv 2602.10238).

    f = w . GELU(W GELU(W_k k + W_v v + W_p p + b) + b)        per layer and kv head; p: log(1 + position), log(1 + age)

It is trained on regret over all budgets: a ranking of n slots that the future pays I_1 .. I_n costs the sum of
(rank - 1) I. I is attention summed over all later queries, then the largest of the group (oracle.KVP). Under the Plackett-Luce
law of f the expected cost has a closed form (learnevict.train.losses.regret).

Departures: that closed form is the objective, where the paper samples its gradient (REINFORCE, leave-one-out); two hidden
layers of 64 (the paper says 256, its parameter count more); logarithms of position and age for the plain position, which does
not carry over to longer texts; keys and values are centred and scaled; events while decoding too, where the paper ranks once
after the prompt, so a slot may be ranked many times; the last 16 tokens of the paper are `recent` and the fresh block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.methods import Paper
from learnevict.parts.headwise import HeadwiseMLP
from learnevict.parts.learned import NetworkRanker
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy
from learnevict.signals import Signals

PAPER = Paper("Learning to Evict from Key-Value Cache", "2602.10238", 2026, "learned")
TRAINING: dict[str, Any] = {
    "learning_rate": 3e-3,  # paper: 5e-5
    "lr_scheduler_type": "cosine",  # paper: to 1e-6
    "warmup_steps": 20,  # paper: 100
    "max_grad_norm": 5.0,  # paper: 5.0
    "max_steps": 400,  # paper: 4000
    "cuts": 4,  # paper: one, uniform, per sample
    "per_device_train_batch_size": 8,
}


class KVPGate(NetworkRanker):
    """Rankers of all layers and kv heads.

    Args:
        layout: of the base model.
        hidden: width of the two hidden layers.
    """

    oracle = "kvp"
    objective = "regret"

    def __init__(self, layout: Layout, hidden: int = 64) -> None:
        super().__init__()
        self.made = {"hidden": hidden}
        self.network = HeadwiseMLP(layout, {"key": layout.head_dim, "value": layout.value_dim, "place": 2}, hidden)

    def inputs(self, signals: Signals) -> dict[str, Tensor]:
        """Returns log(1 + position in the row) and log(1 + age) of every slot, [B, H, N, 2]."""
        return {"place": torch.stack([signals.place, signals.age], -1).clamp_min(0).float().log1p()}


build = KVPGate


def policy(budget: AnyBudget, *, gate: KVPGate, **options: Unpack[Options]) -> Policy:
    """Evict what the ranker puts last."""
    return compose("kvp", budget, gate, **options)
