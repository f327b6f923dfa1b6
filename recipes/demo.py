"""Labels, trains and compares, in minutes on a laptop.

    python recipes/demo.py                       # or scripts/demo, which sets everything up first

Golden labels for a few hundred training texts, a scorer trained on them from scratch, then the bundled model reasons under a
small cache: heuristics, table baselines, the oracle and the scorer side by side on unseen samples. Writes report.json,
table.md and accuracy.png. The scorer shipped with the package was trained longer, by the same code, on all five families.

Run again, it goes on where it was interrupted: labels are kept shard by shard, a scorer trained to its end is not trained
again, nor is a sample evaluated again. Another number of documents or steps, or another base model, begins anew; labels, gates
and numbers of the former run stay beside the new ones.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import oracle
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from learnevict import testbed
from learnevict.errors import told_in_one_line
from learnevict.evals import metrics
from learnevict.evals.methods import EvaluatedMethod, evaluated_method
from learnevict.evals.plan import EvaluatedModel, Key, Plan, count
from learnevict.evals.records import MARK, Row
from learnevict.evals.report import write_report
from learnevict.evals.sample_log import SampleLog
from learnevict.evals.suite import run
from learnevict.evals.tasks import family_tasks
from learnevict.files import write
from learnevict.hub import GATES_FOLDER, Gates, weight_hash
from learnevict.hub.run_record import read_record
from learnevict.train import distill
from learnevict.train.run.flags import check_fields, flag, read_flags

FAMILIES = ("program", "recall")
BUDGETS = ("1/4", "1/8")
BASELINES = ("random", "lexical", "clausal", "streaming_llm", "h2o", "snapkv", "tova", "keydiff")
SCORER = "foresightkv"
console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    out: Path = flag(Path("checkpoints/demo"), "goes on with what it finds there")
    samples: int = flag(48, "unseen samples per family")
    documents: int = flag(480, "training texts to label")
    steps: int = flag(160, "training steps of the scorer")

    def __post_init__(self) -> None:
        check_fields(self)


def learn(out: Path, base_hash: str, documents: int, steps: int) -> Path:
    """Labels what is not labelled yet, and trains unless a scorer of the same labels, steps and base is there."""
    console.rule("1. golden labels: what the future attends to")
    labels = out / f"labels-{documents}-{base_hash[:8]}"
    oracle.main(oracle.Config(out=labels, documents=documents, families=",".join(FAMILIES)))
    console.rule("2. a scorer learns to rank tokens as the oracle does")
    folder = out / f"gates-{steps}-of-{labels.name}"
    if (read_record(folder) or {}).get("status") == "finished":
        console.print(f"the scorer in {folder} has learned this already", soft_wrap=True)
    else:
        flags = ["--labels", str(labels), "--output_dir", str(folder), "--max_steps", str(steps)]
        distill.main(distill.parse([*flags, "--save_strategy", "no"]))
    return folder


def compare(
    plan: Plan, evaluated_methods: Sequence[EvaluatedMethod], subject: EvaluatedModel, out: Path
) -> tuple[list[Row], SampleLog]:
    """Runs every method on the same unseen samples."""
    console.rule("3. reasoning under a small cache")
    bar = Progress(
        TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with bar:
        task = bar.add_task("", total=count(plan, evaluated_methods))
        return run(
            plan,
            subject,
            evaluated_methods,
            out,
            resume=True,
            advance=lambda label, done: bar.update(task, description=label, advance=done),
        )


def comparison(log: SampleLog, plan: Plan, names: Sequence[str]) -> tuple[Table, bool]:
    """Returns a table of the scorer minus every baseline in step accuracy, on the same samples, with paired intervals.

    True if all intervals over both families are above 0. Families weigh the same there. Each is shown by itself too: where a
    baseline gets one of them right to the last token, nobody can be better.
    """
    table = Table(title=f"{SCORER} minus baseline, step accuracy (95 % paired interval)")
    table.add_column("baseline")
    columns = [(families, budget) for budget in plan.budgets for families in (*((one,) for one in FAMILIES), FAMILIES)]
    for families, budget in columns:
        table.add_column(f"{' + '.join(families)} {budget}", justify="right")
    better = True
    for name in names:
        cells = []
        for families, budget in columns:
            right, other, seen = (
                [value for family in families for value in shares(log, plan, method, family, budget, what)]
                for method, what in ((SCORER, "right"), (name, "right"), (SCORER, "seen"))
            )
            gain = metrics.paired_difference(right, other, seen)
            better = better and (gain.low > 0 or families != FAMILIES)
            cells.append(f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
        table.add_row(name, *cells)
    return table, better


def shares(log: SampleLog, plan: Plan, method: str, family: str, budget: str, what: str) -> list[float]:
    """Returns one number per sample, as a share of the tokens of the family's answer masks."""
    found, seen = (
        log.column(Key(one, family, budget, "teacher"), plan.seeds, kind)
        for one, kind in ((method, what), (SCORER, "seen"))
    )
    assert found is not None, f"{method} was not run on {family} at {budget}"
    assert seen is not None, f"{SCORER} was not run on {family} at {budget}"
    return [value / sum(seen) for value in found]


def show(rows: Sequence[Row]) -> Table:
    """Returns a table of the accuracy and bytes of every method."""
    table = Table(title="unseen samples: step accuracy (teacher-forced), exact match (free generation), cache")
    for name in ("family", "budget", "method", "step accuracy", "exact match", "peak KiB", "full KiB"):
        table.add_column(name, justify="left" if name in ("family", "method") else "right")
    for row in sorted(rows, key=lambda row: (row["family"], -(row["budget"] or 10**6), row["step_accuracy"] or 0)):
        exact = "" if row["exact_match"] is None else f"{row['exact_match']:.3f}"
        size = [f"{(row[key] or 0) / 1024:.0f}" for key in ("kv_bytes_peak", "kv_bytes_full")]
        table.add_row(
            row["family"], str(row["budget"] or "full"), row["method"], f"{row['step_accuracy']:.3f}", exact, *size
        )
    return table


def main(out: Path, samples: int, documents: int, steps: int) -> bool:
    """Labels, trains, compares and reports; returns True if the scorer beats every baseline at both budgets."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = testbed.load()
    folder = learn(out, weight_hash(model), documents, steps)
    gates = {name: Gates.load(GATES_FOLDER / f"testbed-{name}", model) for name in ("lexical", "clausal")}
    gates[SCORER] = Gates.load(folder, model)
    evaluated_methods = [evaluated_method(name, gates.get(name)) for name in ("full", "golden", *BASELINES, SCORER)]
    plan = Plan(family_tasks(FAMILIES), BUDGETS, samples, free="all")
    mine = out / f"rows-{weight_hash(gates[SCORER])[:8]}.jsonl"  # numbers of one scorer: another one has its own
    rows, log = compare(plan, evaluated_methods, EvaluatedModel(model, tokenizer), mine)
    write(out / "report.json", json.dumps({"rows": rows}, indent=1), MARK)
    write_report(rows, out)
    console.rule("4. what came out")
    console.print(show(rows))
    table, better = comparison(log, plan, BASELINES)
    console.print(table)
    console.print(f"{out}/report.json, table.md, accuracy.png; {time.monotonic() - began:.0f} s")
    said = "beats" if better else "does NOT beat"
    console.print(f"over {' and '.join(FAMILIES)} the freshly trained scorer {said} every baseline at both budgets")
    return better


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns the settings that a command line asks for."""
    return read_flags({"options": Config}, arguments, __doc__).of(Config)


if __name__ == "__main__":
    with told_in_one_line("run the same command again to go on"):
        main(**vars(parse()))
