"""What training programs share: settings that depend on each other, gates, data, and a run with its record."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from learnevict.data.documents import long_enough
from learnevict.data.label_store import Document, LabelStore, hash_documents
from learnevict.data.opening import families_of, read_for_learning
from learnevict.data.self_generated import SelfGeneration, generate_answers
from learnevict.data.sources import Source
from learnevict.data.stream import Stream
from learnevict.errors import DataError, LabelError, LearnevictWarning, UsageError
from learnevict.hub import Gates, weight_hash
from learnevict.hub.run_record import Record, changed
from learnevict.train.run.arguments import Arguments
from learnevict.train.run.launch import check_launch
from learnevict.train.run.resume import go_on, resume_point, smoke_folder
from learnevict.train.validation import BEST

SMOKE = {"max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 2}


class TrainingRun:
    """A run in progress.

    Attributes:
        record: of the run, on the disk since it began.
        checkpoint: the one that it is resumed from, if any.
        facts: what its data and its base are known by.
    """

    def __init__(self, record: Record, checkpoint: str | None, facts: Mapping[str, Any]) -> None:
        self.record, self.checkpoint, self.facts = record, checkpoint, facts
        self.trainer: Any = None

    def train(self, trainer: Any) -> None:
        """Trains from the checkpoint or from the start, saves the gates, and records the log and the best step."""
        self.trainer = trainer
        go_on(trainer, self.checkpoint)
        trainer.save_model(trainer.args.output_dir, _internal_call=True)  # sent at the end, with a whole record
        state, judged = trainer.state, self.facts["eval_data_hash"] is not None
        best = {"step": state.best_global_step, BEST: state.best_metric} if judged else None
        self.record.add(log=state.log_history, best=best, steps=state.global_step)


@contextmanager
def run(
    program: str,
    gates: Gates,
    training: TrainingArguments,
    settings: Mapping[str, Mapping[str, Any]],
    data: tuple[Any, list[Document]],
) -> Generator[TrainingRun]:
    """Begins or resumes a run in its folder, under a lock and with a record, and sends what it made when it has ended.

    Args:
        program: by which the record is known.
        gates: to train; their configuration tells what made them.
        training: arguments of the trainer.
        settings: what else was set, part by part; "config" holds the program's own, with "smoke".
        data: what is learned from, documents or a Stream, and documents held out.

    Raises:
        UsageError: the folder holds another run, or another process writes into it.
    """
    documents, held_out = data
    facts = {
        "base_hash": gates.config.base_hash,
        "data_hash": hash_data(documents),
        "eval_data_hash": hash_data(held_out or None),
    }
    parts = {**settings, "training": changed(training)}
    of_record: Any = {**parts, **facts, "seeds": {"seed": training.seed, "data_seed": training.data_seed}}
    checkpoint = resume_point(training, parts, facts, smoke=bool(settings["config"]["smoke"]))
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
        running = TrainingRun(record, checkpoint, facts)
        yield running
    if training.push_to_hub:
        running.trainer.push_to_hub()
    running.trainer.accelerator.end_training()
    if running.trainer.is_world_process_zero():
        sys.stdout.write(f"gates in {training.output_dir}\n")


def settle(flags: Arguments) -> None:
    """Make training arguments agree with each other and with the recipe's flags.

    Raises:
        UsageError: they cannot.
    """
    common, training = flags.common, flags.training
    if common.smoke:
        smoke_folder(training, f"runs/{common.method}")
        common.documents, common.eval_documents = 8, min(common.eval_documents, 4)
        for name, value in SMOKE.items():
            if name != "eval_steps" or training.eval_steps is not None:
                setattr(training, name, value)
    check_launch(training)
    if training.data_seed is None:
        training.data_seed = training.seed
    if common.streaming:
        training.ignore_data_skip = True  # the stream goes on where it was, without reading what lies before
        if training.max_steps <= 0 or training.dataloader_num_workers > 0:
            raise UsageError("--streaming needs --max_steps, for it has no end, and --dataloader_num_workers 0")
    if common.own_answers and (common.streaming or common.packed or common.labels):
        raise UsageError(
            "--own_answers are written to prompts before training begins; drop --streaming and --packed, and --labels, which "
            "are of the given answers"
        )
    _settle_evaluation(flags)


def _settle_evaluation(flags: Arguments) -> None:
    """Evaluations choose the best checkpoint, so one is saved at every evaluation."""
    common, training = flags.common, flags.training
    if training.eval_steps is None and training.eval_strategy == IntervalStrategy.NO:
        if common.patience or training.load_best_model_at_end:
            raise UsageError("--patience and the best checkpoint come from evaluations; give --eval_steps")
        return
    if common.eval_documents < 1:
        raise UsageError("an evaluation needs --eval_documents of at least 1")
    if training.eval_strategy == IntervalStrategy.NO:
        training.eval_strategy = IntervalStrategy.STEPS
    training.do_eval = True
    every = training.eval_steps or training.logging_steps
    if training.eval_strategy == IntervalStrategy.STEPS and training.save_steps % every:
        if flags.asked("save_steps"):
            raise UsageError(
                f"--save_steps {training.save_steps} is no multiple of --eval_steps {every}: the best "
                "checkpoint might not be one that is kept"
            )
        training.save_steps = every
    training.save_strategy = training.eval_strategy
    training.load_best_model_at_end = True
    training.metric_for_best_model, training.greater_is_better = BEST, True


def make_gates(flags: Arguments, base: PreTrainedModel) -> Gates:
    """Fresh gates, or those of --start_from, whose settings hold unless others are asked for.

    Raises:
        UsageError: they are of another method, or other settings are asked for.
        GateError: there are none, or they are another model's.
    """
    common = flags.common
    if not common.start_from:
        try:
            return Gates.make(common.method, base, **flags.settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"method {common.method!r} does not take {flags.settings}: {error}") from error
    gates = Gates.load(common.start_from, base)
    if gates.method != common.method:
        raise UsageError(f"{common.start_from!r} holds gates of {gates.method}; give --method {gates.method}")
    settings: dict[str, Any] = dict(gates.config.settings)
    for name, value in settings.items():
        if flags.asked(name) and flags.settings.get(name, value) != value:
            raise UsageError(f"{common.start_from!r} holds gates of --{name} {value}; give that, or leave it out")
    flags.settings |= settings
    shared = {one.name for one in fields(flags.mode)} & {name for name, value in settings.items() if value is not None}
    flags.mode = replace(flags.mode, **{name: settings[name] for name in shared})
    return gates


def read_data(flags: Arguments, base: PreTrainedModel, tokenizer: Any) -> tuple[Any, list[Document]]:
    """What to learn from, a list of documents or a Stream, and documents to judge by.

    Args:
        flags: what the user wants.
        base, tokenizer: of the model.

    Raises:
        DataError: there is nothing to read, or all of it is too short.
        LabelError: labels that do not fit.
        UsageError: the mode does not learn from labels, or from such documents.
    """
    common, training, names = flags.common, flags.training, families_of(flags.common.families)
    shortest = flags.trainable_method.mode.shortest(flags.mode)
    num_held = common.eval_documents if training.do_eval else 0
    source = Source(
        common.data,
        common.data_config,
        common.data_split,
        common.column,
        common.max_length,
        common.packed,
        common.streaming,
    )
    if common.streaming:
        if common.data == "testbed":
            raise UsageError("samples of the testbed are made, not read; drop --streaming and give --documents")
        held_out = read_for_learning(source, tokenizer, 1, num_held, names)[1]
        found: Any = Stream(source, tokenizer, num_held, shortest, training.process_index, training.world_size)
    elif common.labels:
        found, held_out = _stored(flags, base), []
        if num_held and common.data == "testbed":
            held_out = read_for_learning(source, tokenizer, 0, num_held, names)[1]
        elif num_held:
            found, held_out = found[:-num_held], found[-num_held:]
    else:
        found, held_out = read_for_learning(source, tokenizer, common.documents, num_held, names)
        if common.own_answers:
            found, held_out = _own_answers(flags, base, tokenizer, found, held_out)
    suitable = found if common.streaming else _suitable(found, flags)
    return suitable, long_enough(held_out, shortest) if held_out else []


def _own_answers(
    flags: Arguments, base: PreTrainedModel, tokenizer: Any, found: list[Document], held_out: list[Document]
) -> tuple[list[Document], list[Document]]:
    """Both with answers of the model, as long as the longest given to any of them."""
    common, training = flags.common, flags.training
    how = SelfGeneration(
        common.answer_tokens, common.max_length, training.per_device_eval_batch_size, training.process_index,
        training.world_size, progress=not training.disable_tqdm,
    )  # fmt: skip
    how = replace(how, max_tokens=how.longest(found + held_out))
    answers = generate_answers(base, tokenizer, found, how)
    return answers, generate_answers(base, tokenizer, held_out, how) if held_out else []


def _suitable(documents: list[Document], flags: Arguments) -> list[Document]:
    """Those that the mode can learn from; says how many are left out."""
    mode = flags.trainable_method.mode
    kept = long_enough(documents, mode.shortest(flags.mode))
    if mode.responses:
        kept = [one for one in kept if 0 < one.prompt_length < len(one.input_ids)]
        if not kept:
            raise DataError(
                f"mode {mode.name} learns what a response attends to, but no document has a prompt and a response: give "
                "chats, or columns prompt and completion, without --packed; or let the model answer, with --own_answers"
            )
    if len(kept) < len(documents):
        why = "are too short or have no response" if mode.responses else "are too short"
        warnings.warn(f"{len(documents) - len(kept)} of {len(documents)} texts {why}: left out", LearnevictWarning, 2)
    return kept


def _stored(flags: Arguments, base: PreTrainedModel) -> list[Document]:
    """Labelled documents of a store, checked against model, mode and period."""
    folder = flags.common.labels
    if not flags.trainable_method.mode.stored_labels:
        raise UsageError(
            f"mode {flags.trainable_method.mode.name} does not learn from labels; drop --labels, and give --data"
        )
    store = LabelStore(Path(folder))
    if store.manifest.base_hash != weight_hash(base):
        raise LabelError(f"{folder!r} holds labels of another base model; make them anew with `learnevict oracle`")
    if store.manifest.block != flags.mode.period:
        raise LabelError(
            f"{folder!r} holds labels of block {store.manifest.block}; train with --period {store.manifest.block}"
        )
    return store.documents()


def hash_data(data: Any) -> str | None:
    """Of documents; None of a stream, whose end nobody knows."""
    return hash_documents(data) if isinstance(data, list) else None
