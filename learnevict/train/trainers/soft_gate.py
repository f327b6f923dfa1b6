"""Mode "soft": gates that weigh attention learn end to end, through the frozen model.

A batch is read twice: by the plain model, without gradient, and by the model whose attention the gate weighs. The gate learns
to change nothing (distillation) while holding little (losses.capacity); the gate names its losses and their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from learnevict.config import Budget
from learnevict.errors import UsageError
from learnevict.infer.attach import Attachment, attach
from learnevict.infer.soft import layers_again
from learnevict.policy import DecayBias, Policy, Schedule, SoftGate
from learnevict.train.batch_random import BatchRandom, check_budgets
from learnevict.train.losses import capacity, objectives
from learnevict.train.run.flags import check_fields, flag
from learnevict.train.trainer import GateTrainer


@dataclass(frozen=True)
class SoftConfig:
    """The settings of mode "soft".

    Retentions know no budget, so a range of budgets makes one compromise that serves all of it. With `power` peaked attention
    finds a token through a weight of 1 %, which would cost 1 % of a slot, while eviction takes it away; at 0.2 it costs 40 %.
    """

    budgets: tuple[int, int] = flag(
        (32, 96),
        "smallest and largest budget, drawn per batch log-uniformly; equal: one budget, as in the TRIM-KV papers",
    )
    capacity: float = flag(1.0, "factor on what the gate pays for holding tokens", least=0)
    power: float = flag(1.0, "a token of weight w counts w ** power in what is held; 1 in the papers", least=0)
    compression: float = flag(
        8.0, "where evicting a share is the aim (dms), the ratio to reach: 8 keeps an eighth", least=1
    )
    ramp: float = flag(0.5, "share of training over which that ratio rises from 1", least=0, most=1)
    answers_only: bool = flag(
        False, "losses count predictions of the response only; the whole text where a document has no prompt"
    )
    recompute: bool = flag(False, "compute decoder layers again in the backward pass, for memory")

    shortest: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_fields(self)
        check_budgets(self.budgets)

    def target(self, progress: float) -> float:
        """Returns the share of tokens to evict at a point of the training: 1 - 1 / ratio, the ratio rising linearly."""
        ratio = 1 + (self.compression - 1) * min(progress / self.ramp, 1.0) if self.ramp else self.compression
        return 1 - 1 / ratio


@dataclass(frozen=True)
class SoftBatch:
    """One batch as the losses see it.

    Attributes:
        tokens: int64 [B, T].
        valid: bool [B, T], real tokens.
        loss_mask: bool [B, T], positions whose prediction counts.
        teacher, student: outputs of the plain and of the weighed model: `.logits` [B, T, V], `.hidden_states` or None.
        decay_biases: of every layer.
        budget: slots per head.
        target: share of tokens to evict.
        power: see SoftConfig.
    """

    tokens: Tensor
    valid: Tensor
    loss_mask: Tensor
    teacher: Any
    student: Any
    decay_biases: list[DecayBias]
    budget: int
    target: float
    power: float = 1.0

    @property
    def log_retentions(self) -> list[Tensor]:
        """The log retentions, or log gates, of each layer as they count, float32 [B, H, T]."""
        return [decay.log_retention * self.power for decay in self.decay_biases]


LOSSES: dict[str, tuple[str, Callable[[SoftBatch], Tensor]]] = {
    "divergence": ("logits", lambda one: objectives.divergence(one.teacher.logits, one.student.logits, one.loss_mask)),
    "student_divergence": (
        "logits", lambda one: objectives.divergence(one.student.logits, one.teacher.logits, one.loss_mask)
    ),
    "next_token": ("logits", lambda one: objectives.next_token(one.student.logits, one.tokens, one.loss_mask)),
    "hidden_error": (
        "hidden_states",
        lambda one: objectives.hidden_error(one.teacher.hidden_states[-1], one.student.hidden_states[-1], one.loss_mask),
    ),
    "hinge": ("", lambda one: capacity.hinge(one.log_retentions, one.valid, one.budget)),
    "hinge_together": ("", lambda one: capacity.hinge(one.log_retentions, one.valid, one.budget, together=True)),
    "admitted": ("", lambda one: capacity.admitted(one.log_retentions, one.valid, one.decay_biases[0].window or 0)),
    "shortfall": ("", lambda one: capacity.shortfall(one.log_retentions, one.valid, one.target)),
}  # fmt: skip
"""Losses by name: which outputs of the model they compare, none if they are about what is held; and their value."""


class SoftTrainer(GateTrainer):
    """The trainer of mode "soft": gates that weigh attention.

    Raises:
        UsageError: the gate asks for a loss that does not exist or that knows no power, or no layer of the base evicts.
    """

    config_type = SoftConfig

    def __init__(self, *args: Any, config: SoftConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        if unknown := sorted(set(self.gate.losses) - set(LOSSES)):
            raise UsageError(
                f"{type(self.gate).__name__} asks for losses {', '.join(unknown)}; there are {', '.join(LOSSES)}"
            )
        if "shortfall" in self.gate.losses and config.power != 1:
            raise UsageError(
                f"power={config.power} makes small weights count in what is held, but {type(self.gate).__name__} counts tokens "
                "whose gate is below one half, whatever they weigh; leave power at 1"
            )

    def batch_loss(self, model: Any, inputs: dict[str, Any], draws: BatchRandom) -> Tensor:
        """Reads the batch with plain and with weighed attention, and returns the sum of the gate's losses."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        needs = {LOSSES[name][0] for name in self.gate.losses}
        text = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.long().cumsum(-1) - 1).clamp_min(0),
            "use_cache": False,
            "logits_to_keep": 0 if "logits" in needs else 1,
            "output_hidden_states": "hidden_states" in needs,
        }
        with torch.no_grad():
            teacher = self.base(**text)
        return model(partial(self._losses, text=text, teacher=teacher, loss_mask=self._loss_mask(inputs), draws=draws))

    def _losses(
        self, gate: SoftGate, *, text: dict[str, Any], teacher: Any, loss_mask: Tensor, draws: BatchRandom
    ) -> Tensor:
        """Runs the part with gradient: a weighed forward and its losses."""
        config = self.config
        gate.random_keys = draws.rows  # until the next batch: the backward pass may compute layers again
        policy = Policy(Budget(1), gate, schedule=Schedule(active=False))  # evicts nothing; names the gate
        again = layers_again(self.base, partial(Attachment, self.base, None)) if config.recompute else nullcontext()
        with attach(self.base, policy, soft=True) as soft, again:
            student = self.base(**text)
        if not soft.state:
            raise UsageError(
                f"every layer of {type(self.base).__name__} keeps its stock cache, so there is nothing to learn"
            )
        valid = text["attention_mask"].bool()
        target = config.target(self.state.global_step / max(self.state.max_steps, 1))
        budget = draws.budget(config.budgets)
        batch = SoftBatch(
            text["input_ids"], valid, loss_mask, teacher, student, soft.decay_biases, budget, target, config.power
        )
        total = torch.zeros((), device=valid.device)
        for name, weight in gate.losses.items():
            needs, loss = LOSSES[name]
            value = loss(batch)
            self.record(**{name: value.detach()})
            total = total + value * weight * (1.0 if needs else config.capacity)
        return total

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        """Returns the positions whose next token is real and, if asked, part of the response: bool [B, T]."""
        valid = inputs["attention_mask"].bool()
        mask = valid & valid.roll(-1, -1)
        mask[:, -1] = False
        if self.config.answers_only:
            mask = mask & (valid.cumsum(-1) >= inputs["prompt_length"].unsqueeze(-1))
        return mask
