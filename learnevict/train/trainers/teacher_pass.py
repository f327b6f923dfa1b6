"""One batch on its way through the layers of the frozen base: what each layer receives, with the oracle's labels of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from learnevict.errors import UsageError
from learnevict.infer.model.supported import evicting_layers, layout_of
from learnevict.infer.teacher_forcing import replay
from learnevict.ops.distributed import highest
from learnevict.oracle import (
    GOLDEN,
    PRESETS,
    Received,
    Reducers,
    Repeating,
    full_trace,
    golden,
    golden_labels,
    reconstruct,
    target,
)
from learnevict.oracle.collect import layer_labels
from learnevict.parts.learned import Learner
from learnevict.policy import Guard
from learnevict.signals import Attention, Trace
from learnevict.train.batch_random import BatchRandom, check_budgets
from learnevict.train.losses import objectives, regret
from learnevict.train.run.flags import check_fields, flag
from learnevict.train.trainers.layer_batch import LayerBatch, UnpaddedPositions

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "bce": objectives.cross_entropy,
    "mse": objectives.log_error,
    "pairwise": objectives.pairwise_on_logs,
    "regret": regret.expected_regret,
}
"""Losses by name, of scores, targets and candidates [B, H, N]."""
PAIRED = ("pairwise", "regret")
"""Objectives that take `pairs` and `seeds`."""


@dataclass(frozen=True)
class StreamConfig:
    """The settings of mode "stream"."""

    target: Literal["reconstruction", "future"] = flag(
        "future",
        "what labels are: reconstruction (attention of the text's repetition, KVzip; needs a model that can repeat a text) or "
        "future (of the text's own later blocks)",
    )
    oracle: str = flag(
        "", "how attention becomes a label, a name of learnevict.oracle.PRESETS; otherwise the gate's own"
    )
    objective: str = flag("", f"one of {', '.join(OBJECTIVES)}; otherwise the gate's own")
    period: int = flag(16, "tokens between events, and queries per label block")
    along: Literal["full", "golden"] = flag(
        "full", "read the texts with a full cache, or under golden eviction, so that states are those of small caches"
    )
    budgets: tuple[int, int] = flag(
        (36, 160),
        "smallest and largest budget, drawn per batch log-uniformly: of golden eviction, and shown to rankers",
    )
    cuts: int = flag(4, "events per text, for gates that rank slots")
    horizon: int | None = flag(None, "label blocks that count as the future; otherwise to the end of the text", least=1)
    pairs: int = flag(0, "drawn per text and head, for objectives over pairs; 0: all pairs, or the objective's default")
    sinks: int = flag(4, "first tokens that stay, and are no candidates", least=0)
    recent: int = flag(8, "last tokens that stay, and are no candidates", least=0)
    closed_form: bool = flag(False, "fit linear surrogates to all documents at once before the first step")
    chunk: int = flag(2048, "of reconstruction, see learnevict.oracle.Repeating")
    repeat: str = flag(
        "auto",
        "of reconstruction: what the model is told before it reads a text again; auto: an English request, of a model with a "
        "chat template; none: nothing",
    )
    repeat_ids: tuple[int, ...] = flag((), "the same as token ids; otherwise those of the words")
    tail: int = flag(0, "of reconstruction, see learnevict.oracle.Repeating")
    store: bool = flag(
        True,
        "if documents are read more than once, and the gate learns from hidden states alone: run the model over them once, "
        "before the first step, and keep hidden states (float16) and labels in output_dir",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_budgets(self.budgets, self.guard.reserved(self.period) + 1)
        if self.target not in ("reconstruction", "future") or self.along not in ("full", "golden"):
            raise UsageError(
                f"target {self.target!r} along {self.along!r} is unknown; choose reconstruction or future, full or golden"
            )
        if self.oracle and self.oracle not in PRESETS:
            raise UsageError(f"oracle {self.oracle!r} is unknown; choose {', '.join(sorted(PRESETS))}")
        if self.objective and self.objective not in OBJECTIVES:
            raise UsageError(f"objective {self.objective!r} is unknown; choose {', '.join(sorted(OBJECTIVES))}")

    @property
    def shortest(self) -> int:
        """The tokens that a document needs at least."""
        return self.guard.reserved(self.period) + 2 * self.period

    @property
    def guard(self) -> Guard:
        """The tokens that are never evicted."""
        return Guard(self.sinks, self.recent)

    @property
    def repeating(self) -> Repeating:
        """The settings of a repetition."""
        return Repeating(self.chunk, self.sinks, self.repeat_ids, self.tail)

    def reduce(self, gate: Learner) -> Reducers:
        """Returns the target's reducers: the gate's own, or golden's for the future of a gate whose own need a repetition.

        Raises:
            UsageError: a reconstruction for a gate whose oracle looks at the future.
        """
        name = self.oracle or gate.oracle
        own = PRESETS[name]
        if self.target == "reconstruction" and not own.needs_queries:
            raise UsageError(f"oracle {name!r} looks at a text's own future; give target='future', or --oracle kvzip")
        return GOLDEN if own.needs_queries and self.target == "future" else own

    def loss(self, gate: Learner, seeds: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Returns the objective with its options; `seeds` int64 [B] are the random keys of its draws."""
        name = self.objective or gate.objective
        options: dict[str, Any] = {"pairs": self.pairs} if self.pairs and name in PAIRED else {}
        if name in PAIRED:
            options["seeds"] = seeds
        return partial(OBJECTIVES[name], **options)


