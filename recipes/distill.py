"""Teach the gates of a learned method what the future wants of each token; the base model stays frozen.

    python recipes/distill.py --method foresightkv --output_dir runs/foresightkv
    python recipes/distill.py --method foresightkv --help                    # flags of its trainer and gate
    python recipes/distill.py config.yaml --max_steps 100                    # flags from a file, others after it
    accelerate launch recipes/distill.py --labels runs/labels --output_dir runs/foresightkv
    python recipes/distill.py --model Qwen/Qwen3-0.6B --data user/chats --streaming --packed --max_length 2048
    python recipes/distill.py --method judge_q --own_answers true --output_dir runs/judge_q

A method's gate says in which mode it learns (learnevict.train.run.registry): "replay" ranks the states of
teacher-forced runs under
eviction, "stream" regresses on the oracle's numbers layer by layer, "soft" weighs attention and learns through the model,
"probe" learns tokens that ask. Departures from each paper are told in its method's file; where a paper keeps a second copy of
the model, or labels on a disk, one frozen copy makes them on the way (--labels takes those of recipes/oracle.py). With
--own_answers gates learn from what the model itself says to the prompts, written before training begins and again on resuming.
With --eval_steps the gates are judged against the oracle on texts nobody trains on; the best checkpoint is what comes out.
Resume with --resume_from_checkpoint true: the run ends as if nothing had happened. --dry-run says what a run would take.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from transformers import set_seed

from learnevict.config import Budget
from learnevict.data.documents import Collator
from learnevict.data.opening import describe_base, families_of, load_base, longest_text, read_for_learning
from learnevict.errors import told_in_one_line
from learnevict.hub import Gates, weight_hash
from learnevict.hub.run_record import Record, changed
from learnevict.train.memory.estimate import estimate, length_of, memory_of, report
from learnevict.train.memory.phases import RunPlan
from learnevict.train.run.arguments import Arguments
from learnevict.train.run.arguments import parse as parse_flags
from learnevict.train.run.launch import find_tools, launch_defaults
from learnevict.train.run.ranges import check_numbers
from learnevict.train.run.resume import go_on, resume_point
from learnevict.train.run.setup import hash_data, make_gates, read_data, settle
from learnevict.train.validation import BEST, Patience, Validation


@dataclass
class Config:
    """What to distil.

    Attributes:
        method: a name of `learnevict list`, or the import path of your own.
        start_from: gates to train further, a folder or Hub id; their settings hold.
        model: base model: testbed, a folder or a Hub id.
        allow_pickle: read weights of the model that are pickles (.bin) too; otherwise safetensors only.
        labels: folder of recipes/oracle.py, for modes that can use it; otherwise labels are made on the way.
        data: testbed; a .txt, .jsonl or .parquet file; a folder of them or of `save_to_disk`; a dataset of the Hub.
        data_config: of a dataset of the Hub.
        data_split: of a dataset.
        column: where the text or the chat is; otherwise text, messages, conversations, or prompt and completion.
        families: of the testbed, comma-separated; otherwise all.
        documents: to learn from at most.
        max_length: tokens of a document at most; exactly, if packed.
        packed: join texts and cut them into pieces of max_length.
        streaming: read as needed, without end; the position is part of a checkpoint.
        own_answers: the model writes the answer to every prompt itself, greedily and with a full cache,
            per_device_eval_batch_size of them at a time, in place of the given ones; a prompt may be all there is.
        answer_tokens: of its own answers at most; 0: as many as the longest given one.
        period: tokens between events; the testbed's texts have 350.
        sinks: first tokens that stay.
        recent: last tokens that stay.
        eval_documents: held out for evaluations: the first of the data, or validation samples of the testbed.
        eval_budgets: what the gates are judged under: 48, 25% or 64MiB.
        patience: evaluations without improvement after which training stops; 0 never stops.
        smoke: seconds instead of minutes, the same code.
        dry_run: print what the run would take, and do nothing; only the configuration of the model is read.
        gpu_memory: of one GPU, for that.
        gpus: that the run would have, for that; otherwise as many as processes were launched.
    """

    method: str = "foresightkv"
    start_from: str | None = None
    model: str = "testbed"
    allow_pickle: bool = False
    labels: str | None = None
    data: str = "testbed"
    data_config: str | None = None
    data_split: str = "train"
    column: str | None = None
    families: str = ""
    documents: int = 4000
    max_length: int = 4096
    packed: bool = False
    streaming: bool = False
    own_answers: bool = False
    answer_tokens: int = 0
    period: int = 16
    sinks: int = 4
    recent: int = 8
    eval_documents: int = 32
    eval_budgets: list[str] = field(default_factory=lambda: ["64"])
    patience: int = 0
    smoke: bool = False
    dry_run: bool = False
    gpu_memory: str = "80GiB"
    gpus: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, {"sinks": 0, "recent": 0, "eval_documents": 0})
        families_of(self.families)
        memory_of(self.gpu_memory)
        for budget in self.eval_budgets:
            Budget.parse(budget)


DEFAULTS = {
    "output_dir": "runs/{method}",
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
    """Read, teach, judge, save."""
    settle(flags)
    config, course, training = flags.common, flags.trainable_method, flags.training
    if config.dry_run:
        described, dtype = describe_base(config.model)
        mode, tokens = vars(flags.mode), longest_text(config.data, config.max_length)
        shared = {
            name: mode[name]
            for name in ("period", "budgets", "cuts", "along", "objective", "pairs", "recompute")
            if name in mode
        }
        before = Gates.load(config.start_from).config.settings if config.start_from else {}
        plan = RunPlan(
            course.mode.name, tokens, training.per_device_train_batch_size, stored_labels=config.labels is not None,
            settings={**flags.settings, **before}, dtype=dtype, **shared,
            **length_of(training, config.gpus, config.documents),
        )  # fmt: skip
        print(report(estimate(described, config.method, plan), config.gpu_memory))
        return
    set_seed(training.seed)
    base, tokenizer = load_base(config.model, device=str(training.device), allow_pickle=config.allow_pickle)
    gates = make_gates(flags, base)
    names = families_of(config.families)
    read = lambda source, limit, held: read_for_learning(source, tokenizer, limit, held, names)  # noqa: E731
    documents, held_out = read_data(flags, base, tokenizer, read)
    facts = {
        "base_hash": weight_hash(base), "data_hash": hash_data(documents), "eval_data_hash": hash_data(held_out or None)
    }  # fmt: skip
    terms = {"sinks": config.sinks, "recent": config.recent, "slack": config.period}
    settings: Any = {
        "config": vars(config),
        "mode": {"name": course.mode.name, **vars(flags.mode)},
        "gate": flags.settings,
        "training": changed(training),
    }
    checkpoint = resume_point(training, settings, facts, smoke=config.smoke)
    record = Record(
        training.output_dir,
        "distill",
        **settings,
        goes_on=checkpoint is not None,
        writes=training.process_index == 0,
        max_steps=training.max_steps,
        seeds={"seed": training.seed, "data_seed": training.data_seed},
        **facts,
    )
    gates.config.training = {**record.origin, "before": gates.config.training}
    with record:
        trainer = course.trainer(
            model=gates,
            args=training,
            train_dataset=documents,
            data_collator=Collator(tokenizer.pad_token_id or 0),
            base=base,
            validation=Validation(held_out, tuple(config.eval_budgets), terms=terms) if held_out else None,
            callbacks=[Patience(config.patience)] if config.patience else [],
            **{course.mode.argument: flags.mode},
        )
        go_on(trainer, checkpoint)
        trainer.save_model(training.output_dir, _internal_call=True)  # sent at the end, with a whole record
        best = {"step": trainer.state.best_global_step, BEST: trainer.state.best_metric} if held_out else None
        record.add(log=trainer.state.log_history, best=best, steps=trainer.state.global_step)
        if config.streaming:
            record.add(data_hash=documents.digest, rows_left_out=documents.num_bad)
    if training.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()
    if trainer.is_world_process_zero():
        print(f"gates in {training.output_dir}")


def parse(arguments: list[str]) -> Arguments:
    """Arguments of the recipe, of the method's trainer and gate, and of transformers.TrainingArguments."""
    return parse_flags(arguments, Config, {**DEFAULTS, **launch_defaults()}, __doc__)


if __name__ == "__main__":
    with told_in_one_line("with a checkpoint in --output_dir, --resume_from_checkpoint true goes on"):
        find_tools()
        main(parse(sys.argv[1:]))
