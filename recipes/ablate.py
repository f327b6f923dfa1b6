"""Measures what each correction of the reinforcement stage buys: short refinements of one start, one thing changed at a time.

    python recipes/ablate.py                                      # about 40 minutes on a core
    scripts/write_tables                                           # the table and the curves of docs/results.md

Variants climb from the paper's letter (arXiv 2602.03203) to recipes/grpo.py; all see the same texts in the same order, and are
evaluated on validation samples that none has seen. A variant that is there already is not run again; one that was run from
another start, for other steps or under other settings is refused, for one table compares what differs in one thing only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from learnevict.cli.output import progress
from learnevict.data.opening import load_base, read_source
from learnevict.errors import UsageError, needing, told_in_one_line
from learnevict.evals.methods import EvaluatedMethod, evaluated_method
from learnevict.evals.plan import EvaluatedModel, Plan, count
from learnevict.evals.suite import run
from learnevict.evals.tasks import family_tasks
from learnevict.files import write
from learnevict.hub import GATES_FOLDER, Gates, weight_hash
from learnevict.rl.config import RefineConfig
from learnevict.train.run.flags import check_fields, flag, read_flags
from tools.results.ablations import check_same, read_variants

with needing("train"):
    from datasets import Dataset
    from trl import GRPOConfig

    from learnevict.rl.trainer import EvictionTrainer

SHARES = ("1/6", "1/8", "1/12")
START = "the supervised start"
PAPER = RefineConfig(credit="trace", cost="thresholded", min_budget=45, max_budget=45, pool=2, draw_temperature=1.0)
CAPPED = replace(PAPER, cost="low_entropy", pool=0, draw_temperature=0.5)
ANY = replace(CAPPED, min_budget=22, max_budget=64)
FULL = replace(ANY, credit="attention")
VARIANTS = {
    "paper's reward and credit, one budget": PAPER,
    "capped cost, all candidates, cooler draws": CAPPED,
    "and a budget drawn for every step": ANY,
    "and reward to go": replace(ANY, credit="to_go"),
    "and half of the layers at a time": replace(ANY, credit="to_go", layer_share=0.5),
    "credit by attention instead": FULL,
    "and KL to the start": replace(FULL, kl=0.05),
    "and layers share the budget as learned": replace(FULL, share_spread=0.3),
    "or all heads compete": replace(FULL, scope="model"),
}


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    start_from: str = flag(str(GATES_FOLDER / "testbed-foresightkv-sl"), "supervised gates, a folder or Hub id")
    out: str = flag("docs/results/ablations.json", "what is finished is kept there")
    variants: str = flag("", "names between semicolons; default: all")
    steps: int = flag(60, "of every refinement")
    rows: int = flag(32, "traces per step, in groups of 8")
    samples: int = flag(60, "to evaluate on")
    smoke: bool = flag(False, "seconds, the same code")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rows % 8:
            raise UsageError(f"--rows {self.rows}: traces come in groups of 8; give a multiple of that")


SMOKE = {
    "variants": "credit by attention instead", "steps": 1, "rows": 8, "samples": 4, "out": "runs/ablations-smoke.json"
}  # fmt: skip


class Advancing(TrainerCallback):
    """Moves the bar on after every step."""

    def __init__(self, advance: Callable[[str, int], None], name: str) -> None:
        self.advance, self.name = advance, name

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.advance(self.name, 1)


def refine(
    variant: dict[str, Any], config: Config, subject: EvaluatedModel, gates: Gates, advance: Any
) -> dict[str, Any]:
    """Returns one short refinement: its settings, its curve, and its right answer-mask tokens, sample by sample."""
    base, tokenizer, steps = subject.model, subject.tokenizer, variant["steps"]
    log: list[dict[str, Any]] = []
    if steps:
        texts = read_source("testbed", tokenizer, steps * config.rows // 8, first_seed=20_000, families=("program",))
        data = [{"prompt": text.input_ids, "prompt_length": text.prompt_length} for text in texts]
        arguments = GRPOConfig(
            output_dir=str(Path(config.out).parent / "ablation"), max_steps=steps,
            per_device_train_batch_size=config.rows, num_generations=8, learning_rate=1.5e-3,
            lr_scheduler_type="cosine", warmup_steps=5, logging_steps=1, save_strategy="no", report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False, seed=7, disable_tqdm=True,
        )  # fmt: skip
        trainer = EvictionTrainer(
            gates,
            base=base,
            refine=RefineConfig(**variant["settings"]),
            args=arguments,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=[Advancing(advance, variant["name"])],
        )
        trainer.train()
        log = trainer.state.log_history
    plan, field = evaluation(config, gates)
    found, numbers = run(plan, subject, field, advance=advance)
    counts = {}
    for key, cell in numbers.entries.items():
        if key.method != "full":
            counts[key.budget] = {part: [cell[seed][part] for seed in plan.seeds] for part in ("right", "seen")}
    accuracy = {row["budget_share"]: row["step_accuracy"] for row in found if row["budget_share"]}
    print(variant["name"], {share: round(value, 4) for share, value in accuracy.items()}, flush=True)
    return {**variant, "cost": [line["cost"] for line in log if "cost" in line], "counts": counts}


def evaluation(config: Config, gates: Gates) -> tuple[Plan, list[EvaluatedMethod]]:
    """Returns the plan of a variant's evaluation, and the method evaluated."""
    tasks = family_tasks(["program"], split="validation")
    plan = Plan(tasks, SHARES, config.samples, seed=4000, free="none", batch_size=60, oracle=False)
    return plan, [evaluated_method(gates.method, gates)]


def wanted(config: Config, start: Gates) -> list[dict[str, Any]]:
    """Returns the variants to run, the start first: name, settings, and what all have in common.

    Raises:
        UsageError: no such variant.
    """
    names = [name.strip() for name in config.variants.split(";") if name.strip()] or list(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UsageError(f"no variant {'; '.join(unknown)}; choose from {'; '.join(VARIANTS)}")
    terms = {"rows": config.rows, "samples": config.samples, "start": weight_hash(start)}
    found = [{"name": START, "settings": asdict(RefineConfig()), "steps": 0, **terms}]
    return found + [
        {"name": name, "settings": asdict(VARIANTS[name]), "steps": config.steps, **terms} for name in names
    ]


def main(config: Config) -> None:
    """Runs the variants that are missing."""
    base, tokenizer = load_base("testbed", device="cpu")
    subject, start, out = EvaluatedModel(base, tokenizer), Gates.load(config.start_from, base), Path(config.out)
    variants = wanted(config, start)
    done = read_variants(out) if out.exists() else []
    for one in done:  # settings that RefineConfig did not have then
        one["settings"] = {**asdict(RefineConfig()), **one["settings"]}
    check_same(done, variants, out)
    missing = [one for one in variants if one["name"] not in {other["name"] for other in done}]
    total = sum(one["steps"] + count(*evaluation(config, start)) for one in missing)
    with progress(total) as advance:
        for variant in missing:
            done.append(refine(variant, config, subject, Gates.load(config.start_from, base), advance))
            out.parent.mkdir(parents=True, exist_ok=True)
            write(out, json.dumps(done) + "\n", b'[{"name": ')


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns the settings that a command line asks for."""
    return read_flags({"options": Config}, arguments, __doc__, smoke=SMOKE).of(Config)


if __name__ == "__main__":
    with told_in_one_line("variants that are finished are kept: run the same command again"):
        main(parse())
