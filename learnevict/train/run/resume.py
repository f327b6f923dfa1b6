"""Going on with a run: which checkpoint, whether it is the same run, and what is left to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from learnevict.errors import UsageError
from learnevict.files import is_ours
from learnevict.hub.download import CONFIG, MODEL_TYPE, WEIGHTS
from learnevict.hub.run_record import as_json, read_record
from learnevict.train.trainer import last_checkpoint

STATE = "trainer_state.json"
MODEL = (CONFIG, "*.safetensors*", "*.bin*")
"""What a model consists of."""
LENGTH = ("max_steps", "num_train_epochs")
MAY_CHANGE = (
    *LENGTH,
    "smoke",
    "dry_run",
    "gpus",
    "gpu_memory",
    "patience",
    "output_dir",
    "overwrite",
)
MAY_CHANGE_ABOUT = (
    "logging", "save", "eval", "do_eval", "report_to", "run_name", "push_to_hub", "hub_", "resume_", "load_best", "metric_for",
    "greater_", "log_level", "project", "trackio", "dataloader_num", "dataloader_pin", "ignore_data_skip",
)  # fmt: skip
"""How long a run goes on, what it says, keeps and sends may differ when it is resumed: whole names, and beginnings of names."""


def resume_point(
    training: TrainingArguments,
    settings: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any],
    *,
    smoke: bool = False,
) -> str | None:
    """The checkpoint to go on from; None to begin.

    Args:
        training: its `resume_from_checkpoint` is "true" or a checkpoint's folder.
        settings: of this run, as its record will have them, part by part; they have to be those of the run that is resumed.
        facts: hashes, likewise; None is not known beforehand, as of a stream.
        smoke: a trial may begin in a folder with what another trial left.

    Raises:
        UsageError: nothing to resume, another run, or checkpoints or a model in the way of a fresh one.
    """
    folder, asked = str(training.output_dir), training.resume_from_checkpoint
    if not asked or str(asked).lower() == "false":
        if smoke and _was_smoke(folder):
            return None
        _refuse_checkpoints(folder)
        _refuse_model(folder, settings, facts)
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
        _refuse_checkpoints(folder)
        _refuse_model(folder, settings, facts)
    if wrong := _differences(read_record(home) or {}, settings, facts):
        raise UsageError(
            f"the run in {home!r} had another {', '.join(wrong)}; give its flags again (only steps, and what is logged, "
            "saved, evaluated or sent, may change), or begin elsewhere"
        )
    return found


def smoke_folder(training: TrainingArguments, usual: str) -> None:
    """Send a trial that was given no folder to one beside the usual, where no real run is."""
    if str(training.output_dir) == usual:
        training.output_dir = f"{usual}-smoke"


def go_on(trainer: Any, checkpoint: str | None) -> None:
    """Train, from a checkpoint if there is one; of a run that had taken all its steps, take the weights and the log."""
    if checkpoint is None or not _is_complete(Path(checkpoint), trainer.args):
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    gates = trainer.accelerator.unwrap_model(trainer.model)
    gates.load_state_dict(load_file(Path(best or checkpoint) / WEIGHTS))
    trainer.log_end(Path(checkpoint))


def _is_complete(checkpoint: Path, training: TrainingArguments) -> bool:
    """Whether nothing is left to do; where weights are shared out (ZeRO-3), a checkpoint cannot tell."""
    state = json.loads((checkpoint / STATE).read_text())
    if not (checkpoint / WEIGHTS).is_file() or training.deepspeed:
        return False
    if training.max_steps > 0:
        return state["global_step"] >= training.max_steps
    return state["epoch"] >= training.num_train_epochs


def _was_smoke(folder: str) -> bool:
    return bool((read_record(folder) or {}).get("config", {}).get("smoke"))


def _refuse_checkpoints(folder: str) -> None:
    """Refuse a folder with checkpoints, which the trainer would thin out as if they were its own."""
    if any(Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise UsageError(
            f"{folder!r} holds checkpoints of another run; go on with it (--resume_from_checkpoint true), or choose another "
            "--output_dir"
        )


def _refuse_model(folder: str, settings: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Refuse a folder with a model or gates in it, unless they are of a run like this one, which makes the same.

    Raises:
        UsageError: naming what is there.
    """
    files = sorted(path.name for pattern in MODEL for path in Path(folder).glob(pattern))
    before = read_record(folder) if files else None
    lengths = [[part.get("training", {}).get(name) for name in LENGTH] for part in (before or {}, settings)]
    if files and (before is None or lengths[0] != lengths[1] or _differences(before, settings, facts)):
        whose = "a model" if before is None else "what another run made"
        raise UsageError(
            f"{folder!r} holds {whose} ({', '.join(files[:3])}), which is not replaced; choose another --output_dir"
        )


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]
) -> list[str]:
    """Names of facts and settings that are not what they were."""
    wrong = [name for name, value in facts.items() if value is not None and before.get(name, value) != value]
    for part, settings in now.items():
        old, new = before.get(part), as_json(settings)
        if old is None:
            continue
        for name in sorted({*old, *new}):
            free = name in MAY_CHANGE or name.startswith(MAY_CHANGE_ABOUT)
            if not free and old.get(name) != new.get(name):
                wrong.append(f"{name} ({old.get(name)}, not {new.get(name)})")
    return wrong