class TeacherPass:
    """Reads a batch with the frozen base once, or as often as labels and states need.

    Args:
        gate: that learns; its oracle says how labels are reduced.
        inputs: as of `stream_loss`.
        draws: of the batch.

    Raises:
        UsageError: stored labels are not those of the target.
    """

    def __init__(self, config: StreamConfig, gate: Learner, inputs: dict[str, Any], draws: BatchRandom) -> None:
        self.config, self.reduce = config, config.reduce(gate)
        self.ids, self.mask = inputs["input_ids"], inputs["attention_mask"]
        self.states: Tensor | None = inputs.get("stored_states")
        self.stored: list[Tensor | None] | None = None
        if inputs.get("stored_labels") is not None:
            repeated = config.target == "reconstruction" and config.along == "full"
            self.stored = [part.squeeze(-1) if repeated else part for part in inputs["stored_labels"]]
            if self.reduce != GOLDEN and config.along == "full" and not repeated:
                raise UsageError("stored labels are golden ones, but this gate learns others; train it without them")
        self.valid = self.mask.bool()
        self.positions = UnpaddedPositions.of(self.ids, self.valid)
        longest = highest(self.ids.shape[1], self.ids.device) - config.period - 1
        self.budget = max(min(draws.budget(config.budgets), longest), config.budgets[0])

    @torch.no_grad()
    def read(self, base: PreTrainedModel, visit: Callable[[LayerBatch], None]) -> None:
        """Calls `visit` with the batch of every evicting layer, in order."""
        config = self.config
        wanted = self.reduce == GOLDEN or config.target == "reconstruction"
        trace, labels = full_trace(base, self.ids), self.stored if wanted else None
        if config.along == "golden":
            trace, labels = self._golden_trace(base)

        def show(layer: int, received: Received, found: Tensor) -> None:
            if config.target == "future":
                found = target(found, self.reduce, received.key.shape[1], window=config.horizon)
            expiry = None if config.along == "full" else trace.expiry[layer]
            visit(LayerBatch.of(layer, self.positions, received, found, expiry))

        def see(layer: int, received: Received) -> None:
            if labels is None:
                found = layer_labels(base, layer, received, block=config.period, valid=self.valid, reduce=self.reduce)
            else:
                found = labels[layer]
            assert found is not None
            show(layer, received, found)

        if self.states is not None and labels is not None:
            for layer in evicting_layers(DynamicCache(config=base.config.get_text_config(decoder=True)).layers):
                see(layer, received_states(base.config, self.states[layer]))
        elif config.target == "reconstruction" and labels is None:
            reconstruct(base, self.ids, self.mask, how=config.repeating, reduce=self.reduce, visit=show)
        else:
            replay(base, self.ids, trace, self.mask, observe=see, logits_to_keep=1)

    def _golden_trace(self, base: PreTrainedModel) -> tuple[Trace, list[Tensor | None]]:
        """Returns a golden trace for the budget, and the full cache's labels of the target."""
        config = self.config
        labels = self.stored or golden_labels(base, self.ids, self.mask, block=config.period)[0]
        trace = golden(labels, budget=self.budget, block=config.period, guard=config.guard, valid=self.valid)
        if config.target == "reconstruction":
            labels = reconstruct(base, self.ids, self.mask, how=config.repeating, reduce=self.reduce)
        elif self.reduce != GOLDEN:
            labels = golden_labels(base, self.ids, self.mask, block=config.period, reduce=self.reduce)[0]
        return trace, labels


def received_states(config: PreTrainedConfig, hidden: Tensor) -> Received:
    """Returns what is stored of what a layer received: hidden states [B, T, E]; queries, keys and values have width 0."""
    layout = layout_of(config)
    heads = [
        hidden.new_zeros(hidden.shape[0], number, hidden.shape[1], 0)
        for number in (layout.num_query_heads, layout.num_heads)
    ]
    return Received(heads[0], heads[1], heads[1], hidden, Attention(layout.head_dim**-0.5))
