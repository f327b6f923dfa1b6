"""Mode "stream": gates that need no gradient of the base learn from one frozen pass per batch, layer by layer.

What a layer receives, and the oracle's labels of it, go into the loss of that layer's gates at once and are dropped. All of it
happens inside one `model(stream_loss, ...)`, so DDP sees one forward per step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from learnevict.errors import DataError, GateError, UsageError
from learnevict.hub import Gates
from learnevict.ops.distributed import highest, summed
from learnevict.ops.random import hashed
from learnevict.parts.learned import Learner, hidden_of
from learnevict.train.batch_random import BatchRandom
from learnevict.train.losses import regret
from learnevict.train.losses.objectives import LEAST
from learnevict.train.trainer import GateTrainer
from learnevict.train.trainers.layer_batch import LayerBatch
from learnevict.train.trainers.teacher_pass import StreamConfig as StreamConfig
from learnevict.train.trainers.teacher_pass import TeacherPass


class StreamTrainer(GateTrainer):
    """The trainer of mode "stream".

    Raises:
        GateError: a gate whose state is written by watching attention, which a pass without eviction does not show it; or
            one without the closed form that is asked for.
        UsageError: a closed form of documents without end.
        DataError: while training, a batch of texts too short to learn from.
    """

    config_type = StreamConfig
    stored_labels = True

    def __init__(self, *args: Any, config: StreamConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        if self.gate.observes or self.gate.refreshes:
            raise GateError(
                f"{type(self.gate).__name__} watches attention, so a streamed pass cannot train it; use mode replay"
            )
        config.reduce(self.gate)
        if config.closed_form:
            check_linear(self.gates)
            if isinstance(self.train_dataset, IterableDataset):
                raise UsageError("a closed form takes all documents at once; drop --closed_form or --streaming")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does; a run that begins may start from the closed form."""
        if self.config.closed_form and not resume_from_checkpoint:
            batches: Any = map(self._prepare_inputs, self.get_train_dataloader())
            fit_linear(self.base, self.gates, batches, self.config)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def batch_loss(self, model: Any, inputs: dict[str, Any], draws: BatchRandom) -> Tensor:
        """Returns the mean of the objective over layers, and logs the regret of the gate's rankings."""
        loss, found = model(stream_loss, self.base, inputs, self.config, draws)
        self.record(regret=found)
        return loss


def stream_loss(
    gate: Learner, base: PreTrainedModel, inputs: dict[str, Any], config: StreamConfig, draws: BatchRandom | None = None
) -> tuple[Tensor, Tensor]:
    """Reads a batch once and compares the gate's scores with the oracle's labels.

    Args:
        inputs: input_ids and attention_mask [B, T]; golden labels [L, B, H, T, M] of the period as "stored_labels", or None.
        draws: of the batch; None: from the global generator.

    Returns:
        The loss, with gradient if it is enabled, and all-budget regret of the gate's rankings (1 at best).

    Raises:
        DataError: no text of the batch has a candidate with a future.
    """
    ids = inputs["input_ids"]
    draws = draws or BatchRandom.anew(len(ids), ids.device)
    teacher = TeacherPass(config, gate, inputs, draws)
    learning = torch.is_grad_enabled()
    losses: list[Tensor] = []
    regrets: list[Tensor] = []
    events = [
        teacher.positions.draw_event(config.guard, config.period, draws.per_row(cut))
        for cut in range(config.cuts if gate.at_cuts else 0)
    ]

    def compare(scores: Tensor, targets: Tensor, candidates: Tensor) -> None:
        candidates = candidates.expand_as(scores)
        if highest(int(candidates.any()), candidates.device):  # in any process: all of them go on together
            objective = config.loss(gate, hashed(draws.rows, len(losses)))
            losses.append(objective(scores, targets, candidates))
            regrets.append(regret.regret(scores.detach(), targets, candidates))

    def visit(batch: LayerBatch) -> None:
        written = batch.written(gate.columns)
        gate.calibrate(written)
        with torch.set_grad_enabled(learning):
            if not gate.at_cuts:
                compare(gate.predictions(written), *batch.written_targets(config.period, config.sinks))
                return
            state = batch.state(gate.write(written), gate.columns)
            budget = torch.full_like(teacher.positions.length, teacher.budget).int()
            for seen, possible in events:
                signals = batch.event(seen, config.period, budget, state, gate.window)
                candidates = signals.occupied & ~config.guard.protect(signals) & possible.view(-1, 1, 1)
                targets = batch.targets(seen.unsqueeze(-1) // config.period)
                compare(gate.predictions(signals), targets[:, :, : candidates.shape[-1]], candidates)

    teacher.read(base, visit)
    if not losses:
        raise DataError(
            f"a batch of texts of at most {ids.shape[1]} tokens, from which nothing would be evicted; leave "
            f"out texts shorter than {config.shortest} tokens"
        )
    return torch.stack(losses).mean(), torch.stack(regrets).mean()


@torch.no_grad()
def fit_linear(
    base: PreTrainedModel,
    gates: Gates,
    batches: Iterable[dict[str, Any]],
    config: StreamConfig,
    *,
    strength: float = 1e-4,
) -> None:
    """Fits gates of kvzap's kind "linear" by ridge regression (arXiv 2601.07891), in place and the same in all processes.

    Per layer, with inputs h, a constant and targets y = log s, W = (sum of h h' + strength n I)^-1 sum of h y', from sums that
    one pass over the texts fills; the constant is not shrunk.

    Args:
        batches: as the trainer takes them; as many in every process.
        strength: of the penalty, per token.

    Raises:
        GateError: gates of another method or kind.
        DataError: no text long enough to learn from.
    """
    check_linear(gates)
    gate: Any = gates.gate
    layers, width, heads = gate.weight.shape
    square = torch.zeros(layers, width + 1, width + 1, dtype=torch.float64)
    cross = torch.zeros(layers, width + 1, heads, dtype=torch.float64)

    def add(batch: LayerBatch) -> None:
        targets, candidates = batch.written_targets(config.period, config.sinks)
        chosen = candidates.squeeze(1)
        inputs = hidden_of(batch.written(()), "kvzap")[chosen].double()
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], -1)
        wanted = targets.clamp_min(LEAST).log().transpose(1, 2)[chosen].double()
        square[batch.layer] += (inputs.T @ inputs).cpu()
        cross[batch.layer] += (inputs.T @ wanted).cpu()

    for inputs in batches:
        TeacherPass(config, gate, inputs, BatchRandom.anew(len(inputs["input_ids"]))).read(base, add)
    square, cross = (summed(part.to(gate.weight.device)).cpu() for part in (square, cross))
    tokens = square[:, -1, -1]
    if not bool(tokens.any()):
        raise DataError(f"no text of more than {config.period + config.sinks} tokens to learn from")
    shrunk = torch.eye(width + 1, dtype=torch.float64)
    shrunk[-1, -1] = 0
    for layer in tokens.nonzero().flatten().tolist():
        found = torch.linalg.solve(square[layer] + strength * tokens[layer] * shrunk, cross[layer])
        gate.weight[layer], gate.bias[layer] = found[:-1].to(gate.weight), found[-1].to(gate.bias)


def check_linear(gates: Gates) -> None:
    """Raises GateError if gates have no closed form: they are of another method or kind."""
    if gates.config.settings.get("kind") != "linear":
        raise GateError(
            f"a closed form fits linear surrogates, not {gates.method} {gates.config.settings}; give --method kvzap "
            "--kind linear"
        )
