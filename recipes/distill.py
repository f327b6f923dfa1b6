"""Distil golden eviction into a judge that ranks cached tokens (supervised stage of ForesightKV, arXiv 2602.03203).

    python recipes/distill.py --method foresightkv --output_dir runs/foresightkv
    accelerate launch recipes/distill.py --labels runs/labels --output_dir runs/foresightkv

The base model is frozen; only the gates are trained, on the states that teacher-forced runs under eviction go through.
Departures from the paper: one model copy on one device; half of the rows follow the judge's own evictions instead of the
oracle's; pairs are sampled and weighted by the gap of their labels; the budget is drawn anew for every batch, so one judge
serves them all; AdamW instead of Adam. Labels come from a store (recipes/oracle.py) or, without --labels, are made on the way.
Resume with --resume_from_checkpoint true.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from learnevict import __version__, testbed
from learnevict.errors import DataError, LabelError, UsageError, told_in_one_line
from learnevict.hub import Gates, weight_hash
from learnevict.testbed.corpus import load_base, read_source
from learnevict.train.labels import LabelStore, hash_documents
from learnevict.train.ranker import Collator, RankingConfig, RankingTrainer


@dataclass
class Config:
    """What to distil; training flags are those of transformers.TrainingArguments."""

    method: str = "foresightkv"
    start_from: str | None = None  # gates to train further; their size stays
    model: str = "testbed"
    labels: str | None = None  # folder of recipes/oracle.py
    data: str = "testbed"  # used when no labels are given
    families: str = ""  # testbed only: comma-separated, default all
    documents: int = 4000
    max_length: int = 4096
    hidden: int = 64  # the paper's judge has 16, for a base of 4 B parameters
    period: int = 16  # "evict every 256 tokens" (Section 4.1), scaled to texts of 350 tokens
    min_budget: int = 36
    max_budget: int = 160
    own_rows: float = 0.5  # 0 in the paper: states of the golden run only
    pairs: int = 256
    smoke: bool = False


DEFAULTS = {
    "output_dir": "runs/foresightkv",
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "max_steps": 600,
    "warmup_steps": 20,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,  # Section 4.1
    "weight_decay": 0.01,
    "logging_steps": 20,
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "seed": 7,
}


def read_documents(config: Config, base: transformers.PreTrainedModel, tokenizer: object) -> list:
    """Labelled documents from the store, or plain ones."""
    if config.labels is None:
        names = tuple(config.families.split(",")) if config.families else testbed.FAMILIES
        return read_source(config.data, tokenizer, config.documents, config.max_length, families=names)
    store = LabelStore(Path(config.labels))
    if store.manifest.base_hash != weight_hash(base):
        raise LabelError(f"{config.labels!r} holds labels of another base model; make them anew with recipes/oracle.py")
    if store.manifest.block != config.period:
        raise LabelError(
            f"{config.labels!r} holds labels of block {store.manifest.block}; train with --period {store.manifest.block}"
        )
    return store.documents()


def long_enough(documents: list, shortest: int) -> list:
    """Documents from which something is evicted at the smallest budget; says how many are left out."""
    kept = [document for document in documents if len(document.input_ids) >= shortest]
    if not kept:
        raise DataError(f"no text has the {shortest} tokens that --min_budget and --period ask for; lower them")
    if len(kept) < len(documents):
        print(f"{len(documents) - len(kept)} of {len(documents)} texts are shorter than {shortest} tokens and left out")
    return kept


def make_gates(config: Config, base: transformers.PreTrainedModel) -> Gates:
    """Fresh gates of a method that learns by ranking, or those to train further."""
    if config.start_from:
        gates = Gates.load(config.start_from, base)
        if gates.method != config.method or gates.config.settings.get("period") != config.period:
            raise UsageError(
                f"{config.start_from!r} holds {gates.method} of period {gates.config.settings.get('period')}, not "
                f"{config.method} of {config.period}; give --method and --period as they are"
            )
        return gates
    try:
        return Gates.make(config.method, base, hidden=config.hidden, period=config.period)
    except TypeError as error:
        raise UsageError(
            f"method {config.method!r} has gates but no judge to distil ({error}); tables are fitted with recipes/tables.py"
        ) from error


def main(config: Config, training: TrainingArguments) -> None:
    """Train and save."""
    if config.smoke:
        config.documents, config.hidden = 8, 8
        training.max_steps, training.save_steps, training.per_device_train_batch_size = 3, 2, 4
    set_seed(training.seed)
    base, tokenizer = load_base(config.model, device=str(training.device))
    documents = long_enough(read_documents(config, base, tokenizer), config.min_budget + config.period + 1)
    gates = make_gates(config, base)
    before = gates.config.training
    record = {
        "config": asdict(config),
        "max_steps": training.max_steps,
        "data_hash": hash_documents(documents),
        "base_hash": weight_hash(base),
        "seed": training.seed,
        "versions": {"learnevict": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "python": platform.python_version(),
    }
    if before:
        record["before"] = before  # of the gates in --start_from
    gates.config.training = record
    trainer = RankingTrainer(
        model=gates,
        args=training,
        train_dataset=documents,
        data_collator=Collator(tokenizer.pad_token_id or 0),
        base=base,
        ranking=RankingConfig(config.period, (config.min_budget, config.max_budget), config.own_rows, config.pairs),
    )
    resume = training.resume_from_checkpoint
    if resume and str(resume).lower() == "true":
        resume = get_last_checkpoint(training.output_dir)
        if resume is None:
            raise UsageError(f"nothing to resume in {training.output_dir!r}; drop --resume_from_checkpoint")
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(training.output_dir)
    if trainer.is_world_process_zero():
        record["log"] = trainer.state.log_history
        (Path(training.output_dir) / "run.json").write_text(json.dumps(record, indent=1))
        print(f"gates in {training.output_dir}")


def parse(arguments: list[str]) -> tuple[Config, TrainingArguments]:
    """Flags over DEFAULTS."""
    parser = HfArgumentParser((Config, TrainingArguments))  # pyright: ignore[reportArgumentType]
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_into_dataclasses(arguments)[:2]


if __name__ == "__main__":
    with told_in_one_line("with a checkpoint in --output_dir, --resume_from_checkpoint true goes on"):
        main(*parse(sys.argv[1:]))
