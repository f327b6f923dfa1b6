"""What all trainers of gates share, whatever their loss: gathered weights, evaluation, checkpoints of gates only, the Hub.

Trainer's own pushes hold training_args.bin, a pickle, and an empty card. Here a push is what `learnevict push` shares: the
gates, their card and run.json, as one commit.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HubStrategy

from learnevict.errors import HubError, NotPushedWarning, UsageError
from learnevict.hub import Gates, open_repository, push_folder, write_card
from learnevict.train.validation import Validation, summarise, validate


class BaseTrainer(Trainer):
    """transformers.Trainer whose model is Gates.

    Args:
        base: the model whose cache is governed; never trained, never saved.
        validation: texts and budgets of evaluations; None: there are none.
    """

    def __init__(self, *args: Any, base: PreTrainedModel, validation: Validation | None = None, **kwargs: Any) -> None:
        self.base = base.eval().requires_grad_(False)
        self.validation = validation
        super().__init__(*args, **kwargs)
        model: Any = self.model
        plugin: Any = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        self.zero3 = plugin is not None and plugin.zero_stage == 3
        self.gathered: Gates | None = None
        if self.zero3 or self.is_fsdp_enabled:
            self.gathered = deepcopy(model).requires_grad_(False).eval().to(self.args.device)
        if self.zero3:
            from deepspeed.runtime.zero import register_external_parameter

            for parameter in model.parameters():  # fetched at once: processes may use parts of a gate as they like
                register_external_parameter(model, parameter)

    @property
    def gates(self) -> Any:
        """The model without what DDP or DeepSpeed put around it."""
        return self.accelerator.unwrap_model(self.model)

    def gathered_gates(self) -> Gates:
        """Returns the gates with gathered weights, for use outside `model(task, ...)`; all processes have to ask together.

        Under ZeRO-3 and FSDP a process holds a part of every weight except in a forward or backward pass, and processes read
        texts of other lengths, so nothing may be fetched on the way: there this is a copy, which the next call changes.
        """
        gates: Gates = self.gates
        if self.gathered is None:
            return gates
        own = {**dict(self.gathered.named_parameters()), **dict(self.gathered.named_buffers())}
        whole: Any = nullcontext()
        if self.zero3:
            from deepspeed.runtime.zero import GatheredParameters

            whole = GatheredParameters(list(gates.parameters()))
        with torch.no_grad(), whole:
            for name, part in [*gates.named_parameters(), *gates.named_buffers()]:
                own[name].copy_(part.full_tensor() if isinstance(part, DTensor) else part)
        return self.gathered

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> dict[str, float]:
        """Compares the gates with the oracle (train.validation) and logs the figures; random states stay as they were.

        Raises:
            UsageError: the trainer has no validation.
        """
        if self.validation is None:
            raise UsageError("nothing to evaluate on: give the trainer a validation, or the recipe --eval_documents")
        rank, world = self.args.process_index, self.args.world_size
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            found = validate(self.gathered_gates(), self.base, self.validation, slice(rank, None, world))
        parts: Any = gather_object([found]) if world > 1 else [found]
        pooled = {budget: [one for part in parts for one in part[budget]] for budget in found}
        metrics = summarise(pooled, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log_end(self, checkpoint: Path) -> None:
        """Does nothing; GateTrainer logs the last line of a run that was killed between its last checkpoint and its end."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves gates only, as config.json + model.safetensors, by one process; no pickled arguments."""
        if self.args.should_save:
            self.gates.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def init_hf_repo(self, *_: Any, **__: Any) -> None:
        """Makes the repository before the training, so that a wrong name or token is found out then.

        Raises:
            UsageError: a hub_strategy that would share optimizer states, or no Hub id.
            HubError: not logged in, no access, no network.
        """
        args = self.args
        if args.hub_strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
            raise UsageError("optimizer states are pickles and are not shared; give --hub_strategy every_save or end")
        self.push_in_progress = None
        if self.is_world_process_zero():
            name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
            self.hub_model_id = open_repository(name, private=bool(args.hub_private_repo), token=args.hub_token)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes the card that `learnevict push` makes beside the gates in the output folder, if the run is shared."""
        if self.args.push_to_hub and self.is_world_process_zero():
            write_card(str(self.args.output_dir), str(self.hub_model_id))

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, commit_message: str | None = "End of training", revision: str | None = None
    ) -> Any:
        """Saves the gates and shares them, as `learnevict push` does; with run.json, if it is there by now."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.hub_model_id:
            self.init_hf_repo()
        return self._share(str(self.args.output_dir), commit_message, revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Shares the gates of a checkpoint, without its optimizer; the training survives if that fails."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        try:
            self._share(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
        except HubError as error:
            warnings.warn(f"step {self.state.global_step} did not reach the Hub: {error}", NotPushedWarning, 2)

    def _share(self, folder: str, message: str | None, revision: str | None = None) -> Any:
        """Pushes a folder as one commit, from one process."""
        args, where = self.args, str(self.hub_model_id)
        if not self.is_world_process_zero():
            return None
        revision = revision or args.hub_revision
        return push_folder(folder, where, revision=revision, message=message, rows=(), token=args.hub_token)
