"""A run in its folder: begun or resumed under a lock and with a record, never mixed with another run."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from learnevict.data.label_store import Document, hash_documents
from learnevict.errors import UsageError
from learnevict.files import is_ours
from learnevict.hub import Gates
from learnevict.hub.download import CONFIG, MODEL_TYPE, WEIGHTS
from learnevict.hub.run_record import Record, as_json, changed, read_record
from learnevict.train.trainer import last_checkpoint
from learnevict.train.validation import BEST

Settings = Mapping[str, Mapping[str, Any]]
STATE = "trainer_state.json"
MODEL = (CONFIG, "*.safetensors*", "*.bin*")
"""What a model consists of."""
LENGTH = ("max_steps", "num_train_epochs")
MAY_CHANGE = (*LENGTH, "smoke", "dry_run", "gpus", "gpu_memory", "patience", "output_dir", "overwrite")
MAY_CHANGE_ABOUT = (
    "logging", "save", "eval", "do_eval", "report_to", "run_name", "push_to_hub", "hub_", "resume_", "load_best", "metric_for",
    "greater_", "log_level", "project", "trackio", "dataloader_num", "dataloader_pin", "ignore_data_skip",
)  # fmt: skip
"""How long a run goes on, what it says, keeps and sends may differ when it is resumed: whole names, and beginnings of names."""


class TrainingRun:
    """A run in progress: its record, which is on the disk since it began, and the checkpoint it is resumed from, if any."""

    def __init__(self, record: Record, checkpoint: str | None) -> None:
        self.record, self.checkpoint = record, checkpoint
        self.trainer: Any = None

    def train(self, trainer: Any) -> None:
        """Trains from the checkpoint or from the start, saves the gates, and records the log and the best step."""
        self.trainer = trainer
        go_on(trainer, self.checkpoint)
        trainer.save_model(trainer.args.output_dir, _internal_call=True)  # sent at the end, with a whole record
        state = trainer.state
        best = None if trainer.validation is None else {"step": state.best_global_step, BEST: state.best_metric}
        self.record.add(log=state.log_history, best=best, steps=state.global_step)


@contextmanager
def run(
    program: str, gates: Gates, training: TrainingArguments, settings: Settings, data: tuple[Any, list[Document]]
) -> Generator[TrainingRun]:
    """Begins or resumes a run in its folder, and sends what it made when it has ended.

    Args:
        program: by which the record is known.
        gates: to train; their configuration tells what made them.
        training: arguments of the trainer.
        settings: what else was set, part by part; "config" holds the program's own, with "smoke".
        data: what is learned from, documents or a Stream, whose hash nobody knows before its end; and documents held out.

    Raises:
        UsageError: the folder holds another run, or another process writes into it.
    """
    documents, held_out = data
    facts = {
        "base_hash": gates.config.base_hash,
        "data_hash": hash_documents(documents) if isinstance(documents, list) else None,
        "eval_data_hash": hash_documents(held_out) if held_out else None,
    }
    parts = {**settings, "training": changed(training)}
    of_record: Any = {**parts, **facts, "seeds": {"seed": training.seed, "data_seed": training.data_seed}}
    checkpoint = resume_point(training, parts, facts)
    record = Record(
        str(training.output_dir),
        program,
        goes_on=checkpoint is not None,
        writes=training.process_index == 0,
        max_steps=training.max_steps,
        **of_record,
    )
    gates.config.training = {**record.origin, "before": gates.config.training}
    with record:
        running = TrainingRun(record, checkpoint)
        yield running
    if training.push_to_hub:
        running.trainer.push_to_hub()
    end_training(running.trainer)
    if running.trainer.is_world_process_zero():
        sys.stdout.write(f"gates in {training.output_dir}\n")


def end_training(trainer: Any) -> None:
    """Closes trackers and takes leave of the other processes, after DDP has been let go.

    Were DDP the last to hold the group of gloo, it would wait for threads that want Python's lock, which it holds itself: the
    gates would be written, and the process would stay for ever.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def resume_point(training: TrainingArguments, settings: Settings, facts: Mapping[str, Any]) -> str | None:
    """Returns the checkpoint to go on from; None to begin.

    Args:
        training: its `resume_from_checkpoint` is "true" or a checkpoint's folder.
        settings: of this run, as its record will have them; they have to be those of the run that is resumed. A trial ("smoke")
            may begin in a folder with what another trial left.
        facts: hashes, likewise; None is not known beforehand.

    Raises:
        UsageError: nothing to resume, another run, or checkpoints or a model in the way of a fresh one.
    """
    folder, asked = str(training.output_dir), training.resume_from_checkpoint
    if not asked or str(asked).lower() == "false":
        was_smoke = (read_record(folder) or {}).get("config", {}).get("smoke")
        if not (settings["config"]["smoke"] and was_smoke):
            _refuse_others(folder, settings, facts)
        return None
    given = str(asked).lower() != "true"
    found = str(asked) if given else last_checkpoint(folder, training.world_size)
    if found is None or not (Path(found) / STATE).is_file():
        raise UsageError(
            f"no checkpoint to resume from in {str(asked) if given else folder!r}; drop --resume_from_checkpoint"
        )
    home = str(Path(found).parent)
    for config in (Path(found) / CONFIG, Path(folder) / CONFIG):
        if config.exists() and not is_ours(config, MODEL_TYPE.encode()):
            raise UsageError(f"{str(config.parent)!r} holds a model that is no gates; choose another --output_dir")
    if Path(home).resolve() != Path(folder).resolve():
        _refuse_others(folder, settings, facts)
    if wrong := _differences(read_record(home) or {}, settings, facts):
        raise UsageError(
            f"the run in {home!r} had another {', '.join(wrong)}; give its flags again (only steps, and what is logged, "
            "saved, evaluated or sent, may change), or begin elsewhere"
        )
    return found


