"""Bytes that a process holds beside weights and optimizer while gates learn, by mode: {phase: {what: bytes}}.

Letters are those of the package; s is the size of a number of the base, p the event period, E the events of a text after which
something goes, N slots per head at an event. What is not of the base is float32, 4 bytes. Assumptions:

- Labels, caches and recorded states follow from their shapes, budgets being those that take most.
- What a backward pass keeps grows evenly with tokens; it is measured on a few of them (learnevict.train.run.estimate).
- A pass without gradient holds its widest layer: residual, normed input, queries, keys, values and output, or the three
  products of the MLP, and a tile of attention with its probabilities, 128 queries each.
- Rows are as long as the longest, and cuts fall evenly: the last of B is at B / (B + 1) of the text, its square at B / (B + 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from learnevict.errors import UsageError
from learnevict.infer.model.supported import evicting_layers, layout_of
from learnevict.parts.learned import Learner, SlotScorer
from learnevict.policy import Gate

TILE = 128
Phases = dict[str, dict[str, int]]


@dataclass(frozen=True)
class RunPlan:
    """What an estimate has to know of a run."""

    mode: str  # how the gates learn: replay, stream, soft, probe or grpo
    tokens: int  # of a text, T
    rows: int = 1  # texts, or for grpo traces, that a process reads at a time, B
    period: int = 128  # tokens between events, p
    budgets: tuple[int, int] = (512, 4096)  # smallest and largest
    steps: int = 1000  # of the optimizer
    processes: int = 1  # that share the batch; one GPU each
    group: int = 8  # traces of one text, for grpo
    cuts: int = 4  # events per text at which slots are ranked, for stream, or moments at which a probe is asked
    stored_labels: bool = False  # labels are read, not made
    along: str = "full"  # for stream: texts are read with a full cache, or under golden eviction
    objective: str = ""  # for stream, as of StreamConfig; likewise `pairs`
    pairs: int = 0
    recompute: bool = False  # for soft, decoder layers are computed again in the backward pass
    settings: dict[str, Any] = field(default_factory=dict)  # of the gate, for the method's `build`
    dtype: torch.dtype | None = None  # of the base; None: the one its configuration names

    def __post_init__(self) -> None:
        if min(self.tokens, self.rows, self.period, self.steps, self.processes, self.group) < 1:
            raise UsageError(f"an estimate needs at least 1 token, row, step, process and trace, not {self}")
        if self.mode not in PHASES:
            raise UsageError(f"mode {self.mode!r} is unknown; choose {', '.join(PHASES)}")


class Shapes:
    """The sizes that the modes share.

    Args:
        gate_bytes: saved for the backward pass of one layer's gates: per slot of all heads for slot scorers, else per token.
        base_bytes: saved in all layers of the base for each token, where gradients pass through them.
    """

    def __init__(
        self, config: PreTrainedConfig, gate: Gate, plan: RunPlan, gate_bytes: float, base_bytes: float
    ) -> None:
        text = config.get_text_config(decoder=True)
        self.plan, self.gate, self.layout = plan, gate, layout_of(config)
        self.gate_bytes, self.base_bytes = gate_bytes, base_bytes
        self.number = (plan.dtype or getattr(text, "dtype", None) or torch.float32).itemsize
        self.layers = len(evicting_layers(DynamicCache(config=text).layers))
        self.heads = self.layers * self.layout.num_heads
        self.mlp = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
        self.features = gate.num_features if isinstance(gate, SlotScorer) else 0
        self.at_cuts = isinstance(gate, Learner) and gate.at_cuts  # slots are ranked at events, not tokens when written
        low, high = (min(max(budget, 1), plan.tokens) for budget in plan.budgets)
        most = min(max((plan.tokens - plan.period) // 2, low), high)
        recorded = [
            max(plan.tokens // plan.period - n // plan.period, 0) * (n + plan.period) for n in (low, most, high)
        ]
        self.states = plan.rows * self.heads * max(recorded)  # slots of a recorded run, B L H E N
        self.largest = min(plan.budgets[1] + plan.period, plan.tokens)  # slots that an evicting cache holds at most
        self.state_gates = round(gate_bytes * self.states / self.layout.num_heads)
        self.tile = 2 * 4 * plan.rows * self.layout.num_query_heads * min(TILE, plan.tokens) * plan.tokens

    def labels(self, heads: int) -> int:
        """Returns bytes of block labels, 4 B heads T ceil(T / p), of so many heads (oracle.future_attention)."""
        return 4 * self.plan.rows * heads * self.plan.tokens * -(-self.plan.tokens // self.plan.period)

    @property
    def oracle_tile(self) -> int:
        """Bytes of the oracle's two buffers, 8 G min(128, p) T, and of one head's keys, 4 T d."""
        group = self.layout.num_query_heads // self.layout.num_heads
        return 4 * self.plan.tokens * (2 * group * min(TILE, self.plan.period) + self.layout.head_dim)

    def cache(self, slots: int, columns: bool = True) -> int:
        """Returns bytes of keys and values, s B L H slots (d + dv), and of the gate's per-slot state."""
        state = 4 * sum(math.prod(column.shape) for column in self.gate.columns) if columns else 0
        return (
            self.plan.rows * self.heads * slots * (self.number * (self.layout.head_dim + self.layout.value_dim) + state)
        )

    def forward(self, rows: int, logits: int) -> int:
        """Returns bytes of a pass without gradient in its widest layer, and of logits of so many tokens of each row."""
        layout, tokens = self.layout, self.plan.tokens
        attention = 2 * layout.hidden_size + 2 * layout.num_query_heads * layout.head_dim
        attention += layout.num_heads * (layout.head_dim + layout.value_dim)
        widest = rows * tokens * self.number * max(attention, 2 * layout.hidden_size + 3 * self.mlp)
        return widest + self.tile * rows // self.plan.rows + rows * logits * layout.vocab_size * self.number

    @property
    def all_pairs(self) -> int:
        """Bytes of the expected regret over all pairs of slots, 5 B H N^2 for every cut and layer."""
        plan = self.plan
        objective = plan.objective or (self.gate.objective if isinstance(self.gate, Learner) else "")
        if objective != "regret" or plan.pairs:
            return 0
        cuts = plan.cuts * plan.rows / (plan.rows + 2) if self.at_cuts else 1
        return round(5 * plan.rows * self.heads * cuts * plan.tokens**2)


