"""The comparisons behind docs/results.md: methods x families x budgets on the bundled model, on seeds nobody trained on.

    python recipes/evaluate.py                                  # everything; hours on two cores
    python recipes/evaluate.py --stage main --families recall   # a part of it, e.g. one process per family
    scripts/write_tables                                        # then: tables and plots

Stages, in order: `tune` picks the baselines' settings and the best heuristic on validation seeds; `main` compares all
methods under the same rules; `published` leaves each method its own recent window; `prompt` protects the prompt; `long` takes
texts longer than in training; `free` lets the model write its own answers. Every stage goes on where it was interrupted;
numbers are kept per sample, in docs/results/STAGE/FAMILY.samples.jsonl.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from learnevict import methods, testbed
from learnevict.cli.judging import progress
from learnevict.evals import tuning
from learnevict.evals.contenders import Contender, Rules, contender
from learnevict.evals.plan import Plan, Subject, count
from learnevict.evals.suite import run
from learnevict.hub import GATES_FOLDER, Gates

STAGES = ("tune", "main", "published", "prompt", "long", "free")
SHARES = ("1/3", "1/4", "1/6", "1/8")
BESIDE_PROMPT = (
    "48",
    "32",
    "24",
)  # answers have about 100 tokens; those of recall and dialogue have 15: nothing to evict
TALKATIVE = ("program", "ledger", "procedure")
SPEAKERS = ("full", "random", "lexical", "clausal", "streaming_llm", "golden", "foresightkv")
FAR = ("full", "random", "lexical", "clausal", "streaming_llm", "h2o", "snapkv", "golden", "foresightkv")


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
    torch.set_num_threads(config.threads)
    model, tokenizer = testbed.load(device=config.device)
    subject = Subject(model, tokenizer)
    stages = STAGES if config.stage == "all" else tuple(config.stage.split(","))
    for stage in stages:
        for family in config.families.split(","):
            if stage == "tune":
                tune(config, subject, family)
            else:
                compare(config, subject, stage, family)


def tune(config: Config, subject: Subject, family: str) -> None:
    """Settings of one family's heuristics; the other families' are left as they are."""
    plan = Plan((family,), budgets(config), config.tuning_samples, batch_size=config.batch_size)
    names = tuning.training_free() if not config.smoke else ["random", "h2o"]
    folder = Path(config.out)
    tables = [one.gates for one in contenders(config, subject, tuning.TABLES, tuned=False) if one.gates is not None]
    field = tuning.candidates(names, tables)
    with progress(count(plan, field)) as advance:
        found = tuning.tune(plan, subject, field, folder / "tuning" / f"{family}.jsonl", advance=advance)
    target = tuned_path(config)
    known = [tuning.load(target)] if target.exists() else []
    same = [part for part in known if part.record == found.record]
    tuning.save(tuning.merge([*same, found]), target)
    for budget, accuracy in found.accuracy[family].items():
        best = found.best(family, budget)
        print(f"{family} {budget}: {best} {found.settings[family][budget][best]} {accuracy[best]:.3f}")


def compare(config: Config, subject: Subject, stage: str, family: str) -> None:
    """One table, one family."""
    plan = Plan((family,), budgets(config), config.samples, free="none", batch_size=config.batch_size)
    names = methods.METHODS
    if stage == "published":
        plan = replace(plan, rules=Rules(sinks=None, recent=None), budgets=("1/4", "1/8"))
        names = tuple(tuning.training_free())  # the others have no window of their own
    elif stage == "long":
        plan, names = replace(plan, length="long", num_samples=config.samples // 2), FAR
    elif stage == "free":
        plan, names = replace(plan, budgets=("1/4", "1/8"), teacher=False, free="all"), SPEAKERS
    elif stage == "prompt":
        if family not in TALKATIVE:
            return
        plan = replace(plan, budgets=BESIDE_PROMPT, rules=Rules(prompt=True))
    field = contenders(config, subject, names, tuned=stage in ("main", "long", "free"))
    out = Path(config.out) / stage / f"{family}.jsonl"
    with progress(count(plan, field)) as advance:
        rows, _ = run(plan, subject, field, out, resume=True, advance=advance)
    print(f"{stage} {family}: {len(rows)} rows in {out}")


def contenders(config: Config, subject: Subject, names: tuple[str, ...], *, tuned: bool) -> list[Contender]:
    """Methods with the testbed's gates, and tuned settings or their own."""
    known = tuning.load(tuned_path(config)) if tuned else None
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


def parse() -> Config:
    """Every field of Config is a flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            flag = f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    if given["smoke"]:
        given |= {"samples": 4, "tuning_samples": 4, "out": "/tmp/evaluate_smoke", "families": "recall"}
    return Config(**given)


if __name__ == "__main__":
    main(parse())
