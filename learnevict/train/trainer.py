"""What all trainers share: the model is the gates alone, the base model stands outside, frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer


class GateTrainer(Trainer):
    """transformers.Trainer for gates; a mode overrides `compute_loss`.

    Parameters may be used with gradient inside `model(task, ...)` only, which calls task(gate, ...): DDP and ZeRO watch
    for that call.

    Args:
        base: the model whose cache is governed; never trained, never saved.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, base: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.base = base.eval().requires_grad_(False)
        self.figures: dict[str, list[float]] = {}

    @property
    def gate(self) -> Any:
        """What is trained; of the kind that the mode teaches."""
        gates: Any = self.accelerator.unwrap_model(self.model)
        return gates.gate

    def note(self, **figures: float | Tensor) -> None:
        """Figures of one batch; their means since the last line enter the next line of the log."""
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(float(value))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer.log, with what was noted."""
        noted = {name: round(sum(found) / len(found), 5) for name, found in self.figures.items() if found}
        self.figures.clear()
        super().log({**logs, **noted}, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        """Validation loss."""
        with torch.no_grad():
            loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Gates only, as config.json + model.safetensors; no pickled arguments."""
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
