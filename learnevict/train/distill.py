"""Train the gates of a learned method on what the future of a text attends to; the base model stays frozen.

Examples:

    learnevict train foresightkv --output_dir runs/foresightkv               the same as recipes/distill.py
    learnevict train foresightkv --help                                      flags of its trainer and gate
    learnevict train config.yaml --max_steps 100                             flags from a file, others after it

A method's gate says in which mode it learns (learnevict.train.run.registry), and each mode has a trainer whose compute_loss is
the objective: "replay" ranks the states of teacher-forced runs under eviction, "stream" regresses on the oracle's labels layer
by layer, "soft" weighs attention and learns through the model, "probe" learns tokens that ask. Departures from each paper are
told in its method's file; where a paper keeps a second copy of the model, or labels on a disk, one frozen copy makes them on
the way (--labels takes those of `learnevict oracle`). With --own_answers gates learn from what the model itself says to the
prompts, written before training begins and again on resuming. With --eval_steps the gates are compared with the oracle on
held-out texts; the best checkpoint is what comes out.
Resume with --resume_from_checkpoint true: the run ends as if nothing had happened.
--dry-run says what a run would take.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from learnevict.config import Budget
from learnevict.data.documents import Collator
from learnevict.data.opening import TESTBED, describe_base, load_base, longest_text, open_tokenizer
from learnevict.hub import Gates
from learnevict.testbed import families_of
from learnevict.train.run.estimate import ProgramFlags, estimate, length_of, report
from learnevict.train.run.fitting import fit
from learnevict.train.run.flags import flag, is_file, literal, read_file, read_flags, refuse_unknown
from learnevict.train.run.launch import find_tools, launch_defaults
from learnevict.train.run.phases import RunPlan
from learnevict.train.run.registry import required, trainable_method
from learnevict.train.run.resume import run
from learnevict.train.run.setup import Arguments, make_gates, read_data, settle
from learnevict.train.run.stored_labels import store_states, with_repeat_ids
from learnevict.train.validation import Patience, Validation


@dataclass
class DistillConfig(ProgramFlags):
    """Settings of a distillation: what to learn, and from what."""

    method: str = flag("foresightkv", "a name of `learnevict list`, or the import path of your own")
    start_from: str | None = flag(None, "gates to train further, a folder or Hub id; their settings hold")
    model: str = flag("testbed", "base model: testbed, a folder, a name of `learnevict model list` or a Hub id")
    allow_pickle: bool = flag(
        False, "read weights of the model that are pickles (.bin) too; otherwise safetensors only"
    )
    labels: str | None = flag(
        None,
        "folder of `learnevict oracle`, or of an earlier run, for modes that can use it; otherwise labels are made",
    )
    data: str = flag(
        "testbed",
        "testbed; a .txt, .jsonl or .parquet file; a folder of them or of `save_to_disk`; a dataset of the Hub",
    )
    data_config: str | None = flag(None, "of a dataset of the Hub")
    data_split: str = flag("train", "of a dataset")
    column: str | None = flag(
        None, "where the text or the chat is; otherwise text, messages, conversations, or prompt and completion"
    )
    families: str = flag("", "of the testbed, comma-separated; otherwise all")
    documents: int = flag(4000, "to learn from at most")
    max_length: int = flag(4096, "tokens of a document at most; exactly, if packed")
    packed: bool = flag(False, "join texts and cut them into pieces of max_length")
    streaming: bool = flag(False, "read as needed, without end; the position is part of a checkpoint")
    own_answers: bool = flag(
        False,
        "the model writes the answer to every prompt itself, greedily and with a full cache, per_device_eval_batch_size of "
        "them at a time, in place of the given ones; a prompt may be all there is",
    )
    answer_tokens: int = flag(0, "of its own answers at most; 0: as many as the longest given one")
    period: int = flag(
        16, "tokens between events, for the testbed's texts of 350; fitted to the length of others, as are budgets"
    )
    sinks: int = flag(4, "first tokens that stay", least=0)
    recent: int = flag(8, "last tokens that stay", least=0)
    eval_documents: int = flag(
        32, "held out for evaluations: the first of the data, or validation samples of the testbed", least=0
    )
    eval_budgets: list[str] = flag(["64"], "what the gates are evaluated under: 48, 25% or 64MiB; of other texts 25%")
    patience: int = flag(0, "evaluations without improvement after which training stops; 0 never stops")

    def __post_init__(self) -> None:
        super().__post_init__()
        families_of(self.families)
        for budget in self.eval_budgets:
            Budget.parse(budget)


DEFAULTS = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "max_steps": 600,
    "warmup_steps": 20,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "logging_steps": 20,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "seed": 7,
}
"""Of training arguments, where a method's TRAINING says nothing."""


