"""WG-KV: a gate on keys decides what is written to memory when a token leaves the recent window (arXiv 2512.17452).

    g_i = sigmoid(w2 . gelu(W1 [rms(k_i before RoPE); rms(k_i)] + b1) + b2)      per kv head, 2 d inputs, 4 d hidden units
    training:  log max(g_i, 0.001) is added to the logit of key i once it is `window` old
    inference: keep the slots with the largest g_i

Departures: the cache holds keys after RoPE, so the key before it is the same key turned back by its position (exact but for
rounding); b2 starts at 3, so that the model starts near full attention; a head keeps its budget of the largest gates instead
of all above 0.1.

Departures of TRAINING, for the bundled model: logistic noise on the gates' logits, because attention as peaked as its own finds
a token through a gate of 1 %, where eviction has taken it away; what is admitted costs 12 times the paper's least, because an
eighth is to be kept, not a half to a fifth; the error of hidden states counts answers only, because the model never learned to
predict prompts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.parts.rotary import frequencies_of, turned
from learnevict.parts.soft_gates import AdmissionGate
from learnevict.policy import Policy
from learnevict.signals import Signals

PAPER = Paper(
    "KV Admission: Learning What to Write for Efficient Long-Context Inference", "2512.17452", 2025, "learned"
)


TRAINING: dict[str, Any] = {
    "window": 16,  # paper: 256
    "noise": 1.0,  # paper: none
    "capacity": 12.0,  # paper: 1 to 4: lambda = 0.04 times this
    "answers_only": True,  # paper: the whole text
    "learning_rate": 3e-3,  # paper: 1e-3
    "weight_decay": 0.01,  # paper: 0.01
    "max_steps": 200,
    "per_device_train_batch_size": 4,  # paper: 4,096 tokens
}


class WriteGate(AdmissionGate):
    """Gates of all layers and kv heads as grouped linear maps, weights [L, H, in, out].

    Args:
        layout: of the base model.
        window, noise: see AdmissionGate (paper: 256 and 0).
        hidden: width of the hidden layer; None: 4 d, as in the paper.
        bias: initial b2.
    """

    losses = {"hidden_error": 1.0, "admitted": 0.04}  # noqa: RUF012 - lambda is 0.04 by default, up to 0.16
    least = 1e-3

    def __init__(
        self, layout: Layout, window: int = 256, hidden: int | None = None, bias: float = 3.0, noise: float = 0.0
    ) -> None:
        super().__init__(window, noise)
        size, width = layout.head_dim, hidden or 4 * layout.head_dim
        self.made = {"window": window, "hidden": hidden, "bias": bias, "noise": noise}
        heads = (layout.num_layers, layout.num_heads)
        scale = 1 / math.sqrt(2 * size)
        self.weight_before = nn.Parameter(scale * torch.randn(*heads, size, width))
        self.weight_after = nn.Parameter(scale * torch.randn(*heads, size, width))
        self.bias_in = nn.Parameter(torch.zeros(*heads, 1, width))
        self.weight_out = nn.Parameter(torch.zeros(*heads, width, 1))
        self.bias_out = nn.Parameter(torch.full((*heads, 1, 1), float(bias)))

    def logits(self, signals: Signals) -> Tensor:
        assert signals.key is not None
        batch, heads, size, width = signals.key.shape
        layer, kind = signals.layer, self.weight_out.dtype

        def grouped(keys: Tensor) -> Tensor:  # heads lead, so weights are not copied per row
            return nn.functional.rms_norm(keys, (width,)).transpose(0, 1).reshape(heads, -1, width).to(kind)

        place = signals.rows.place(signals.query_position).clamp_min(0).unsqueeze(-1)
        angle = (place * frequencies_of(signals, "wg_kv")).unsqueeze(1)
        x = grouped(turned(signals.key, angle.cos(), -angle.sin())) @ self.weight_before[layer]
        x = x + grouped(signals.key.float()) @ self.weight_after[layer] + self.bias_in[layer]
        logits = nn.functional.gelu(x) @ self.weight_out[layer] + self.bias_out[layer]
        return logits.float().view(heads, batch, size).transpose(0, 1)


build = WriteGate


def policy(budget: AnyBudget, *, gate: WriteGate, **options: Unpack[Options]) -> Policy:
    """Keep what the gate would write; the last `recent` tokens, by default the gate's window, stay."""
    options.setdefault("recent", gate.window_size)
    return compose("wg_kv", budget, gate, **options)
