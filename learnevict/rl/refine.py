"""Refine a slot scorer by GRPO over its own evictions (reinforcement stage of ForesightKV, arXiv 2602.03203).

Examples:

    learnevict refine --start_from runs/foresightkv --output_dir runs/refined         the same as recipes/grpo.py
    learnevict refine --share_spread 0.3 --output_dir runs/shares                     layers learn to share the budget
    learnevict refine --scope model --output_dir runs/together                        slots of all heads and layers compete
    learnevict refine config.yaml --max_steps 100                                     flags from a file, others after it

A text is read G times under sampled evictions, and what a trace adds to the language model's loss, at tokens that the full
cache is sure of, is what it costs. The base model is frozen and never writes a word (but see --free_every).
Departures from the paper: the log-probability is that of the sampling law (Plackett-Luce over the stored candidates); a budget
is sampled for every step; the cost of a token is capped; and every eviction gets an advantage of its own, by the attention
that the full cache pays from the costly tokens to the evicted one, where the paper gives one number to all evictions of a trace
(--credit trace; --credit to_go counts what comes after an event). Resume with --resume_from_checkpoint true.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

from transformers import set_seed

from learnevict.data.documents import long_enough
from learnevict.data.label_store import Document
from learnevict.data.opening import describe_base, load_base, longest_text, read_for_learning
from learnevict.data.sources import Source
from learnevict.errors import LearnevictWarning, UsageError, needing
from learnevict.hub import GATES_FOLDER, Gates
from learnevict.rl.config import RefineConfig
from learnevict.testbed import families_of, generate, verify
from learnevict.train.run.estimate import ProgramFlags, estimate, length_of, report
from learnevict.train.run.flags import flag, read_flags
from learnevict.train.run.launch import check_launch, find_tools, launch_defaults
from learnevict.train.run.phases import RunPlan
from learnevict.train.run.resume import run, smoke_folder
from learnevict.train.validation import Validation


@dataclass
class RefineProgramConfig(ProgramFlags):
    """Settings of a refinement: the gates, and the texts."""

    start_from: str = flag(str(GATES_FOLDER / "testbed-foresightkv-sl"), "gates that score slots, a folder or Hub id")
    model: str = flag("testbed", "base model: testbed, a folder, a name of `learnevict model list` or a Hub id")
    allow_pickle: bool = flag(
        False, "read weights of the model that are pickles (.bin) too; otherwise safetensors only"
    )
    data: str = flag("testbed", "testbed; a file, a folder or a dataset of the Hub with prompts and answers")
    families: str = flag("", "of the testbed, comma-separated; one named again brings more texts; otherwise all")
    documents: int = flag(4000, "to learn from at most")
    max_length: int = flag(4096, "tokens of a document at most")
    eval_documents: int = flag(16, "held out for evaluations (--eval_strategy steps)", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        families_of(self.families)


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


def main(config: RefineProgramConfig, refine: RefineConfig, training: Any) -> None:
    """Reads texts, refines the gates on them, and saves the gates; with --dry-run only prints what that would take.

    Args:
        config, refine: settings of the run, and of sampling, costs and credit.
        training: a trl.GRPOConfig.
    """
    settle(config, training)
    if config.dry_run:
        sys.stdout.write(f"{estimated(config, refine, training)}\n")
        return
    set_seed(training.seed)
    base, tokenizer = load_base(config.model, device=str(training.device), allow_pickle=config.allow_pickle)
    gates = Gates.load(config.start_from, base)

    source, num_held = Source(config.data, max_length=config.max_length), config.eval_documents * training.do_eval
    documents, held_out = read_for_learning(source, tokenizer, config.documents, num_held, families_of(config.families))
    documents = suitable(documents, refine)

    from datasets import Dataset

    from learnevict.rl.trainer import EvictionTrainer

    budgets = (str(refine.min_budget), str(refine.max_budget))
    options = {"sinks": refine.sinks, "recent": refine.recent, "slack": refine.period}
    settings = {"config": vars(config), "refine": vars(refine)}
    with run("grpo", gates, training, settings, (documents, held_out)) as running:
        running.train(
            EvictionTrainer(  # rollout, reward, advantage and loss of a step, in this order: learnevict/rl/trainer.py
                gates,
                base=base,
                refine=refine,
                verifier=marked if config.data == "testbed" else None,
                validation=Validation(held_out, budgets, terms=options) if held_out else None,
                args=training,
                train_dataset=Dataset.from_list([row_of(document) for document in documents]),
                processing_class=tokenizer,
            )
        )


def settle(config: RefineProgramConfig, training: Any) -> None:
    """Makes training arguments, a trl.GRPOConfig, agree with the program's own flags, or raises a UsageError."""
    if config.smoke:
        config.documents, config.eval_documents = 8, 2
        training.max_steps, training.save_steps, training.logging_steps = 2, 2, 1
        smoke_folder(training, str(DEFAULTS["output_dir"]))
    check_launch(training)
    if training.do_eval and config.eval_documents < 1:
        raise UsageError("an evaluation needs --eval_documents of at least 1")


def estimated(config: RefineProgramConfig, refine: RefineConfig, training: Any) -> str:
    """Returns what the run would take, in figures for people; of the base, only the configuration is read."""
    (described, dtype), gates = describe_base(config.model), Gates.load(config.start_from)
    length: Any = length_of(training, config.gpus, config.documents)
    plan = RunPlan(
        "grpo",
        longest_text(config.data, config.max_length),
        training.per_device_train_batch_size,
        period=refine.period,
        budgets=(refine.min_budget, refine.max_budget),
        group=training.num_generations,
        settings=dict(gates.config.settings),
        dtype=dtype,
        **length,
    )
    return report(estimate(described, gates.method, plan), config.gpu_memory)


def suitable(documents: list[Document], refine: RefineConfig) -> list[Document]:
    """Returns the texts with an answer in which something is evicted; warns of those left out."""
    answered = [one for one in documents if one.prompt_length < len(one.input_ids)]
    if left := len(documents) - len(answered):
        warnings.warn(f"{left} of {len(documents)} texts have no answer: left out", LearnevictWarning, 2)
    return long_enough(answered, refine.min_budget + refine.period + 2)


def row_of(document: Document) -> dict[str, Any]:
    """Returns a document as a row of TRL's datasets: its prompt is all that the model reads."""
    own = {"prompt_length": document.prompt_length, "family": document.family, "seed": document.seed}
    return {"prompt": document.input_ids, **own}


def marked(row: dict[str, Any], text: str) -> float:
    """Returns 1 if the answer of a testbed sample is right."""
    return float(verify(generate(row["family"], row["seed"], split="train"), text))


def parse(arguments: list[str], program: str | None = None) -> tuple[RefineProgramConfig, RefineConfig, Any]:
    """Reads flags, over those of a YAML file, over DEFAULTS; the last is a trl.GRPOConfig.

    Args:
        arguments: of a command line.
        program: the command's name for --help; None: that of this process.
    """
    with needing("train"):
        from datasets import Dataset as Dataset
        from trl.trainer.grpo_config import GRPOConfig
    find_tools()
    parts = {"what to refine, and on what": RefineProgramConfig, "how": RefineConfig, "options": GRPOConfig}
    defaults = {**DEFAULTS, **launch_defaults()}
    found = read_flags(parts, arguments, __doc__, defaults=defaults, program=program)
    config, refine, training = map(found.of, parts.values())
    return config, refine, training
