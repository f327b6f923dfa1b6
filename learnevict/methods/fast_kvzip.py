"""Fast KVzip: a low-rank gate with learned sinks predicts KVzip's scores (arXiv 2601.17668).

    q_g = RMSNorm(W_q h + b_q), k = RMSNorm(W_k h)              16 numbers each, per query head g of the group and kv head
    a_g = k . q_g / 4 + b_g;  r_{g,s} = sink_s . q_g / 4         16 learned sinks per kv head
    s   = mean over g of  exp(a_g) / (exp(a_g) + sum over s of exp(r_{g,s}))      in (0, 1)

h is what the attention module reads; s is what a token keeps of attention that it shares with the sinks. It is trained on
KVzip's scores s* (largest attention of the repeated text, oracle.KVZIP) by binary cross-entropy.

Departures: b is added once, in training as at inference (the authors' training code adds it twice); heads are held to one
budget each, where the paper ranks all layers and heads together: allocation="pooled" does that (`threshold` is a cap under the
budget, as in kvzap); the paper's windows (4096 tokens or 2 % while reading, 128 while writing) are `recent` and the fresh
block. Where the model cannot repeat a text, as the testbed's cannot, s* is the largest attention of the text's own later blocks
(StreamConfig.target="future").
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.methods import Paper
from learnevict.parts.learned import Surrogate, hidden_of
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy
from learnevict.signals import Signals

PAPER = Paper("Fast KVzip: Efficient and Accurate LLM Inference with Gated KV Eviction", "2601.17668", 2026, "learned")
TRAINING: dict[str, Any] = {
    "target": "future",  # paper: reconstruction
    "learning_rate": 5e-3,  # paper: SGD of 0.2 with momentum 0.9
    "max_steps": 400,  # paper: 5000 of 1000 tokens, the rate halved at 50 % and at 75 %
    "lr_scheduler_type": "cosine",
    "warmup_steps": 4,  # paper: 1 % of the steps
    "per_device_train_batch_size": 8,
}


class FastKVzipGate(Surrogate):
    """Gates of all layers.

    Args:
        layout: of the base model.
        rank: numbers per query and key, d' (paper: 16).
        num_sinks: learned sinks per kv head, S (paper: 16); 0 is a plain sigmoid of a.
    """

    oracle = "kvzip"
    from_hidden = True
    objective = "bce"

    def __init__(self, layout: Layout, rank: int = 16, num_sinks: int = 16) -> None:
        super().__init__()
        self.made = {"rank": rank, "num_sinks": num_sinks}
        layers, heads, width = layout.num_layers, layout.num_heads, layout.hidden_size
        self.rank, self.group = rank, layout.num_query_heads // heads
        spread = 1 / math.sqrt(width)
        self.weight_query = nn.Parameter(torch.randn(layers, width, heads * self.group * rank) * spread)
        self.bias_query = nn.Parameter(torch.zeros(layers, heads * self.group * rank))
        self.weight_key = nn.Parameter(torch.randn(layers, width, heads * rank) * spread)
        self.norm_query = nn.Parameter(torch.ones(layers, rank))
        self.norm_key = nn.Parameter(torch.ones(layers, rank))
        self.sinks = nn.Parameter(torch.randn(layers, heads, num_sinks, rank))
        self.bias = nn.Parameter(torch.zeros(layers, heads, self.group))

    def estimate(self, signals: Signals) -> Tensor:
        """Returns s of fresh tokens, float32 [B, H, S]."""
        layer, hidden, heads = signals.layer, hidden_of(signals, "fast_kvzip"), self.sinks.shape[1]
        query = (hidden @ self.weight_query[layer] + self.bias_query[layer]).unflatten(-1, (heads, self.group, -1))
        query = rms_norm(query, self.norm_query[layer])
        key = rms_norm((hidden @ self.weight_key[layer]).unflatten(-1, (heads, 1, -1)), self.norm_key[layer])
        own = (query * key).sum(-1) / math.sqrt(self.rank) + self.bias[layer]
        if self.sinks.shape[2]:
            rivals = torch.einsum("bshgr,hnr->bshgn", query, self.sinks[layer]) / math.sqrt(self.rank)
            own = own - rivals.logsumexp(-1)
        return torch.sigmoid(own).mean(-1).transpose(1, 2)


def rms_norm(values: Tensor, weight: Tensor) -> Tensor:
    """Returns values / their root mean square over the last dimension, times weight."""
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * weight


build = FastKVzipGate


def policy(
    budget: AnyBudget, *, gate: FastKVzipGate, threshold: float | None = None, **options: Unpack[Options]
) -> Policy:
    """Keep what the gate takes for most needed to repeat the text.

    Args:
        threshold: of s, 0 to 1, below which slots go even where the budget would hold them; None: the budget alone decides.
    """
    return compose("fast_kvzip", budget, gate, threshold=threshold, **options)