def main(flags: Arguments) -> None:
    """Reads texts, trains the gates on them, and saves the gates; with --dry-run only prints what that would take."""
    settle(flags)
    config, training = flags.common, flags.training
    if config.dry_run:
        sys.stdout.write(f"{estimated(flags)}\n")
        return
    set_seed(training.seed)
    base, tokenizer = load_base(config.model, device=str(training.device), allow_pickle=config.allow_pickle)
    fit(flags, base.config, tokenizer)
    gates = make_gates(flags, base)
    with_repeat_ids(flags, tokenizer)

    documents, held_out = read_data(flags, gates, base, tokenizer)

    method = flags.trainable_method
    settings: Any = {
        "config": vars(config), "mode": {"name": method.mode, **vars(flags.mode)}, "gate": flags.settings
    }  # fmt: skip
    terms = {"sinks": config.sinks, "recent": config.recent, "slack": config.period}
    with run("distill", gates, training, settings, (documents, held_out)) as running:
        documents = store_states(flags, gates, base, documents)
        trainer = method.trainer(  # its compute_loss is the objective: learnevict/train/trainers
            model=gates,
            base=base,
            args=training,
            train_dataset=documents,
            data_collator=Collator(tokenizer.pad_token_id or 0),
            validation=Validation(held_out, tuple(config.eval_budgets), terms=terms) if held_out else None,
            callbacks=[Patience(config.patience)] if config.patience else [],
            config=flags.mode,
        )
        running.train(trainer)
        if config.streaming:
            running.record.add(data_hash=documents.digest, rows_left_out=documents.num_bad)


def estimated(flags: Arguments) -> str:
    """Returns what the run would take, in figures for people; of the base, only the configuration is read."""
    config, training = flags.common, flags.training
    described, dtype = describe_base(config.model)
    local = config.labels or Path(config.data).expanduser().exists()
    lengths = fit(flags, described, open_tokenizer(config.model)) if local else None
    mode = vars(flags.mode)
    shared = ("period", "budgets", "cuts", "along", "objective", "pairs", "recompute")
    common: Any = {name: mode[name] for name in shared if name in mode}
    common |= length_of(training, config.gpus, config.documents)
    before = Gates.load(config.start_from).config.settings if config.start_from else {}
    plan = RunPlan(
        flags.trainable_method.mode,
        lengths.longest if lengths else longest_text(config.data, config.max_length),
        training.per_device_train_batch_size,
        stored_labels=config.labels is not None,
        settings={**flags.settings, **before},
        dtype=dtype,
        **common,
    )
    return report(estimate(described, config.method, plan), config.gpu_memory)


def parse(arguments: list[str], program: str | None = None) -> Arguments:
    """Returns the flags of this program, of the method's trainer and gate, and of transformers.TrainingArguments.

    Flags win over a file, a file over the method's TRAINING, and that over DEFAULTS.

    Args:
        arguments: the words of a command line: a YAML file of flags or the name of a method, then flags.
        program: the command's name for --help; None: that of this process.
    """
    find_tools()
    if arguments and not arguments[0].startswith("-") and not is_file(arguments[0]):
        method, *rest = arguments
        file = rest[:1] if is_file(*rest[:1]) else []  # the file comes first
        arguments = [*file, "--method", method, *rest[len(file) :]]
    words, written = read_file(arguments)
    name = str(_early(words, ["method"]).get("method", written.get("method", DistillConfig.method)))
    early = {**written, **_early(words, required(name))}
    method = trainable_method(name, {key: literal(value) for key, value in early.items()})
    parts = {
        "what to learn, and from what": DistillConfig,
        f"trainer ({method.mode})": method.trainer.config_type,
        f"gate of {name}": method.gate_flags(),
        "options": TrainingArguments,
    }
    refuse_unknown(method.defaults, parts.values(), f"TRAINING of {name!r}")
    defaults = {**DEFAULTS, "output_dir": f"runs/{name}", **launch_defaults(), **method.defaults}
    found = read_flags(parts, arguments, __doc__, defaults=defaults, program=program, whose=f"of method {name!r}")
    values = found.values
    other = values["data"] != TESTBED or values["labels"]
    if other and "budgets" in values and "budgets" not in found.given:  # until the texts are known
        least = values["sinks"] + max(values["recent"], values["period"]) + 1
        values["budgets"] = [max(budget, least) for budget in values["budgets"]]
    config, mode, gate, training = map(found.of, parts.values())
    return Arguments(config, method, mode, vars(gate), training, found.given)


def _early(words: list[str], names: list[str]) -> dict[str, str]:
    """Returns the values of a few flags, before all of them are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, default=argparse.SUPPRESS)
    return vars(parser.parse_known_args(words)[0])
