"""The trainer of gates: its model is the gates alone, the frozen base stands outside; a killed run resumes exactly."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from learnevict.errors import UsageError
from learnevict.ops.random import hashed
from learnevict.train.base_trainer import BaseTrainer
from learnevict.train.batch_random import BatchRandom
from learnevict.train.validation import Validation

PROGRESS = "progress_{rank}.json"


class GateTrainer(BaseTrainer, ABC):
    """transformers.Trainer for gates; the trainer of a mode gives `batch_loss`.

    Parameters may be used with gradient inside `model(task, ...)` only, which calls task(gate, ...): DDP and ZeRO watch
    for that call; without gradient outside of it, as `gathered_gates()`. Whatever is random is hashed from `draws`, or comes
    from torch's global generator, whose state checkpoints hold.

    Args:
        base: the model whose cache is governed; never trained, never saved.
        config: what to learn from, a `config_type`.
        validation: texts and budgets of evaluations; None: there are none.
    """

    config_type: ClassVar[Any] = None
    stored_labels: ClassVar[bool] = False  # it can learn from a label store
    responses: ClassVar[bool] = False  # documents need a prompt and a response of their own
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        base: PreTrainedModel,
        config: Any = None,
        validation: Validation | None = None,
        **kwargs: Any,
    ) -> None:
        documents = None if validation is None else validation.documents
        super().__init__(*args, base=base, validation=validation, **{"eval_dataset": documents, **kwargs})
        self.config = config
        self.model_accepts_loss_kwargs = False
        if validation is not None:
            validation.policies(self.gates)  # budgets that cannot be held are told before the first step
        self.figures: dict[str, list[float]] = {}
        self.batch = (-1, 0)
        torch.manual_seed(self.args.seed + self.args.process_index)  # dropout of gates: each process its own

    @abstractmethod
    def batch_loss(self, model: Any, inputs: dict[str, Any], draws: BatchRandom) -> Tensor:
        """Returns the loss of one batch.

        Args:
            model: called as model(task, ...).
            inputs: a collated batch: input_ids, attention_mask [B, T], prompt_length [B], stored_labels.
            draws: what is random in it.
        """

    @property
    def gate(self) -> Any:
        """The gate that is trained."""
        return self.gates.gate

    def draws(self, rows: int) -> BatchRandom:
        """Returns the random keys of the next batch, of which this process has so many rows, however rows are shared out."""
        step, part = self.state.global_step, self.batch[1] + 1 if self.batch[0] == self.state.global_step else 0
        self.batch = (step, part)
        rank, world = self.args.process_index, self.args.world_size
        number = torch.arange(rows, device=self.args.device)
        number = number * world + rank if isinstance(self.train_dataset, IterableDataset) else number + rank * rows
        return BatchRandom.of(hashed(self.args.seed, step, part), number)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the loss as Trainer wants it."""
        loss = self.batch_loss(model, inputs, self.draws(len(inputs["input_ids"])))
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def record(self, **figures: float | Tensor) -> None:
        """Adds figures of one batch; their means since the last line enter the next line of the log."""
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(float(value))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as Trainer does, with the means of recorded figures."""
        data: Any = self.train_dataset
        if isinstance(data, IterableDataset):  # has no epochs: say how much of the run is done
            self.state.epoch = self.state.global_step / max(self.state.max_steps, 1)
        if "train_loss" in logs:  # of the whole run, however often it was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        means = {}
        if not any(name.startswith("eval_") for name in logs):
            means = {name: round(sum(found) / len(found), 5) for name, found in self.figures.items() if found}
            self.figures.clear()
        super().log({**logs, **means}, *args, **kwargs)

    def log_end(self, checkpoint: Path) -> None:
        """Logs the last line of a run that was killed between its last checkpoint, whose state the trainer has, and its end."""
        self._restore(checkpoint)
        self._total_loss_scalar += float(self._tr_loss)
        self.log({"total_flos": self.state.total_flos, "train_loss": 0.0})

    def get_train_dataloader(self) -> DataLoader:
        """Returns Trainer's loader, or one of a stream, which deals documents to processes and has a generator of its own."""
        data: Any = self.train_dataset
        if not isinstance(data, IterableDataset):
            return super().get_train_dataloader()
        return DataLoader(
            data, batch_size=self._train_batch_size, collate_fn=self.data_collator, generator=torch.Generator()
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """Writes what a process needs to go on, before trainer_state.json, which is written last."""
        super()._save_rng_state(output_dir)
        streamed, data = isinstance(self.train_dataset, IterableDataset), cast("Any", self.train_dataset)
        progress = {
            "figures": self.figures,
            "loss": [float(self._tr_loss), self._total_loss_scalar, self._globalstep_last_logged],
            "world_size": self.args.world_size,
            "stream": data.state_dict() if streamed else None,
        }
        path = Path(output_dir) / PROGRESS.format(rank=self.args.process_index)
        path.write_text(json.dumps(progress))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self._restore(Path(checkpoint))

    def _restore(self, checkpoint: Path) -> None:
        """Restores what `_save_rng_state` wrote beside Trainer's own."""
        progress = json.loads((checkpoint / PROGRESS.format(rank=self.args.process_index)).read_text())
        self.figures = {name: list(found) for name, found in progress["figures"].items()}
        running, self._total_loss_scalar, self._globalstep_last_logged = progress["loss"]
        self._tr_loss = torch.tensor(running, device=self.args.device)
        if progress["stream"] is not None:
            data: Any = self.train_dataset
            data.load_state_dict(progress["stream"])


def last_checkpoint(folder: str | Path, world_size: int) -> str | None:
    """Returns the newest complete checkpoint in a folder; one that a killed run had not finished is passed over.

    Raises:
        UsageError: it was written by another number of processes.
    """
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())  # written last
            before = _num_writers(path)
        except (OSError, ValueError):
            continue
        if before != world_size:
            raise UsageError(f"{str(path)!r} was written by {before} processes; resume with as many, not {world_size}")
        parts = PROGRESS if (path / PROGRESS.format(rank=0)).is_file() else "rng_state_{rank}.pth"
        if world_size == 1 or all((path / parts.format(rank=rank)).is_file() for rank in range(world_size)):
            return str(path)
    return None


def _num_writers(checkpoint: Path) -> int:
    """Returns how many processes wrote a checkpoint; those of other trainers than GateTrainer tell by their random states."""
    progress = checkpoint / PROGRESS.format(rank=0)
    if progress.is_file():
        return json.loads(progress.read_text())["world_size"]
    return 1 if (checkpoint / "rng_state.pth").is_file() else len(list(checkpoint.glob("rng_state_*.pth")))
