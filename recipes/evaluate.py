"""Runs the comparisons behind docs/results.md: methods x families x budgets on the bundled model, on test seeds.

    python recipes/evaluate.py                                              # everything; hours on two cores
    python recipes/evaluate.py --stage main --families recall               # a part of it, e.g. one process per family
    python recipes/evaluate.py --stage main,free --replace foresightkv      # after its gates were trained anew
    scripts/write_tables                                                    # then: tables and plots

Who takes part: all methods that need no training, and every folder testbed-NAME in --gates, under that NAME: refined gates, and
"NAME-sl" beside them, the supervised ones that refinement started from. Learned methods without gates are left out.

Stages, in order: `tune` picks the baselines' settings and the best heuristic on validation seeds; `main` compares all
methods under the same settings; `published` leaves each method its own recent window; `prompt` protects the prompt; `long`
takes texts longer than in training; `free` lets the model write its own answers. Every stage goes on where it was interrupted;
numbers are kept per sample, in docs/results/STAGE/FAMILY.samples.jsonl. Processes of different families may run side by side:
each keeps its settings in docs/results/tuning/FAMILY.tuned.json, and all of them together are what `eval --tuned` reads. With
another --out everything is kept and read there, those settings too (tuned.json), and the package's are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from learnevict import methods, testbed
from learnevict.cli.output import progress
from learnevict.config import Budget
from learnevict.errors import UsageError, told_in_one_line
from learnevict.evals.methods import EvaluatedMethod, EvaluationSettings, evaluated_method
from learnevict.evals.plan import EvaluatedModel, Plan, count
from learnevict.evals.suite import run
from learnevict.evals.tasks import family_tasks
from learnevict.evals.tuning import Tuned
from learnevict.files import locked
from learnevict.hub import GATES_FOLDER, Gates, weight_hash
from learnevict.train.run.flags import check_fields, flag, read_flags
from tools.results import tuning
from tools.results.records import forget

STAGES = ("tune", "main", "published", "prompt", "long", "free")
SHARES = ("1/3", "1/4", "1/6", "1/8", "1/12", "1/15")
FREE_BUDGETS = ("1/4", "1/6", "1/8", "1/12")
BESIDE_PROMPT = ("32", "24")  # answers have about 100 tokens; those of recall and dialogue have 15: nothing to evict
TALKATIVE = ("program", "ledger", "procedure")
FREE_METHODS = ("full", "random", "keydiff", "golden", "foresightkv-sl", "foresightkv")
FAR = ("full", "random", "h2o", "keydiff", "golden")  # and whoever has gates
SMOKE = {"families": "recall", "samples": 4, "tuning_samples": 4, "out": "runs/evaluate-smoke"}


@dataclass(frozen=True)
class Config:
    """The stages to run, and where their numbers go."""

    stage: str = flag("all", f"all, or some of {', '.join(STAGES)} between commas")
    families: str = flag(",".join(testbed.FAMILIES), "names between commas")
    methods: str = flag("", "names between commas; otherwise those of the stage")
    budgets: str = flag("", "such as 1/12,1/15; otherwise those of the stage")
    replace: str = flag("", "a name whose numbers are dropped first")
    samples: int = flag(200, "of each family")
    tuning_samples: int = flag(64, "of each family, for the stage tune")
    gates: str = flag(str(GATES_FOLDER), "a folder of gates testbed-NAME")
    out: str = flag("docs/results", "a folder; what is in it is kept")
    device: str = flag("cpu", "of the model")
    threads: int = flag(1, "of torch", most=1024)
    batch_size: int = flag(50, "samples at a time")
    smoke: bool = flag(False, "seconds, the same code")

    def __post_init__(self) -> None:
        check_fields(self)
        if unknown := [name for name in self.stage.split(",") if name not in ("all", *STAGES)]:
            raise UsageError(f"no stage {', '.join(unknown)}; choose all, {', '.join(STAGES)}")
        if not Path(self.gates).is_dir():
            raise UsageError(f"--gates {self.gates!r}: there is no such folder")
        for budget in listed(self.budgets):
            Budget.parse(budget)


def main(config: Config) -> None:
    """Runs the stages, family by family."""
    families = listed(config.families)
    family_tasks(families)  # refuses those that do not exist
    torch.set_num_threads(config.threads)
    model, tokenizer = testbed.load(device=config.device)
    subject = EvaluatedModel(model, tokenizer)
    field = everybody(config, subject)
    check_names([*listed(config.methods), *listed(config.replace)], field)
    for stage in STAGES if "all" in config.stage.split(",") else config.stage.split(","):
        for family in families:
            if config.replace:
                drop(config, stage, family)
            if stage == "tune":
                tune(config, subject, family, field)
            else:
                compare(config, subject, (stage, family), field)


def everybody(config: Config, subject: EvaluatedModel) -> dict[str, EvaluatedMethod]:
    """Returns the evaluated methods by name, in their order, of one method the refined gates last."""
    folders = sorted(Path(config.gates).glob("testbed-*"), key=lambda path: path.name, reverse=True)
    gates = {folder.name.removeprefix("testbed-"): Gates.load(folder, subject.model) for folder in folders}
    found: dict[str, EvaluatedMethod] = {}
    for method in methods.METHODS:
        if methods.load(method).PAPER.kind != "learned":
            found[method] = evaluated_method(method)
        found |= {name: evaluated_method(method, one, name=name) for name, one in gates.items() if one.method == method}
    return found


def drop(config: Config, stage: str, family: str) -> None:
    """Removes a method's numbers, so that they are made anew."""
    out = rows_path(config, stage, family)
    with locked(out if out.parent.exists() else None):
        for name in listed(config.replace):
            rows, batches = forget(out, name)
            print(f"{stage} {family}: dropped {rows} rows and {batches} batches of {name}")


