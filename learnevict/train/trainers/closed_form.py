"""The linear surrogate in closed form: ridge regression on the lessons of the streamed trainer, no step size and no epochs.

KVzap (arXiv 2601.07891) fits its linear surrogate so. Per layer, with inputs h, a constant and targets y = log s,

    W = (sum of h h' + strength n I)^-1 sum of h y'

from sums that one pass over the texts fills; the constant is not shrunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.errors import DataError, GateError
from learnevict.hub import Gates
from learnevict.ops.distributed import summed
from learnevict.parts.learned import hidden_of
from learnevict.train.batch_random import Draws
from learnevict.train.losses.objectives import LEAST
from learnevict.train.trainers.layer_batch import LayerBatch
from learnevict.train.trainers.teacher_pass import StreamConfig, TeacherPass


@torch.no_grad()
def fit_linear(
    base: PreTrainedModel,
    gates: Gates,
    batches: Iterable[dict[str, Any]],
    config: StreamConfig,
    *,
    strength: float = 1e-4,
) -> None:
    """Fit gates of kvzap's kind "linear", in place and the same in all processes.

    Args:
        base: the frozen model.
        gates: with a `weight` [L, E, H] and a `bias` [L, H].
        batches: as the trainer takes them: input_ids, attention_mask and stored_labels; as many in every process.
        config: what to learn from; its objective is the squared error on logarithms.
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
    for batch in batches:
        course = TeacherPass(config, config.reduce(gate), batch, Draws.anew(len(batch["input_ids"])))

        def add(lesson: LayerBatch, labels: Tensor, course: TeacherPass = course) -> None:
            targets, candidates = course.of_tokens(labels)
            asked = candidates.squeeze(1)
            inputs = hidden_of(lesson.written(()), "kvzap")[asked].double()
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], -1)
            wanted = targets.clamp_min(LEAST).log().transpose(1, 2)[asked].double()
            square[lesson.layer] += (inputs.T @ inputs).cpu()
            cross[lesson.layer] += (inputs.T @ wanted).cpu()

        course.read(base, add)
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
    """Whether gates have a closed form.

    Raises:
        GateError: they are of another method or kind.
    """
    if gates.config.settings.get("kind") != "linear":
        raise GateError(
            f"a closed form fits linear surrogates, not {gates.method} {gates.config.settings}; give --method kvzap "
            "--kind linear"
        )
