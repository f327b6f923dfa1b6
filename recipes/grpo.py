"""Refine a judge by GRPO over its own evictions (reinforcement stage of ForesightKV, arXiv 2602.03203).

    python recipes/grpo.py --start_from runs/foresightkv --output_dir runs/refined
    python recipes/grpo.py --share_spread 0.3 --output_dir runs/shares        # layers learn to share the budget
    python recipes/grpo.py --scope model --output_dir runs/together           # slots of all heads and layers compete
    python recipes/grpo.py config.yaml --max_steps 100                        # flags from a file, others after it
    accelerate launch recipes/grpo.py --start_from runs/foresightkv --output_dir runs/refined

A text is read G times under sampled evictions, and what a trace adds to the language model's loss, at tokens that the full
cache is sure of, is what it costs. The base model is frozen and never writes a word (but see --free_every).
Departures from the paper: the log-probability is that of the sampling law (Plackett-Luce over the stored pool); budgets are
drawn anew for every step; the cost of a token is capped; and credit is given draw by draw, by the attention that the full
cache pays from the costly tokens to the evicted ones, where the paper gives one number to all draws of a trace
(--credit trace; --credit to_go counts what comes after an event). Resume with --resume_from_checkpoint true.

The gates that ship as testbed-foresightkv were made by two runs, the second for what larger budgets had lost (together three
quarters of an hour on a core):

    python recipes/grpo.py --share_spread 0.3 --min_budget 22 --max_budget 96 --max_steps 400 --output_dir runs/refined \
        --families program,ledger,program,recall,program,procedure,program,dialogue
    python recipes/grpo.py --share_spread 0.2 --min_budget 30 --max_budget 120 --max_steps 160 --learning_rate 7e-4 --seed 8 \
        --families program,recall,ledger,recall,program,procedure,dialogue,recall --start_from runs/refined \
        --output_dir runs/refined-again

When they were made, a family named again brought its first texts again; now it brings further ones.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

from transformers import set_seed

from learnevict.data.documents import long_enough
from learnevict.data.label_store import Document, hash_documents
from learnevict.data.opening import describe_base, families_of, load_base, longest_text, read_for_learning
from learnevict.data.sources import Source
from learnevict.errors import LearnevictWarning, UsageError, needing, told_in_one_line
from learnevict.hub import GATES_FOLDER, Gates, weight_hash
from learnevict.hub.run_record import Record, changed
from learnevict.rl.config import RefineConfig
from learnevict.testbed import generate, verify
from learnevict.train.memory.estimate import estimate, length_of, memory_of, report
from learnevict.train.memory.phases import RunPlan
from learnevict.train.run.arguments import parse_parts
from learnevict.train.run.launch import check_launch, find_tools, launch_defaults
from learnevict.train.run.ranges import check_numbers
from learnevict.train.run.resume import go_on, resume_point, smoke_folder
from learnevict.train.validation import Validation

with needing("train"):
    from datasets import Dataset
    from trl import GRPOConfig

    from learnevict.rl.trainer import EvictionTrainer


@dataclass
class Config:
    """What to refine, and on what.

    Attributes:
        start_from: gates of a method with a judge, a folder or Hub id.
        model: base model: testbed, a folder or a Hub id.
        allow_pickle: read weights of the model that are pickles (.bin) too; otherwise safetensors only.
        data: testbed; a file, a folder or a dataset of the Hub with prompts and answers.
        families: of the testbed, comma-separated; one named again brings more texts; otherwise all.
        documents: to learn from at most.
        max_length: tokens of a document at most.
        eval_documents: held out for evaluations (--eval_strategy steps).
        smoke: seconds instead of minutes, the same code.
        dry_run: print what the run would take, and do nothing; only the configuration of the model is read.
        gpu_memory: of one GPU, for that.
        gpus: that the run would have, for that; otherwise as many as processes were launched.
    """

    start_from: str = str(GATES_FOLDER / "testbed-foresightkv-sl")
    model: str = "testbed"
    allow_pickle: bool = False
    data: str = "testbed"
    families: str = ""
    documents: int = 4000
    max_length: int = 4096
    eval_documents: int = 16
    smoke: bool = False
    dry_run: bool = False
    gpu_memory: str = "80GiB"
    gpus: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, {"eval_documents": 0})
        families_of(self.families)
        memory_of(self.gpu_memory)


DEFAULTS = {
    "output_dir": "runs/refined",
    "per_device_train_batch_size": 48,
    "num_generations": 8,  # Section 4.1: 8 traces a text
    "learning_rate": 1.5e-3,  # the paper: 3e-4, for 200 steps of 32 texts
    "max_steps": 300,
    "warmup_steps": 10,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 7,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}


def main(config: Config, refine: RefineConfig, training: GRPOConfig) -> None:
    """Read, refine, save."""
    if config.smoke:
        config.documents, config.eval_documents = 8, 2
        training.max_steps, training.save_steps, training.logging_steps = 2, 2, 1
        smoke_folder(training, str(DEFAULTS["output_dir"]))
    check_launch(training)
    if training.do_eval and config.eval_documents < 1:
        raise UsageError("an evaluation needs --eval_documents of at least 1")
    if config.dry_run:
        described, dtype = describe_base(config.model)
        gates = Gates.load(config.start_from)
        plan = RunPlan(
            "grpo", longest_text(config.data, config.max_length), training.per_device_train_batch_size, period=refine.period,
            budgets=(refine.min_budget, refine.max_budget), group=training.num_generations,
            settings=dict(gates.config.settings), dtype=dtype, **length_of(training, config.gpus, config.documents),
        )  # fmt: skip
        print(report(estimate(described, gates.method, plan), config.gpu_memory))
        return
    set_seed(training.seed)
    base, tokenizer = load_base(config.model, device=str(training.device), allow_pickle=config.allow_pickle)
    gates = Gates.load(config.start_from, base)
    source = Source(config.data, max_length=config.max_length)
    held = config.eval_documents if training.do_eval else 0
    documents, held_out = read_for_learning(source, tokenizer, config.documents, held, families_of(config.families))
    documents = suitable(documents, refine)
    facts = {"base_hash": weight_hash(base), "data_hash": hash_documents(documents)}
    budgets = (str(refine.min_budget), str(refine.max_budget))
    terms = {"sinks": refine.sinks, "recent": refine.recent, "slack": refine.period}
    settings: Any = {"config": vars(config), "refine": vars(refine), "training": changed(training)}
    checkpoint = resume_point(training, settings, facts, smoke=config.smoke)
    record = Record(
        training.output_dir,
        "grpo",
        **settings,
        goes_on=checkpoint is not None,
        writes=training.process_index == 0,
        seeds={"seed": training.seed},
        **facts,
    )
    gates.config.training = {**record.origin, "before": gates.config.training}
    with record:
        trainer = EvictionTrainer(
            gates,
            base=base,
            refine=refine,
            verifier=marked if config.data == "testbed" else None,
            validation=Validation(held_out, budgets, terms=terms) if held_out else None,
            args=training,
            train_dataset=Dataset.from_list([row_of(document) for document in documents]),
            processing_class=tokenizer,
        )
        go_on(trainer, checkpoint)
        trainer.save_model(training.output_dir, _internal_call=True)  # sent at the end, with a whole record
        record.add(log=trainer.state.log_history, steps=trainer.state.global_step)
    if training.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()
    if trainer.is_world_process_zero():
        print(f"gates in {training.output_dir}")


def suitable(documents: list[Document], refine: RefineConfig) -> list[Document]:
    """Texts with an answer, in which something is evicted; says how many are left out."""
    answered = [one for one in documents if one.prompt_length < len(one.input_ids)]
    kept = long_enough(answered, refine.min_budget + refine.period + 2)
    if len(kept) < len(documents):
        left = len(documents) - len(kept)
        warnings.warn(
            f"{left} of {len(documents)} texts are too short or have no answer: left out", LearnevictWarning, 2
        )
    return kept


def row_of(document: Document) -> dict[str, Any]:
    """A document as TRL's datasets have them: its prompt is all that the model reads."""
    own = {"prompt_length": document.prompt_length, "family": document.family, "seed": document.seed}
    return {"prompt": document.input_ids, **own}


def marked(row: dict[str, Any], text: str) -> float:
    """1 if the answer of a testbed sample is right."""
    return float(verify(generate(row["family"], row["seed"], split="train"), text))


def parse(arguments: list[str]) -> tuple[Config, RefineConfig, GRPOConfig]:
    """Flags over a file over DEFAULTS."""
    parts = {"what to refine, and on what": Config, "how": RefineConfig}
    config, refine, training = parse_parts(arguments, parts, GRPOConfig, {**DEFAULTS, **launch_defaults()}, __doc__)
    return config, refine, training


if __name__ == "__main__":
    with told_in_one_line("with a checkpoint in --output_dir, --resume_from_checkpoint true goes on"):
        find_tools()
        main(*parse(sys.argv[1:]))