def tune(config: Config, subject: EvaluatedModel, family: str, field: dict[str, EvaluatedMethod]) -> None:
    """Settings of one family's heuristics; the other families' are left as they are."""
    plan = Plan(family_tasks([family]), budgets(config, SHARES), config.tuning_samples, batch_size=config.batch_size)
    names = tuning.training_free() if not config.smoke else ["random", "h2o"]
    tables = [gates for name in tuning.TABLES if name in field and (gates := field[name].gates) is not None]
    settings = tuning.candidates(names, tables)
    tuning.check_alike(tuning.record_of(plan, subject, settings), part_path(config, family), tuned_path(config))
    with progress(count(plan, settings)) as advance:
        found = tuning.tune(plan, subject, settings, rows_path(config, "tune", family), advance=advance)
    tuning.save_part(found, part_path(config, family), tuned_path(config))
    for budget, accuracy in found.accuracy[family].items():
        best = found.best(family, budget)
        print(f"{family} {budget}: {best} {found.settings[family][budget][best]} {accuracy[best]:.3f}")


def compare(config: Config, subject: EvaluatedModel, cell: tuple[str, str], field: dict[str, EvaluatedMethod]) -> None:
    """Runs one table for one family."""
    stage, family = cell
    plan = Plan(
        family_tasks([family]),
        budgets(config, SHARES),
        config.samples,
        free="none",
        batch_size=config.batch_size,
        lenient=True,
    )
    trained = [name for name, one in field.items() if one.gates is not None]
    names: Sequence[str] = list(field)
    if stage == "published":
        plan = replace(plan, settings=EvaluationSettings(sinks=None, recent=None), budgets=budgets(config, ("1/4",)))
        names = tuning.training_free()  # the others have no window of their own
    elif stage == "long":
        plan, names = (
            replace(plan, tasks=family_tasks([family], length="long"), budgets=budgets(config, ("1/4", "1/8"))),
            [*FAR, *trained],
        )
    elif stage == "free":
        plan, names = replace(plan, budgets=budgets(config, FREE_BUDGETS), teacher=False, free="all"), FREE_METHODS
    elif stage == "prompt":
        if family not in TALKATIVE:
            return
        plan, names = (
            replace(plan, budgets=budgets(config, BESIDE_PROMPT), settings=EvaluationSettings(prompt=True)),
            [*FAR, *trained],
        )
    known = settings(config, subject, family, field) if stage in ("main", "long", "free") else None
    chosen = [field[name] for name in listed(config.methods) or names if name in field]
    chosen = [replace(one, tuned=known.of(one.method) if known else {}) for one in chosen]
    out = rows_path(config, stage, family)
    with progress(count(plan, chosen)) as advance:
        rows, _ = run(plan, subject, chosen, out, resume=True, advance=advance)
    print(f"{stage} {family}: {len(rows)} rows in {out}")


def settings(config: Config, subject: EvaluatedModel, family: str, field: dict[str, EvaluatedMethod]) -> Tuned:
    """Returns tuned settings, from the family's own file if it is there: no other process writes that one."""
    part = part_path(config, family)
    known = tuning.load(part if part.exists() else tuned_path(config))
    known.check(weight_hash(subject.model), {name: field[name].gates for name in tuning.TABLES if name in field})
    if family not in known.settings:
        raise UsageError(f"{family} was not tuned; run --stage tune --families {family} first")
    return known


def budgets(config: Config, usual: Sequence[str]) -> tuple[str, ...]:
    """Shares of a family's mean length, or slots."""
    return tuple(listed(config.budgets)) or (usual[:1] if config.smoke else tuple(usual))


def rows_path(config: Config, stage: str, family: str) -> Path:
    """Returns the path of rows."""
    return Path(config.out) / ("tuning" if stage == "tune" else stage) / f"{family}.jsonl"


def tuned_path(config: Config) -> Path:
    """Returns the path of tuned settings: in the package, where `learnevict eval --tuned` looks, or in another --out."""
    usual = Path(config.out).resolve() == Path(Config.out).resolve()
    return tuning.TUNED if usual and not config.smoke else Path(config.out) / "tuned.json"


def part_path(config: Config, family: str) -> Path:
    """Returns the path of one family's settings, beside the numbers they come from."""
    return Path(config.out) / "tuning" / f"{family}.tuned.json"


def listed(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check_names(names: Sequence[str], field: dict[str, EvaluatedMethod]) -> None:
    """Raises a UsageError for names that cannot take part.

    Raises:
        UsageError: naming who can.
    """
    if unknown := [name for name in names if name not in field]:
        raise UsageError(f"nobody is called {', '.join(unknown)}; there are {', '.join(field)}")


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns the settings that a command line asks for."""
    return read_flags({"options": Config}, arguments, __doc__, smoke=SMOKE).of(Config)


if __name__ == "__main__":
    with told_in_one_line("run the same command again to go on"):
        main(parse())
