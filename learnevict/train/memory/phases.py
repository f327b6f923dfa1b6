"""Bytes that a process holds while gates learn, by mode: the formulas of learnevict.train.memory.estimate.

Letters are those of the package; s is the bytes of a number of the base, p the event period, M = ceil(T / p) label blocks, E
events of a text after which something goes, N slots per head at an event, in the judge's inputs per slot. What is not of the
base is float32, 4 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from learnevict.errors import UsageError
from learnevict.infer.model.fingerprint import layout_of
from learnevict.infer.model.supported import evicting_layers
from learnevict.parts.learned import Learner, SlotScorer
from learnevict.policy import Gate

TILE = 128
"""Queries that attend at a time where no [T, T] may be held."""
Phases = dict[str, dict[str, int]]
"""What is held at the same time in each part of a step, beside weights: {phase: {what: bytes}}."""


@dataclass(frozen=True)
class RunPlan:
    """A run.

    Attributes:
        mode: how the gates learn: replay, stream, soft, probe or grpo.
        tokens: of a text, T.
        rows: texts, or for grpo traces, that a process reads at a time, B.
        period: tokens between events, p.
        budgets: smallest and largest.
        steps: of the optimizer.
        processes: that share the batch; one GPU each.
        group: traces of one text, for grpo.
        cuts: events per text at which slots are ranked, for stream, or moments at which a probe is asked.
        stored_labels: labels are read, not made.
        golden: for stream, texts are read under golden eviction.
        objective, pairs: for stream, as of StreamConfig.
        recompute: for soft, decoder layers are computed again in the backward pass.
        settings: of the gate, for the method's `build`.
        dtype: of the base; None: the one its configuration names.
    """

    mode: str
    tokens: int
    rows: int = 1
    period: int = 128
    budgets: tuple[int, int] = (512, 4096)
    steps: int = 1000
    processes: int = 1
    group: int = 8
    cuts: int = 4
    stored_labels: bool = False
    golden: bool = False
    objective: str = ""
    pairs: int = 0
    recompute: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if min(self.tokens, self.rows, self.period, self.steps, self.processes, self.group) < 1:
            raise UsageError(f"an estimate needs at least 1 token, row, step, process and trace, not {self}")
        if self.mode not in LEARNING:
            raise UsageError(f"mode {self.mode!r} is unknown; choose {', '.join(LEARNING)}")


class Shapes:
    """Sizes that the formulas share.

    Args:
        config: of the base.
        gate: of these shapes; may stand on the meta device.
        plan: of the run.
        held: bytes for the backward pass in one layer, see learnevict.train.memory.saved_activations.
    """

    def __init__(self, config: PreTrainedConfig, gate: Gate, plan: RunPlan, held: float = 0.0) -> None:
        text = config.get_text_config(decoder=True)
        self.plan, self.gate, self.layout = plan, gate, layout_of(config)
        kind = plan.dtype or getattr(text, "dtype", None) or torch.float32
        self.number = torch.empty(0, dtype=kind).element_size()
        self.layers = len(evicting_layers(DynamicCache(config=text).layers))
        self.wide = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
        self.held = held

    @property
    def heads(self) -> int:
        """Heads that evict, of all layers."""
        return self.layers * self.layout.num_heads

    def labels(self, layers: int | None = None) -> int:
        """Bytes of block labels, 4 B L H T M (oracle.future_attention)."""
        plan = self.plan
        heads = self.heads if layers is None else layers * self.layout.num_heads
        return 4 * plan.rows * heads * plan.tokens * -(-plan.tokens // plan.period)

    def tile(self) -> int:
        """Bytes of the oracle's two buffers, 8 G min(128, p) T, and of one head's keys, 4 T d."""
        layout, plan = self.layout, self.plan
        group = layout.num_query_heads // layout.num_heads
        return 4 * plan.tokens * (2 * group * min(TILE, plan.period) + layout.head_dim)

    def cache(self, slots: int, notes: bool = True) -> int:
        """Bytes of keys and values, s B L H slots (d + dv), and of what the gate notes with each slot."""
        layout = self.layout
        ledger = 4 * sum(math.prod(column.shape) for column in self.gate.columns) if notes else 0
        return self.plan.rows * self.heads * slots * (self.number * (layout.head_dim + layout.value_dim) + ledger)

    def forward(self, rows: int, logits: int) -> int:
        """Bytes that one pass without gradient needs in its widest layer, and for logits of so many tokens of each row.

        Residual, normed input, queries, keys, values and output; the MLP's three products; a tile of attention, 4 Hq 128 T
        with its probabilities.
        """
        layout, tokens = self.layout, self.plan.tokens
        attention = 2 * layout.hidden_size + 2 * layout.num_query_heads * layout.head_dim
        attention += layout.num_heads * (layout.head_dim + layout.value_dim)
        widest = rows * tokens * self.number * max(attention, 2 * layout.hidden_size + 3 * self.wide)
        tile = 2 * 4 * rows * layout.num_query_heads * min(TILE, tokens) * tokens
        return widest + tile + rows * logits * layout.vocab_size * self.number

    def states(self) -> int:
        """Slots of all heads, rows and events of a recorded run, B L H E N, at the budget where they are most."""
        plan = self.plan
        low, high = (min(max(budget, 1), plan.tokens) for budget in plan.budgets)
        most = min(max((plan.tokens - plan.period) // 2, low), high)

        def recorded(budget: int) -> int:
            return max(plan.tokens // plan.period - budget // plan.period, 0) * (budget + plan.period)

        return plan.rows * self.heads * max(recorded(budget) for budget in (low, most, high))

    @property
    def at_cuts(self) -> bool:
        """Whether slots are ranked at events, and not tokens as they are written."""
        return isinstance(self.gate, Learner) and self.gate.at_cuts

    @property
    def inputs(self) -> int:
        """The judge's inputs per slot; 0 for gates that are none."""
        return self.gate.num_features if isinstance(self.gate, SlotScorer) else 0

    @property
    def judged(self) -> int:
        """Bytes that the backward pass of judges needs, of all recorded states."""
        return round(self.held * self.states() / self.layout.num_heads)

    def all_pairs(self) -> int:
        """Bytes of the expected regret over all pairs of slots, 5 B H N^2 for every cut and layer.

        N is the latest of the rows' cuts: on average B / (B + 1) of the text, its square B / (B + 2) of the text's.
        """
        plan, gate = self.plan, self.gate
        objective = plan.objective or (gate.objective if isinstance(gate, Learner) else "")
        if objective != "regret" or plan.pairs:
            return 0
        slots = plan.cuts * plan.rows / (plan.rows + 2) if self.at_cuts else 1
        return round(5 * plan.rows * self.heads * slots * plan.tokens**2)


