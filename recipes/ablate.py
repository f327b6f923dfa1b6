"""What each correction of the reinforcement stage buys: short refinements of one start, one thing changed at a time.

    python recipes/ablate.py                                      # about 40 minutes on a core
    scripts/write_tables                                           # the table and the curves of docs/results.md

Variants climb from the paper's letter (arXiv 2602.03203) to recipes/grpo.py; all see the same texts in the same order, and are
judged on validation samples that none has seen. A variant that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from learnevict.errors import told_in_one_line
from learnevict.evals.contenders import contender
from learnevict.evals.plan import Plan, Subject
from learnevict.evals.suite import run
from learnevict.hub import GATES_FOLDER, Gates
from learnevict.rl.rollout import RefineConfig
from learnevict.rl.trainer import EvictionTrainer
from learnevict.testbed.corpus import load_base, read_source

SHARES = ("1/6", "1/8", "1/12")
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


def refine(name: str, config: RefineConfig, start: str, steps: int, rows: int, folder: Path) -> dict[str, Any]:
    """One short refinement: its settings, its curve, and how many checked tokens are right under it, sample by sample."""
    base, tokenizer = load_base("testbed", device="cpu")
    gates = Gates.load(start, base)
    texts = read_source("testbed", tokenizer, steps * rows // 8, first_seed=20_000, families=("program",))
    data = [{"prompt": text.input_ids, "prompt_length": text.prompt_length} for text in texts]
    if steps:
        arguments = GRPOConfig(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=rows, num_generations=8,
            learning_rate=1.5e-3, lr_scheduler_type="cosine", warmup_steps=5, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, seed=7, disable_tqdm=True,
        )  # fmt: skip
        trainer = EvictionTrainer(
            gates,
            base=base,
            refine=config,
            args=arguments,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
        trainer.train()
    log = trainer.state.log_history if steps else []
    plan = Plan(("program",), SHARES, 60, seed=4000, split="validation", free="none", batch_size=60)
    found, journal = run(plan, Subject(base, tokenizer), [contender(gates.method, gates)])
    counts = {}
    for key, cell in journal.entries.items():
        if key.method != "full":
            counts[key.budget] = {part: [cell[seed][part] for seed in plan.seeds] for part in ("right", "seen")}
    accuracy = {row["budget_share"]: row["step_accuracy"] for row in found if row["budget_share"]}
    print(name, {share: round(value, 4) for share, value in accuracy.items()}, flush=True)
    own = {"settings": asdict(config), "steps": steps, "rows": rows}
    return {"name": name, **own, "cost": [line["cost"] for line in log if "cost" in line], "counts": counts}


def main(start: str, out: Path, steps: int, rows: int) -> None:
    """Run what is missing."""
    done = json.loads(out.read_text()) if out.exists() else []
    wanted: list[tuple[str, RefineConfig, int]] = [("the supervised start", RefineConfig(), 0)]
    wanted += [(name, config, steps) for name, config in VARIANTS.items()]
    for name, config, length in wanted:
        if name not in {one["name"] for one in done}:
            done.append(refine(name, config, start, length, rows, out.parent / "ablation"))
            fresh = out.with_suffix(".part")
            fresh.write_text(json.dumps(done) + "\n")
            os.replace(fresh, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start_from", default=str(GATES_FOLDER / "testbed-foresightkv-sl"), help="supervised gates")
    parser.add_argument("--out", type=Path, default=Path("docs/results/ablations.json"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=32, help="traces per step, in groups of 8")
    given = parser.parse_args()
    with told_in_one_line("variants that are finished are kept: run the same command again"):
        main(given.start_from, given.out, given.steps, given.rows)
