"""LookaheadKV: soft tokens with deltas of their own foresee what a response attends to (arXiv 2603.10899).

    Q = [X; P] W + [0; P] dW         and the same for keys, values and outputs: rank 8, alpha 32
    s_i = mean over a group's query heads of a_i,  a = mean over P soft tokens of A[t, .], normalised over the cache

The deltas change the rows of the P = 32 soft tokens only, so the text's own rows stay what they are, to the bit. Training
compares a, per layer and query head, with the mean attention of the response, renormalised over the prompt:
KL(response || soft tokens). An event costs a forward of P tokens.

Departures: responses are those of the data, where the paper has the model write them: `learnevict train ... --own_answers true`
does that, but the bundled model writes the given answer to 998 of 1000 training prompts. The tokens are run before every
event, inside the prompt and while decoding, and trained for both (schedule="prefill_only" is the paper's single question at the
end of the prompt). Sinks and recent tokens are protected.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.parts.probes import LowRank, SoftTokens
from learnevict.policy import Policy

PAPER = Paper(
    "LookaheadKV: Fast and Accurate KV Cache Eviction by Glimpsing into the Future without Generation",
    "2603.10899",
    2026,
    "learned",
)
TRAINING: dict[str, Any] = {
    "num_tokens": 32,  # paper: 32
    "rank": 8,  # paper: 8
    "alpha": 32.0,  # paper: 32
    "response": 128,  # paper: 512
    "cuts": 2,  # paper: 0, it asks at the end of the prompt only
    "learning_rate": 2e-3,  # paper: 1e-3 (Llama), 2e-4 (Qwen)
    "max_steps": 400,  # paper: 7,600 of 32
    "warmup_steps": 20,
    "per_device_train_batch_size": 8,  # paper: 32
}


class LookaheadGate(SoftTokens):
    """Soft tokens and the deltas they pass.

    Args:
        layout: of the base model.
        num_tokens: soft tokens.
        rank, alpha: of the deltas.
    """

    objective = "kl"
    oracle = "lookaheadkv"

    def __init__(self, layout: Layout, num_tokens: int = 32, rank: int = 8, alpha: float = 32.0) -> None:
        super().__init__(layout, num_tokens)
        self.deltas = LowRank(layout, rank, alpha)

    def settings(self) -> dict[str, Any]:
        """Returns what `build` needs."""
        return {**super().settings(), "rank": self.deltas.rank, "alpha": self.deltas.alpha}

    def adapted(self, decoder: nn.Module) -> AbstractContextManager[None]:
        """See policy.Probe; inside, the deltas are added."""
        return self.deltas.added_to(decoder)

    def attention(self, probe_attention: Tensor) -> Tensor:
        """Returns the mean over the tokens, as a distribution over slots, float32 [B, H, G, N]."""
        mean = probe_attention.mean(3)
        return mean / mean.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


build = LookaheadGate


def policy(budget: AnyBudget, *, gate: LookaheadGate, **options: Unpack[Options]) -> Policy:
    """Keep what the soft tokens attend to."""
    return compose("lookahead_kv", budget, gate, probe=gate, **options)