def replay_phases(shapes: Shapes) -> Phases:
    """Labels are made, a run is recorded, and its states are learned from; recorded parts are copied once to one tensor."""
    plan, labels, slots = shapes.plan, shapes.labels(), shapes.states()
    recorded = slots * (4 * shapes.inputs + 5)
    making = {"labels": labels, "oracle's tile": shapes.tile(), "base": shapes.forward(plan.rows, plan.tokens)}
    held = min(plan.budgets[1] + plan.period, plan.tokens)
    return {
        **({} if plan.stored_labels else {"labelling": making}),
        "recording": {
            "labels, and the most of later ones": 2 * labels,
            "recorded states": recorded,
            "evicting cache": shapes.cache(held),
            "base": shapes.forward(plan.rows, 1),
        },
        "learning": {"recorded states, twice": 2 * recorded, "judge": shapes.judged},
    }


def stream_phases(shapes: Shapes) -> Phases:
    """One pass; every layer's gates keep what their backward pass needs."""
    plan = shapes.plan
    times = plan.cuts * plan.rows / (plan.rows + 1) if shapes.at_cuts else 1
    gates = round(shapes.held * plan.rows * shapes.layers * plan.tokens * times)
    labels = shapes.labels() if plan.golden or plan.stored_labels else shapes.labels(layers=1)
    return {
        "reading": {
            "labels": labels,
            "oracle's tile": shapes.tile(),
            "gates": gates,
            "regret over all pairs": shapes.all_pairs(),
            "base": shapes.forward(plan.rows, 1),
        }
    }


