"""Trainer for gates that need no gradient of the base: one frozen pass a batch, layer by layer a lesson, nothing kept.

What a layer's attention receives, and the oracle's verdict on it, go into the loss of that layer's gates at once and are
dropped: no hidden state is stored. All of it happens inside one `model(study, ...)`, so DDP sees one forward per step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from learnevict.errors import DataError, GateError, UsageError
from learnevict.ops.distributed import highest
from learnevict.ops.random import hashed
from learnevict.parts.learned import Learner
from learnevict.train.batch_random import Draws
from learnevict.train.losses import regret
from learnevict.train.trainer import GateTrainer
from learnevict.train.trainers.closed_form import check_linear, fit_linear
from learnevict.train.trainers.layer_batch import LayerBatch
from learnevict.train.trainers.teacher_pass import StreamConfig as StreamConfig
from learnevict.train.trainers.teacher_pass import TeacherPass


class StreamTrainer(GateTrainer):
    """Mode "stream": surrogates and rankers learn from one pass of the frozen base.

    Args:
        stream: what to learn from.

    Raises:
        GateError: a gate that keeps notes by watching attention, which a pass without eviction does not show it; or one
            without the closed form that is asked for.
        UsageError: a closed form of documents without end.
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
        if stream.closed_form:
            check_linear(self.gates)
            if isinstance(self.train_dataset, IterableDataset):
                raise UsageError("a closed form takes all documents at once; drop --closed_form or --streaming")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; a run that begins may start from the closed form."""
        if self.stream.closed_form and not resume_from_checkpoint:
            batches: Any = map(self._prepare_inputs, self.get_train_dataloader())
            fit_linear(self.base, self.gates, batches, self.stream)
        return super().train(resume_from_checkpoint, *args, **kwargs)

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
    teacher = _Teacher(
        gate, TeacherPass(config, config.reduce(gate), inputs, draws or Draws.anew(len(ids), ids.device))
    )
    teacher.trainable_method.read(base, teacher.teach)
    if not teacher.losses:
        raise DataError(
            f"a batch of texts of at most {ids.shape[1]} tokens, from which nothing would be evicted; leave "
            f"out texts shorter than {config.guard.reserved(config.period) + 2 * config.period} tokens"
        )
    return torch.stack(teacher.losses).mean(), torch.stack(teacher.regrets).mean()


class _Teacher:
    """Compares a gate with the oracle, layer by layer of a course."""

    def __init__(self, gate: Learner, course: TeacherPass) -> None:
        self.gate, self.trainable_method, self.config = gate, course, course.config
        self.learning = torch.is_grad_enabled()
        self.losses: list[Tensor] = []
        self.regrets: list[Tensor] = []
        self.cuts = [
            course.times.draw_cut(self.config.guard, self.config.period, course.draws.per_row(cut))
            for cut in range(self.config.cuts if gate.at_cuts else 0)
        ]

    def teach(self, lesson: LayerBatch, labels: Tensor) -> None:
        """Add the losses of one layer; arguments as of TeacherPass.read's `visit`."""
        gate, written = self.gate, lesson.written(self.gate.columns)
        gate.calibrate(written)
        with torch.set_grad_enabled(self.learning):
            if gate.at_cuts:
                self._teach_cuts(lesson, gate.write(written), labels)
            else:
                self._compare(gate.predictions(written), *self.trainable_method.of_tokens(labels))

    def _teach_cuts(self, lesson: LayerBatch, written: dict[str, Tensor], labels: Tensor) -> None:
        """All slots at some events but protected ones."""
        gate, config, times = self.gate, self.config, self.trainable_method.times
        notes = lesson.notes(written, gate.columns)
        budget = torch.full_like(times.length, self.trainable_method.budget).int()
        for seen, possible in self.cuts:
            signals = lesson.cut(seen, config.period, budget, notes, gate.window)
            candidates = signals.occupied & ~config.guard.protect(signals) & possible.view(-1, 1, 1)
            wanted = times.verdict(labels, seen.unsqueeze(-1) // config.period)
            self._compare(gate.predictions(signals), wanted[:, :, : candidates.shape[-1]], candidates)

    def _compare(self, scores: Tensor, targets: Tensor, candidates: Tensor) -> None:
        """Scores, targets and candidates [B, H, N] in row time."""
        candidates = candidates.expand_as(scores)
        if not highest(int(candidates.any()), candidates.device):  # of all processes: they go on together
            return
        words = hashed(self.trainable_method.draws.rows, len(self.losses))
        self.losses.append(self.config.loss(self.gate, words)(scores, targets, candidates))
        self.regrets.append(regret.regret(scores.detach(), targets, candidates))