def smoke_folder(training: TrainingArguments, usual: str) -> None:
    """Sends a trial that was given no folder to one beside the usual, where no real run is."""
    if str(training.output_dir) == usual:
        training.output_dir = f"{usual}-smoke"


def go_on(trainer: Any, checkpoint: str | None) -> None:
    """Trains, from a checkpoint if there is one; of a run that had taken all its steps it takes the weights and the log."""
    if checkpoint is None or not _is_complete(Path(checkpoint), trainer.args):
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    gates = trainer.accelerator.unwrap_model(trainer.model)
    gates.load_state_dict(load_file(Path(best or checkpoint) / WEIGHTS))
    trainer.log_end(Path(checkpoint))


def _is_complete(checkpoint: Path, training: TrainingArguments) -> bool:
    """Returns whether nothing is left to do; where weights are shared out (ZeRO-3), a checkpoint cannot tell."""
    state = json.loads((checkpoint / STATE).read_text())
    if not (checkpoint / WEIGHTS).is_file() or training.deepspeed:
        return False
    if training.max_steps > 0:
        return state["global_step"] >= training.max_steps
    return state["epoch"] >= training.num_train_epochs


def _refuse_others(folder: str, settings: Settings, facts: Mapping[str, Any]) -> None:
    """Refuses a folder with checkpoints, which the trainer would thin out as if they were its own, or with a model or gates.

    Gates of a run like this one, which makes the same, are no obstacle.
    """
    if any(Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise UsageError(
            f"{folder!r} holds checkpoints of another run; go on with it (--resume_from_checkpoint true), or choose another "
            "--output_dir"
        )
    files = sorted(path.name for pattern in MODEL for path in Path(folder).glob(pattern))
    before = read_record(folder) if files else None
    lengths = [[part.get("training", {}).get(name) for name in LENGTH] for part in (before or {}, settings)]
    if files and (before is None or lengths[0] != lengths[1] or _differences(before, settings, facts)):
        whose = "a model" if before is None else "what another run made"
        raise UsageError(
            f"{folder!r} holds {whose} ({', '.join(files[:3])}), which is not replaced; choose another --output_dir"
        )


def _differences(before: Mapping[str, Any], now: Settings, facts: Mapping[str, Any]) -> list[str]:
    """Returns the names of facts and settings that are not what they were."""
    wrong = [name for name, value in facts.items() if value is not None and before.get(name, value) != value]
    for part, settings in now.items():
        new: Any = as_json(settings)
        old: Any = before.get(part, new)
        for name in sorted({*old, *new}):
            free = name in MAY_CHANGE or name.startswith(MAY_CHANGE_ABOUT)
            if not free and old.get(name) != new.get(name):
                wrong.append(f"{name} ({old.get(name)}, not {new.get(name)})")
    return wrong
