"""KVpop: slots are scored late, when they are to be evicted, in the light of what has been read since (arXiv 2607.05061).

    z_t = GRU(z_{t-1}, h_t)                                     per layer, h: what its attention module reads, z of 16 numbers
    f_i = MLP([k_i, v_i, z_i, z_now, log(1 + age), log(budget / length)])            per layer and kv head, higher stays

A token's use shows only after it was written, so the score of a slot sees the state of the text at its own time and the
state now. Every slot carries the state of its time in the state column "state"; the newest slot's is the current one, from
which `write` goes on: across blocks, steps and requests, with nothing kept in the module. It is trained on golden labels, the
attention of the future, at random events of a pass along golden eviction, through the recurrence
(learnevict.train.trainers.regression).

Known of the paper (openreview R54wzDIb0L) are its outlines: stateful, delayed scoring at eviction time under a fixed budget
per head, a future-attention target, guidance by an xLSTM. Ours and not the paper's: a GRU in place of the xLSTM, one small
one per layer, read through its state alone; what the score network is given; the pairwise objective on logarithms of labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Layout
from learnevict.methods import Paper
from learnevict.parts.headwise import HeadwiseMLP
from learnevict.parts.learned import NetworkRanker, hidden_of
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy
from learnevict.signals import Signals, StateColumn

PAPER = Paper("KVpop -- Key-Value Cache Compression with Predictive Online Pruning", "2607.05061", 2026, "learned")
TRAINING: dict[str, Any] = {
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "max_grad_norm": 1.0,
    "max_steps": 400,
    "along": "golden",  # states and slots of small caches; better than "full" at tight budgets
    "cuts": 4,
    "per_device_train_batch_size": 8,
}  # of the paper's settings none are known


class KVpopGate(NetworkRanker):
    """Recurrent cells of all layers, and score networks of all layers and kv heads.

    Args:
        layout: of the base model.
        state: numbers per state.
        hidden: width of the score network.
    """

    oracle = "golden"
    objective = "pairwise"

    def __init__(self, layout: Layout, state: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.made = {"state": state, "hidden": hidden}
        self.num_heads = layout.num_heads
        self.columns = (StateColumn("state", (state,)),)
        self.cells = nn.ModuleList(
            nn.GRU(layout.hidden_size, state, batch_first=True) for _ in range(layout.num_layers)
        )
        widths = {"key": layout.head_dim, "value": layout.value_dim, "then": state, "now": state, "clock": 2}
        self.network = HeadwiseMLP(layout, widths, hidden)

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """Returns the states of fresh tokens, the same for all heads, float32 [B, H, S, state]."""
        hidden = hidden_of(signals, "kvpop")
        before = current(signals).unsqueeze(0).contiguous()
        states = self.cells[signals.layer](hidden, before)[0]
        return {"state": states.unsqueeze(1).expand(-1, self.num_heads, -1, -1)}

    def inputs(self, signals: Signals) -> dict[str, Tensor]:
        """Returns the states now and then, and log(1 + age) with log(budget / length), [B, H, N or 1, width]."""
        now = current(signals)[:, None, None].expand(-1, self.num_heads, -1, -1)
        age = signals.age.clamp_min(0).float().log1p()
        share = (signals.budget.float() / signals.rows.seen).clamp_max(1.0).log()
        clock = torch.stack([age, share.view(-1, 1, 1).expand_as(age)], -1)
        return {"now": now, "then": signals.state["state"], "clock": clock}


def current(signals: Signals) -> Tensor:
    """Returns the state of the newest token, which every head holds, [B, state]; zeros where none is."""
    newest = signals.position[:, 0].argmax(-1).view(-1, 1, 1)
    states = signals.state["state"][:, 0]
    found = states.gather(1, newest.expand(-1, 1, states.shape[-1])).squeeze(1)
    return found * signals.occupied[:, 0].any(-1, keepdim=True)


build = KVpopGate


def policy(budget: AnyBudget, *, gate: KVpopGate, **options: Unpack[Options]) -> Policy:
    """Evict what the network ranks lowest, seen from now."""
    return compose("kvpop", budget, gate, **options)
