"""Judge Q: soft tokens ask the cache what a response would (arXiv 2509.10798).

    s_i = mean over a group's query heads and over P soft tokens of A[t, i]

P = 32 soft tokens E [P, E] are read after the text, attend to it and to each other, and are forgotten. They are all that
is trained: their mean attention A_soft to the prompt against that of the response A_resp, per layer and query head:
L = mean over layers and query heads of  sum over i of (A_soft[i] - A_resp[i])^2. Gates do not depend on the budget. An event
costs a forward of P tokens.

Departures: responses are those of the data, where the paper has the model write them: `learnevict train ... --own_answers true`
does that, but the bundled model writes the given answer to 998 of 1000 training prompts. L sums over keys, because the paper's
mean weighs a short text more than a long one. The tokens are run before every event, inside the prompt and while decoding,
and trained for both (schedule="prefill_only" is the paper's single question at the end of the prompt). Sinks and recent tokens
are protected.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.parts.probes import SoftTokens
from learnevict.policy import Policy

PAPER = Paper(
    "Judge Q: Trainable Queries for Optimized Information Retention in KV Cache Eviction", "2509.10798", 2025, "learned"
)
TRAINING: dict[str, Any] = {
    "num_tokens": 32,  # paper: 32
    "response": 128,  # paper: the whole response
    "cuts": 2,  # paper: 0, it asks at the end of the prompt only
    "learning_rate": 1e-2,
    "max_steps": 400,  # paper: 50,000 prompts of ShareGPT, responses written by the model
    "warmup_steps": 20,
    "per_device_train_batch_size": 8,
}


class JudgeQGate(SoftTokens):
    """The soft tokens."""

    objective = "mse"
    oracle = "judgeq"


build = JudgeQGate


def policy(budget: AnyBudget, *, gate: JudgeQGate, **options: Unpack[Options]) -> Policy:
    """Keep what the soft tokens attend to."""
    return compose("judge_q", budget, gate, probe=gate, **options)
