"""Gates with whole weights where processes share them out: what trainers use outside `model(task, ...)`.

Under ZeRO-3 and FSDP a process holds a part of every weight, but for the time of a forward or backward pass. Recording runs,
sampling traces and judging happen outside of these passes, without gradient, and on texts of other lengths in every process,
so nothing may be fetched on the way: they get a copy, gathered at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from learnevict.hub import Gates


class GatheredGates:
    """The gates of a trainer.

    Args:
        trainer: a transformers.Trainer whose model is Gates, not yet training.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
        self.copy: Gates | None = None
        if self.zero3 or trainer.is_fsdp_enabled:
            self.copy = deepcopy(trainer.model).requires_grad_(False).eval().to(trainer.args.device)
        if self.zero3:
            from deepspeed.runtime.zero import register_external_parameter

            for (
                parameter
            ) in trainer.model.parameters():  # fetched at once: processes may use parts of a gate as they like
                register_external_parameter(trainer.model, parameter)

    def now(self) -> Gates:
        """The gates as they are; where they are shared out, a copy that the next call changes.

        All processes have to ask at the same time.
        """
        gates: Gates = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.copy is None:
            return gates
        own = {**dict(self.copy.named_parameters()), **dict(self.copy.named_buffers())}
        with torch.no_grad(), self._gathered(gates):
            for name, part in [*gates.named_parameters(), *gates.named_buffers()]:
                own[name].copy_(part.full_tensor() if isinstance(part, DTensor) else part)
        return self.copy

    def _gathered(self, gates: Gates) -> AbstractContextManager[Any]:
        if not self.zero3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(gates.parameters()))
