"""Trainer for gates that need no gradient of the base: one frozen pass a batch, layer by layer a lesson, nothing kept.

What a layer's attention receives, and the oracle's verdict on it, go into the loss of that layer's gates at once and are
dropped: no hidden state is stored. All of it happens inside one `model(study, ...)`, so DDP sees one forward per step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.errors import DataError, GateError, UsageError
from learnevict.infer.replay import replay
from learnevict.ops.hashing import hashed
from learnevict.ops.processes import highest
from learnevict.oracle import (
    GOLDEN,
    PRESETS,
    Received,
    Reducers,
    Repeating,
    full_trace,
    future_attention,
    golden,
    golden_labels,
    receiving,
    reconstruct,
    target,
)
from learnevict.oracle.reconstruct import target_inputs
from learnevict.parts.gates import Learner
from learnevict.policy import Guard
from learnevict.train import objectives, regret
from learnevict.train.draws import Draws
from learnevict.train.lessons import Lesson, Times
from learnevict.train.trainer import GateTrainer

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "bce": objectives.cross_entropy,
    "mse": objectives.log_error,
    "pairwise": objectives.pairwise_on_logs,
    "regret": regret.expected_regret,
    "rloo": regret.rloo,
}
"""By name: from scores, targets and candidates [B, H, N] to a loss. Those in SAMPLED take `pairs`."""
SAMPLED = ("pairwise", "regret")


@dataclass(frozen=True)
class StreamConfig:
    """What a streamed gate learns from.

    Attributes:
        target: "reconstruction" (attention of the text's repetition, KVzip) or "future" (of the text's own later blocks); the
            former needs a model that can repeat a text.
        objective: a name of OBJECTIVES; "": the gate's own.
        period: tokens between events, and queries per label block.
        along: read the texts with a "full" cache, or under "golden" eviction, so that states are those of small caches.
        budgets: smallest and largest budget, drawn per batch log-uniformly: of golden eviction, and shown to rankers.
        cuts: events per text, for gates that rank slots.
        horizon: label blocks that count as the future; None: to the end of the text.
        pairs: drawn per text and head, for objectives over pairs; 0: all pairs, or the objective's default.
        sinks, recent: guards; what they protect is no candidate.
        chunk, repeat, tail: of "reconstruction", see oracle.Repeating; `repeat` are the token ids of its prompt.
    """

    target: Literal["reconstruction", "future"] = "future"
    objective: str = ""
    period: int = 16
    along: Literal["full", "golden"] = "full"
    budgets: tuple[int, int] = (36, 160)
    cuts: int = 4
    horizon: int | None = None
    pairs: int = 0
    sinks: int = 4
    recent: int = 8
    chunk: int = 2048
    repeat: tuple[int, ...] = ()
    tail: int = 0

    def __post_init__(self) -> None:
        if self.target not in ("reconstruction", "future") or self.along not in ("full", "golden"):
            raise UsageError(
                f"target {self.target!r} along {self.along!r} is unknown; choose reconstruction or future, full or golden"
            )
        if self.objective and self.objective not in OBJECTIVES:
            raise UsageError(f"objective {self.objective!r} is unknown; choose {', '.join(sorted(OBJECTIVES))}")
        if self.budgets[0] <= self.guard.reserved(self.period):
            raise UsageError(
                f"training budgets of {self.budgets[0]} to {self.budgets[1]} cannot hold the guards and a fresh block of "
                f"{self.period}; the smallest that works is {self.guard.reserved(self.period) + 1}"
            )

    @property
    def guard(self) -> Guard:
        """What is never evicted."""
        return Guard(self.sinks, self.recent)

    @property
    def repeating(self) -> Repeating:
        """How texts are repeated."""
        return Repeating(self.chunk, self.sinks, self.repeat, self.tail)

    def reduce(self, gate: Learner) -> Reducers:
        """The target's reducers: the gate's own, or golden's for the future of one whose own are those of a repetition.

        Raises:
            UsageError: a reconstruction for a gate whose oracle looks at the future.
        """
        own = PRESETS[gate.oracle]
        if self.target == "reconstruction" and not own.needs_queries:
            raise UsageError(f"a gate of oracle {gate.oracle!r} learns from the future; give target='future'")
        return GOLDEN if own.needs_queries and self.target == "future" else own

    def loss(self, gate: Learner, words: Tensor) -> Objective:
        """The objective, with its options; `words` int64 [B] are what its draws come from."""
        name = self.objective or gate.objective
        options: dict[str, Any] = {"pairs": self.pairs} if self.pairs and name in SAMPLED else {}
        if name in (*SAMPLED, "rloo"):
            options["words"] = words
        return partial(OBJECTIVES[name], **options)


class StreamTrainer(GateTrainer):
    """Mode "stream": surrogates and rankers learn from one pass of the frozen base.

    Args:
        stream: what to learn from.

    Raises:
        GateError: a gate that keeps notes by watching attention, which a pass without eviction does not show it.
        DataError: while training, a batch of texts too short to learn from.
    """

    def __init__(self, *args: Any, stream: StreamConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stream = stream
        if self.gate.observes or self.gate.refreshes:
            raise GateError(
                f"{type(self.gate).__name__} watches attention, so a streamed pass cannot teach it; use mode replay"
            )
        stream.reduce(self.gate)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over layers of the objective, with the regret of the gate's rankings noted beside."""
        loss, measured = model(study, self.base, inputs, self.stream, self.draws(len(inputs["input_ids"])))
        self.note(regret=measured)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss


def study(
    gate: Learner, base: PreTrainedModel, inputs: dict[str, Any], config: StreamConfig, draws: Draws | None = None
) -> tuple[Tensor, Tensor]:
    """Read a batch once and compare what the gate says with the oracle.

    Args:
        gate: surrogates or rankers of all layers.
        base: frozen.
        inputs: input_ids and attention_mask [B, T]; golden labels [L, B, H, T, M] of the period as "stored_labels", or None.
        config: what to learn from.
        draws: of the batch; None: from the global generator.

    Returns:
        loss, with gradient if it is enabled, and all-budget regret of the gate's rankings (1 at best).

    Raises:
        DataError: no text of the batch has a candidate with a future.
    """
    ids = inputs["input_ids"]
    course = _Course(gate, inputs, config, draws or Draws.anew(len(ids), ids.device))
    course.read(base)
    if not course.losses:
        raise DataError(
            f"a batch of texts of at most {ids.shape[1]} tokens, from which nothing would be evicted; leave "
            f"out texts shorter than {config.guard.reserved(config.period) + 2 * config.period} tokens"
        )
    return torch.stack(course.losses).mean(), torch.stack(course.regrets).mean()


class _Course:
    """One batch on its way through the layers."""

    def __init__(self, gate: Learner, inputs: dict[str, Any], config: StreamConfig, draws: Draws) -> None:
        self.gate, self.config, self.draws = gate, config, draws
        self.ids, self.mask = inputs["input_ids"], inputs["attention_mask"]
        self.stored: Tensor | None = inputs.get("stored_labels")
        self.valid = self.mask.bool()
        self.times = Times.of(self.ids, self.valid)
        self.reduce = config.reduce(gate)
        self.learning = torch.is_grad_enabled()
        self.expiry: Tensor | None = None
        self.losses: list[Tensor] = []
        self.regrets: list[Tensor] = []
        longest = highest(self.ids.shape[1], self.ids.device) - config.period - 1
        self.budget = max(min(draws.budget(config.budgets), longest), config.budgets[0])
        self.cuts = [
            self.times.draw_cut(config.guard, config.period, draws.per_row(cut))
            for cut in range(config.cuts if gate.at_cuts else 0)
        ]
        if self.stored is not None and self.reduce != GOLDEN and config.along == "full":
            raise UsageError(
                f"stored labels are golden ones, but this gate learns {gate.oracle!r}; train it without them"
            )

    @torch.no_grad()
    def read(self, base: PreTrainedModel) -> None:
        """The pass, or the passes that labels and states need."""
        config = self.config
        repeated = config.target == "reconstruction"
        if config.along == "full" and repeated:
            reconstruct(base, self.ids, self.mask, how=config.repeating, reduce=self.reduce, visit=self.teach)
            return
        labels: list[Tensor | None] | None = None
        trace = full_trace(base, self.ids)
        if config.along == "golden":
            wanted = self._golden(base)
            trace = golden(wanted, budget=self.budget, block=config.period, guard=config.guard, valid=self.valid)
            self.expiry = trace.expiry
            labels = wanted if self.reduce == GOLDEN else None
            if repeated:
                labels = reconstruct(base, self.ids, self.mask, how=config.repeating, reduce=self.reduce)
            elif labels is None:
                labels = golden_labels(base, self.ids, self.mask, block=config.period, reduce=self.reduce)[0]
        elif self.stored is not None and self.reduce == GOLDEN:
            labels = list(self.stored)

        def see(layer: int, received: Received) -> None:
            found = self._label(base, layer, received) if labels is None else labels[layer]
            assert found is not None
            self.teach(layer, received, found)

        replay(base, self.ids, trace, self.mask, observe=receiving(see), logits_to_keep=1)

    def teach(self, layer: int, received: Received, labels: Tensor) -> None:
        """Add the loss of one layer; labels [B, heads, T], or [B, heads, T, M] of blocks."""
        gate, config = self.gate, self.config
        expiry = None if self.expiry is None else self.expiry[layer]
        lesson = Lesson.of(layer, self.times, received, expiry)
        written = lesson.written(gate.columns)
        gate.calibrate(written)
        if labels.ndim == 4:
            labels = target(labels, self.reduce, received.key.shape[1], window=config.horizon)
        with torch.set_grad_enabled(self.learning):
            if gate.at_cuts:
                self._teach_cuts(lesson, gate.write(written), labels)
            else:
                self._teach_tokens(gate.judged(written), labels)

    def _teach_tokens(self, scores: Tensor, labels: Tensor) -> None:
        """All tokens but sinks. Labels of blocks: what those after a token's own want, so the last block teaches nothing."""
        times, period = self.times, self.config.period
        own, last = times.rank // period, (times.length.unsqueeze(-1) - 1) // period
        there = (times.rank < times.length.unsqueeze(-1)) & (times.rank >= self.config.sinks)
        if labels.ndim == 4:
            there &= own < last
        self._compare(scores, times.verdict(labels, own + 1), there.unsqueeze(1))

    def _teach_cuts(self, lesson: Lesson, written: dict[str, Tensor], labels: Tensor) -> None:
        """All slots at some events but protected ones."""
        gate, config, times = self.gate, self.config, self.times
        notes = lesson.notes(written, gate.columns)
        budget = torch.full_like(times.length, self.budget).int()
        for seen, possible in self.cuts:
            signals = lesson.cut(seen, config.period, budget, notes, gate.window)
            candidates = signals.occupied & ~config.guard.protect(signals) & possible.view(-1, 1, 1)
            wanted = times.verdict(labels, seen.unsqueeze(-1) // config.period)
            self._compare(gate.judged(signals), wanted[:, :, : candidates.shape[-1]], candidates)

    def _compare(self, scores: Tensor, targets: Tensor, candidates: Tensor) -> None:
        """Scores, targets and candidates [B, H, N] in row time."""
        candidates = candidates.expand_as(scores)
        if not highest(int(candidates.any()), candidates.device):  # of all processes: they go on together
            return
        words = hashed(self.draws.rows, len(self.losses))
        self.losses.append(self.config.loss(self.gate, words)(scores, targets, candidates))
        self.regrets.append(regret.regret(scores.detach(), targets, candidates))

    def _golden(self, base: PreTrainedModel) -> list[Tensor | None]:
        """Golden labels, stored or made."""
        if self.stored is not None:
            return list(self.stored)
        return golden_labels(base, self.ids, self.mask, block=self.config.period)[0]

    def _label(self, base: PreTrainedModel, layer: int, received: Received) -> Tensor:
        """Block labels of one layer, [B, heads, T, M]."""
        inputs = target_inputs(base, self.reduce, layer, received)
        period, query, key = self.config.period, received.query, received.key
        return future_attention(query, key, block=period, valid=self.valid, reduce=self.reduce, **inputs)