def soft_phases(shapes: Shapes) -> Phases:
    """Gradient through the frozen base, whose linear maps keep their inputs all the same.

    Per layer and token norms keep 16 E bytes in float32 and hand on s 2 E; attention keeps s 4 (Hq + H) d, the MLP s 4 I.
    Then logits of teacher and student, and three float32 copies for the loss.
    """
    plan, layout, number = shapes.plan, shapes.layout, shapes.number
    texts = plan.rows * plan.tokens
    wide = 2 * layout.hidden_size + 4 * (layout.num_query_heads + layout.num_heads) * layout.head_dim + 4 * shapes.wide
    layer = texts * (16 * layout.hidden_size + number * wide)
    between = texts * number * layout.hidden_size
    layers = layout.num_layers * between + layer if plan.recompute else layout.num_layers * layer
    gates = round(shapes.held * texts * (1 if plan.recompute else shapes.layers))
    return {
        "learning": {
            "activations of the base" + (", layers again" if plan.recompute else ""): layers,
            "gates": gates,
            "logits": texts * layout.vocab_size * (2 * number + 3 * 4),
            "tile of attention": 2 * 4 * plan.rows * layout.num_query_heads * min(TILE, plan.tokens) * plan.tokens,
        }
    }


def probe_phases(shapes: Shapes) -> Phases:
    """What responses attend to, per query head and moment; the full cache that the probe is asked about."""
    plan, layout = shapes.plan, shapes.layout
    moments = plan.cuts + 1
    wanted = 4 * plan.rows * layout.num_query_heads * shapes.layers * plan.tokens * moments
    return {
        "reading": {
            "answers": wanted,
            "oracle's tile": shapes.tile(),
            "base": shapes.forward(plan.rows, 1),
        },
        "learning": {
            "answers, of the text and of the probe": 2 * wanted,
            "full cache": shapes.cache(plan.tokens, notes=False),
            "base": shapes.forward(plan.rows, 1),
        },
    }


def grpo_phases(shapes: Shapes) -> Phases:
    """Traces are sampled and paid, then learned from. A draw names its slot, its token and whether it could be: 17 bytes."""
    plan, layout = shapes.plan, shapes.layout
    slots, texts = shapes.states(), -(-plan.rows // plan.group)
    features = 4 * slots * shapes.inputs
    held = min(plan.budgets[1] + plan.period, plan.tokens)
    logits = 2 * plan.rows * plan.tokens * layout.vocab_size * shapes.number
    blame = 4 * plan.rows * shapes.heads * plan.tokens
    return {
        "sampling": {
            "judge's inputs, twice": 2 * features,
            "draws": 17 * slots,
            "evicting cache": shapes.cache(held),
            "base": shapes.forward(plan.rows, plan.tokens),
        },
        "paying": {
            "judge's inputs": features,
            "draws": 17 * slots,
            "logits of traces and full caches": logits,
            "blame": 2 * blame,
            "base": shapes.forward(texts, plan.tokens),
        },
        "learning": {
            "judge's inputs, twice": 2 * features,
            "draws": 3 * 17 * slots,
            "judge": shapes.judged,
        },
    }


LEARNING = {
    "replay": replay_phases, "stream": stream_phases, "soft": soft_phases, "probe": probe_phases, "grpo": grpo_phases,
}  # fmt: skip
