"""KVzap: a surrogate of KVzip's scores reads the hidden state of each token once (arXiv 2601.07891).

    linear:  log s = W h + b          mlp:  log s = W' GELU(W h + b) + b', width E / 8          per layer, h -> kv heads

h is what the attention module reads. It is trained on log s+, s+ = max over the repetition's queries of attention x |W_O v| /
|h| (oracle.KVZIP_PLUS), by squared error: one pass, no gradient through the model; the linear one may start from its closed
form (StreamConfig.closed_form). A slot keeps the number it was written with.

Departures: each head keeps the best `budget` slots, where the paper keeps all above a threshold of -9 to -3, by model, so that
budgets vary by prompt and nothing bounds them; `threshold` here is a cap under the budget: what is below it goes even if it
could stay, but a head never holds more than its budget, and nothing goes before it has filled it. The first tokens are
protected. The paper's window of 128 tokens is the fresh block of the default slack. Where the model cannot repeat a text, as
the testbed's cannot, the target is the largest attention of the text's own later blocks (StreamConfig.target="future").
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.errors import UsageError
from learnevict.methods import Paper
from learnevict.parts.learned import Surrogate, hidden_of
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy
from learnevict.signals import Signals

PAPER = Paper("KVzap: Fast, Adaptive, and Faithful KV Cache Pruning", "2601.07891", 2026, "learned")
TRAINING: dict[str, Any] = {
    "target": "future",  # paper: reconstruction
    "learning_rate": 5e-3,  # paper: 5e-3, the default of its code
    "lr_scheduler_type": "cosine",  # paper: cosine
    "max_grad_norm": 1.0,  # paper: 1.0
    "max_steps": 400,  # paper: 15 epochs over 1.2 M tokens, 512 a step
    "per_device_train_batch_size": 8,
}


class KVzapGate(Surrogate):
    """One surrogate per layer, for all its kv heads.

    Args:
        layout: of the base model.
        kind: "mlp" or "linear".
        hidden: width of the mlp; None: an eighth of the model's.
    """

    oracle = "kvzip+"
    from_hidden = True
    objective = "mse"

    def __init__(self, layout: Layout, kind: str = "mlp", hidden: int | None = None) -> None:
        super().__init__()
        self.made = {"kind": kind, "hidden": hidden}
        if kind not in ("mlp", "linear"):
            raise UsageError(f"a kvzap surrogate is an 'mlp' or 'linear', not {kind!r}")
        self.kind = kind
        layers, width = layout.num_layers, layout.hidden_size
        last = width
        if kind == "mlp":
            last = hidden or max(width // 8, 1)
            self.weight_in = nn.Parameter(torch.randn(layers, width, last) / math.sqrt(width))
            self.bias_in = nn.Parameter(torch.zeros(layers, last))
        self.weight = nn.Parameter(torch.zeros(layers, last, layout.num_heads))
        self.bias = nn.Parameter(torch.zeros(layers, layout.num_heads))

    def estimate(self, signals: Signals) -> Tensor:
        """Returns log s+ of fresh tokens, float32 [B, H, S]."""
        layer, inner = signals.layer, hidden_of(signals, "kvzap")
        if self.kind == "mlp":
            inner = nn.functional.gelu(inner @ self.weight_in[layer] + self.bias_in[layer])
        return (inner @ self.weight[layer] + self.bias[layer]).transpose(1, 2)


build = KVzapGate


def policy(budget: AnyBudget, *, gate: KVzapGate, threshold: float | None = None, **options: Unpack[Options]) -> Policy:
    """Keep what the surrogate takes for most needed to repeat the text.

    Args:
        threshold: of log s+, below which slots go even where the budget would hold them; None: the budget alone decides.
    """
    return compose("kvzap", budget, gate, threshold=threshold, **options)
