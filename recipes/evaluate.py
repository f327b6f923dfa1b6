"""The comparisons behind docs/results.md: methods x families x budgets on the bundled model, on seeds nobody trained on.

    python recipes/evaluate.py                                  # everything; hours on two cores
    python recipes/evaluate.py --stage main --families recall   # a part of it, e.g. one process per family
    scripts/write_tables                                        # then: tables and plots

Stages, in order: `tune` picks the baselines' settings and the best heuristic on validation seeds; `main` compares all
methods under the same rules; `published` leaves each method its own recent window; `prompt` protects the prompt; `long` takes
texts longer than in training; `free` lets the model write its own answers. Every stage goes on where it was interrupted;
numbers are kept per sample, in docs/results/STAGE/FAMILY.samples.jsonl. Processes of different families may run side by side:
each keeps its settings in docs/results/tuning/FAMILY.tuned.json, and all of them together are what `eval --tuned` reads.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from learnevict import methods, testbed
from learnevict.cli.judging import progress
from learnevict.errors import UsageError, told_in_one_line
from learnevict.evals import tuning
from learnevict.evals.contenders import Contender, Rules, contender
from learnevict.evals.plan import Plan, Subject, check_families, count
from learnevict.evals.suite import run
from learnevict.evals.tuning import Tuned
from learnevict.hub import GATES_FOLDER, Gates, weight_hash

STAGES = ("tune", "main", "published", "prompt", "long", "free")
SHARES = ("1/3", "1/4", "1/6", "1/8")
BESIDE_PROMPT = ("32", "24")  # answers have about 100 tokens; those of recall and dialogue have 15: nothing to evict
TALKATIVE = ("program", "ledger", "procedure")
SPEAKERS = ("full", "random", "lexical", "keydiff", "golden", "foresightkv")
FAR = ("full", "random", "lexical", "clausal", "h2o", "keydiff", "golden", "foresightkv")


@dataclass(frozen=True)
class Config:
    """What to run and where to put it."""

    stage: str = "all"
    families: str = ",".join(testbed.FAMILIES)
    samples: int = 200
    tuning_samples: int = 64
    gates: str = str(GATES_FOLDER)
    out: str = "docs/results"
    device: str = "cpu"
    threads: int = 1
    batch_size: int = 50
    smoke: bool = False


def main(config: Config) -> None:
    """Run the stages asked for, family by family."""
    families = config.families.split(",")
    check_families(families)
    torch.set_num_threads(config.threads)
    model, tokenizer = testbed.load(device=config.device)
    subject = Subject(model, tokenizer)
    for stage in STAGES if "all" in config.stage.split(",") else config.stage.split(","):
        for family in families:
            if stage == "tune":
                tune(config, subject, family)
            else:
                compare(config, subject, stage, family)


def tune(config: Config, subject: Subject, family: str) -> None:
    """Settings of one family's heuristics; the other families' are left as they are."""
    plan = Plan((family,), budgets(config), config.tuning_samples, batch_size=config.batch_size)
    names = tuning.training_free() if not config.smoke else ["random", "h2o"]
    folder = Path(config.out)
    tables = [one.gates for one in contenders(config, subject, tuning.TABLES) if one.gates is not None]
    field = tuning.candidates(names, tables)
    with progress(count(plan, field)) as advance:
        found = tuning.tune(plan, subject, field, folder / "tuning" / f"{family}.jsonl", advance=advance)
    tuning.save_part(found, part_path(config, family), tuned_path(config))
    for budget, accuracy in found.accuracy[family].items():
        best = found.best(family, budget)
        print(f"{family} {budget}: {best} {found.settings[family][budget][best]} {accuracy[best]:.3f}")


def compare(config: Config, subject: Subject, stage: str, family: str) -> None:
    """One table, one family."""
    plan = Plan((family,), budgets(config), config.samples, free="none", batch_size=config.batch_size)
    names = methods.METHODS
    if stage == "published":
        plan = replace(plan, rules=Rules(sinks=None, recent=None), budgets=("1/4",))
        names = tuple(tuning.training_free())  # the others have no window of their own
    elif stage == "long":
        plan, names = replace(plan, length="long", budgets=("1/4", "1/8")), FAR
    elif stage == "free":
        plan, names = replace(plan, budgets=("1/4", "1/8"), teacher=False, free="all"), SPEAKERS
    elif stage == "prompt":
        if family not in TALKATIVE:
            return
        plan, names = replace(plan, budgets=BESIDE_PROMPT, rules=Rules(prompt=True)), FAR
    known = settings(config, subject, family) if stage in ("main", "long", "free") else None
    field = contenders(config, subject, names, known)
    out = Path(config.out) / stage / f"{family}.jsonl"
    with progress(count(plan, field)) as advance:
        rows, _ = run(plan, subject, field, out, resume=True, advance=advance)
    print(f"{stage} {family}: {len(rows)} rows in {out}")


def settings(config: Config, subject: Subject, family: str) -> Tuned:
    """Tuned settings, from the family's own file if it is there: no other process writes that one."""
    part = part_path(config, family)
    known = tuning.load(part if part.exists() else tuned_path(config))
    known.check(weight_hash(subject.model))
    if family not in known.settings:
        raise UsageError(f"{family} was not tuned; run --stage tune --families {family} first")
    return known


def contenders(config: Config, subject: Subject, names: tuple[str, ...], known: Tuned | None = None) -> list[Contender]:
    """Methods with the testbed's gates, and tuned settings or their own."""
    found: list[Contender] = []
    for name in names:
        folder = Path(config.gates) / f"testbed-{name}"
        learned = methods.load(name).PAPER.kind == "learned"
        if learned and config.smoke and not folder.is_dir():
            continue
        gates = Gates.load(folder, subject.model) if learned else None
        found.append(contender(name, gates, tuned=known.of(name) if known else None))
    return found


def budgets(config: Config) -> tuple[str, ...]:
    """Shares of a family's mean length."""
    return ("1/4",) if config.smoke else SHARES


def tuned_path(config: Config) -> Path:
    """Where tuned settings are kept: inside the package, so that `learnevict eval --tuned` finds them."""
    return Path(config.out) / "tuned.json" if config.smoke else tuning.TUNED


def part_path(config: Config, family: str) -> Path:
    """Where one family's settings are kept, beside the numbers they come from."""
    return Path(config.out) / "tuning" / f"{family}.tuned.json"


def stages(text: str) -> str:
    """A stage, several between commas, or all."""
    if unknown := [name for name in text.split(",") if name not in ("all", *STAGES)]:
        raise argparse.ArgumentTypeError(f"no stage {', '.join(unknown)}; choose all, {', '.join(STAGES)}")
    return text


def parse() -> Config:
    """Every field of Config is a flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            flag = f"--{field.name.replace('_', '-')}"
            kind = stages if field.name == "stage" else type(field.default)
            parser.add_argument(flag, type=kind, default=field.default)
    given = vars(parser.parse_args())
    if given["smoke"]:
        given |= {"samples": 4, "tuning_samples": 4, "out": "runs/evaluate-smoke", "families": "recall"}
    return Config(**given)


if __name__ == "__main__":
    with told_in_one_line("run the same command again to go on"):
        main(parse())