def replay_phases(sizes: Shapes) -> Phases:
    """Labels are made, a run is recorded, and its states, copied once to one tensor, are learned from."""
    plan, labels, recorded = sizes.plan, sizes.labels(sizes.heads), sizes.states * (4 * sizes.features + 5)
    labelling = {"labels": labels, "oracle's tile": sizes.oracle_tile, "base": sizes.forward(plan.rows, plan.tokens)}
    return {
        **({} if plan.stored_labels else {"labelling": labelling}),
        "recording": {
            "labels, and the most of later ones": 2 * labels,
            "recorded states": recorded,
            "evicting cache": sizes.cache(sizes.largest),
            "base": sizes.forward(plan.rows, 1),
        },
        "learning": {"recorded states, twice": 2 * recorded, "gates": sizes.state_gates},
    }


def stream_phases(sizes: Shapes) -> Phases:
    """Counts one pass of the base; every layer's gates keep what their backward pass needs."""
    plan = sizes.plan
    times = plan.cuts * plan.rows / (plan.rows + 1) if sizes.at_cuts else 1
    return {
        "reading": {
            "labels": sizes.labels(
                sizes.heads if plan.along == "golden" or plan.stored_labels else sizes.layout.num_heads
            ),
            "oracle's tile": sizes.oracle_tile,
            "gates": round(sizes.gate_bytes * plan.rows * sizes.layers * plan.tokens * times),
            "regret over all pairs": sizes.all_pairs,
            "base": sizes.forward(plan.rows, 1),
        }
    }


def soft_phases(sizes: Shapes) -> Phases:
    """Gradients pass through the frozen base; then logits of teacher and student, and three float32 copies for the loss."""
    plan, layout, texts = sizes.plan, sizes.layout, sizes.plan.rows * sizes.plan.tokens
    base = texts * sizes.base_bytes
    if plan.recompute:
        base = base / layout.num_layers + texts * sizes.number * layout.hidden_size * layout.num_layers
    return {
        "learning": {
            "activations of the base" + (", layers again" if plan.recompute else ""): round(base),
            "gates": round(sizes.gate_bytes * texts * (1 if plan.recompute else sizes.layers)),
            "logits": texts * layout.vocab_size * (2 * sizes.number + 3 * 4),
            "tile of attention": sizes.tile,
        }
    }


def probe_phases(sizes: Shapes) -> Phases:
    """Counts what responses attend to, per query head and moment, and the full cache that the probe reads."""
    plan = sizes.plan
    targets = 4 * plan.rows * sizes.layout.num_query_heads * sizes.layers * plan.tokens * (plan.cuts + 1)
    base = sizes.forward(plan.rows, 1)
    return {
        "reading": {"targets": targets, "oracle's tile": sizes.oracle_tile, "base": base},
        "learning": {
            "targets, and what the probe attends to": 2 * targets,
            "full cache": sizes.cache(plan.tokens, columns=False),
            "base": base,
        },
    }


def grpo_phases(sizes: Shapes) -> Phases:
    """Traces are sampled, their costs found, then learned from; a draw is a slot, a token and a mask of 17 bytes in all."""
    plan, draws, features = sizes.plan, 17 * sizes.states, 4 * sizes.states * sizes.features
    return {
        "sampling": {
            "features of slots, twice": 2 * features,
            "draws": draws,
            "evicting cache": sizes.cache(sizes.largest),
            "base": sizes.forward(plan.rows, plan.tokens),
        },
        "costs and credit": {
            "features of slots": features,
            "draws": draws,
            "logits of traces and full caches": 2 * plan.rows * plan.tokens * sizes.layout.vocab_size * sizes.number,
            "credit": 2 * 4 * plan.rows * sizes.heads * plan.tokens,
            "base": sizes.forward(-(-plan.rows // plan.group), plan.tokens),
        },
        "learning": {"features of slots, twice": 2 * features, "draws": 3 * draws, "gates": sizes.state_gates},
    }


PHASES = {
    "replay": replay_phases, "stream": stream_phases, "soft": soft_phases, "probe": probe_phases, "grpo": grpo_phases,
}  # fmt: skip
