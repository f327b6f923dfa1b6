"""A trainer that shares gates as `learnevict push` does (--push_to_hub, --hub_model_id).

transformers' own card of a model it does not know is empty, and its pushes hold training_args.bin, a pickle. Here a push
is the gates, their card and run.json, as one commit. A recipe that finishes run.json after `save_model` pushes once more,
with `push_to_hub`: only what changed is committed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from learnevict.errors import HubError, NotPushedWarning, UsageError
from learnevict.hub import open_repository, push_folder, write_card


class PushingTrainer(Trainer):
    """transformers.Trainer, but for what it puts on the Hub."""

    def log_end(self, checkpoint: Path) -> None:
        """Log the last line of a run that was killed between its last checkpoint and its end; nothing where none is known.

        Args:
            checkpoint: of its last step, whose state the trainer has.
        """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository before the training, so that a wrong name or token is found out then.

        Raises:
            UsageError: a hub_strategy that would share optimizer states, or no Hub id.
            HubError: not logged in, no access, no network.
        """
        if self.args.hub_strategy not in (HubStrategy.EVERY_SAVE, HubStrategy.END):
            raise UsageError("optimizer states are pickles and are not shared; give --hub_strategy every_save or end")
        self.push_in_progress = None
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            hidden = bool(self.args.hub_private_repo if private is None else private)
            self.hub_model_id = open_repository(name, private=hidden, token=token or self.args.hub_token)

    def create_model_card(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, rows: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Write the card that `learnevict push` makes beside the gates in the output folder; `rows` of an evaluation."""
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir), str(self.hub_model_id), rows)

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        commit_message: str | None = "End of training",
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> Any:
        """Save the gates and share them, as `learnevict push` does; with run.json, if it is there by now."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.hub_model_id:
            self.init_hf_repo(token, private)
        return self._share(str(self.args.output_dir), commit_message, token, revision, rows)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Share the gates of a checkpoint, without its optimizer; the training survives if that fails."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        try:
            self._share(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
        except HubError as error:
            warnings.warn(
                f"step {self.state.global_step} did not reach the Hub: {error}", NotPushedWarning, stacklevel=2
            )

    def _share(
        self,
        folder: str,
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> Any:
        """One commit, from one process."""
        if not self.is_world_process_zero():
            return None
        return push_folder(
            folder, str(self.hub_model_id), revision=revision or self.args.hub_revision, message=message, rows=rows,
            token=token or self.args.hub_token,
        )  # fmt: skip
