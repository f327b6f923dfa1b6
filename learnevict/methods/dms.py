"""DMS: dynamic memory sparsification, tokens are marked for eviction when written and evicted later (arXiv 2506.05345).

    alpha_i = sigmoid(w . h_i + b)      chance that token i is evicted, per kv head; b starts at -5
    training:  log(1 - alpha_i) is added to the logit of key i once it is `window` old; logistic noise on alpha's logit
    inference: keep the slots with the largest 1 - alpha_i

Reading the mark late, after the window, is the point of the method: eviction at once degrades the model sharply. Departures:
a linear map of the attention module's input in place of a channel borrowed from a query head, so the base stays frozen (the
paper's adapter variant); a head evicts down to its budget instead of all that alpha > 1/2 marks; a mark takes effect at the age
of `window`, as in WG-KV, where the paper waits one token more (t - i > W).

Departure of TRAINING, for the bundled model: the divergence counts answers only, because the model never learned to predict
prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.methods import Paper
from learnevict.parts.learned import hidden_of
from learnevict.parts.options import Options, compose
from learnevict.parts.soft_gates import AdmissionGate
from learnevict.policy import Policy
from learnevict.signals import Signals

PAPER = Paper("Inference-Time Hyper-Scaling with KV Cache Compression", "2506.05345", 2025, "learned")


TRAINING: dict[str, Any] = {
    "window": 16,  # paper: 256
    "bias": -2.0,  # paper: -5
    "noise": 1.0,  # paper: 1.0
    "compression": 8.0,  # paper: at most 8.0; +1 every 100 steps
    "ramp": 0.5,
    "answers_only": True,  # paper: the whole text
    "learning_rate": 1e-2,  # paper: the base is trained too, or an adapter
    "max_steps": 500,  # paper: 1,000; 250 for the adapter
    "per_device_train_batch_size": 4,
}


class SparsityGate(AdmissionGate):
    """Marks per layer and kv head.

    Args:
        layout: of the base model.
        window, noise: see AdmissionGate (paper: 256, and 1, a Gumbel-sigmoid of temperature 1).
        bias: initial b; at -5 nothing is evicted at first.
    """

    losses = {"student_divergence": 1.0, "shortfall": 1.0}  # noqa: RUF012

    def __init__(self, layout: Layout, window: int = 256, bias: float = -5.0, noise: float = 1.0) -> None:
        super().__init__(window, noise)
        self.made = {"window": window, "bias": bias, "noise": noise}
        self.weight = nn.Parameter(0.02 * torch.randn(layout.num_layers, layout.hidden_size, layout.num_heads))
        self.bias = nn.Parameter(torch.full((layout.num_layers, layout.num_heads), float(bias)))

    def logits(self, signals: Signals) -> Tensor:
        """Returns the logits of 1 - alpha, float32 [B, H, S]."""
        layer, hidden = signals.layer, hidden_of(signals, "dms", self.weight.dtype)
        marks = (hidden @ self.weight[layer]).float() + self.bias[layer].float()
        return -marks.transpose(1, 2)


build = SparsityGate


def policy(budget: AnyBudget, *, gate: SparsityGate, **options: Unpack[Options]) -> Policy:
    """Evict what is most surely marked; the last `recent` tokens, by default the gate's window, stay."""
    options.setdefault("recent", gate.window_size)
    return compose("dms", budget, gate, **options)
