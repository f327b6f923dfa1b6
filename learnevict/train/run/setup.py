"""What a distillation needs before its trainer: settings that agree with each other, gates, and documents."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from learnevict.data.documents import long_enough
from learnevict.data.label_store import Document
from learnevict.data.opening import read_for_learning
from learnevict.data.self_generated import SelfGeneration, generate_answers
from learnevict.data.stream import Stream
from learnevict.errors import DataError, LearnevictWarning, UsageError
from learnevict.hub import Gates
from learnevict.testbed import families_of
from learnevict.train.run.fitting import source_of
from learnevict.train.run.launch import check_launch
from learnevict.train.run.registry import TrainableMethod
from learnevict.train.run.resume import smoke_folder
from learnevict.train.run.stored_labels import read_labelled
from learnevict.train.validation import BEST

SMOKE = {"max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 2}


@dataclass
class Arguments:
    """What the command line of a distillation says.

    Attributes:
        common: the program's own DistillConfig.
        trainable_method: the method, its trainer and the names of its gate's settings.
        mode: the trainer's config.
        settings: of the gate, for its `build`.
        training: TrainingArguments.
        given: names that the file or the command line mentions.
    """

    common: Any
    trainable_method: TrainableMethod
    mode: Any
    settings: dict[str, Any]
    training: TrainingArguments
    given: set[str]


def settle(flags: Arguments) -> None:
    """Makes TrainingArguments agree with each other and with the program's flags.

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
    """Makes a checkpoint be saved at every evaluation, for evaluations choose the best one."""
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
        if "save_steps" in flags.given:
            raise UsageError(
                f"--save_steps {training.save_steps} is no multiple of --eval_steps {every}: the best "
                "checkpoint might not be one that is kept"
            )
        training.save_steps = every
    training.save_strategy = training.eval_strategy
    training.load_best_model_at_end = True
    training.metric_for_best_model, training.greater_is_better = BEST, True


def make_gates(flags: Arguments, base: PreTrainedModel) -> Gates:
    """Returns fresh gates, or those of --start_from, whose settings hold unless others are asked for.

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
        if name in flags.given and flags.settings.get(name, value) != value:
            raise UsageError(f"{common.start_from!r} holds gates of --{name} {value}; give that, or leave it out")
    flags.settings |= settings
    shared = {one.name for one in fields(flags.mode)} & {name for name, value in settings.items() if value is not None}
    flags.mode = replace(flags.mode, **{name: settings[name] for name in shared})
    common.period = settings.get("period") or common.period  # gates are judged at their own
    return gates


def read_data(flags: Arguments, gates: Gates, base: PreTrainedModel, tokenizer: Any) -> tuple[Any, list[Document]]:
    """Returns what to learn from, a list of documents or a Stream, and the documents held out.

    Raises:
        DataError: there is nothing to read, or all of it is too short.
        LabelError: labels that do not fit.
        UsageError: the trainer does not learn from labels, or from such documents.
    """
    common, training, names = flags.common, flags.training, families_of(flags.common.families)
    shortest, num_held = flags.mode.shortest, common.eval_documents if training.do_eval else 0
    source = source_of(common)
    if common.streaming:
        if common.data == "testbed":
            raise UsageError("samples of the testbed are made, not read; drop --streaming and give --documents")
        held_out = read_for_learning(source, tokenizer, 1, num_held, names)[1]
        stream = Stream(source, tokenizer, num_held, shortest, training.process_index, training.world_size)
        return stream, long_enough(held_out, shortest) if held_out else []
    if common.labels:
        found, held_out = read_labelled(flags, base, gates.gate), list[Document]()
        if num_held and common.data == "testbed":
            held_out = read_for_learning(source, tokenizer, 0, num_held, names)[1]
        elif num_held:
            found, held_out = found[:-num_held], found[-num_held:]
    else:
        found, held_out = read_for_learning(source, tokenizer, common.documents, num_held, names)
    if common.own_answers:
        how = SelfGeneration(
            common.answer_tokens, common.max_length, training.per_device_eval_batch_size, training.process_index,
            training.world_size, progress=not training.disable_tqdm,
        )  # fmt: skip
        how = replace(how, max_tokens=how.longest(found + held_out))
        found, held_out = (generate_answers(base, tokenizer, part, how) if part else part for part in (found, held_out))
    return _suitable(found, flags), long_enough(held_out, shortest) if held_out else []


def _suitable(documents: list[Document], flags: Arguments) -> list[Document]:
    """Returns the documents that the trainer can learn from; warns of how many are left out."""
    responses = flags.trainable_method.trainer.responses
    kept = documents = long_enough(documents, flags.mode.shortest)
    if responses:
        kept = [one for one in documents if 0 < one.prompt_length < len(one.input_ids)]
        if not kept:
            raise DataError(
                f"mode {flags.trainable_method.mode} learns what a response attends to, but no document has a prompt and a "
                "response: give chats, or columns prompt and completion, without --packed; or let the model answer, with "
                "--own_answers"
            )
        if len(kept) < len(documents):
            warnings.warn(
                f"{len(documents) - len(kept)} of {len(documents)} texts have no response: left out",
                LearnevictWarning,
                2,
            )
    return kept
