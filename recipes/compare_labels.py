"""Compares labels: which one, followed with hindsight, costs the model least, and is one better than golden attention?

    python recipes/compare_labels.py                          # all variants; half an hour on one core
    python recipes/compare_labels.py --variants "golden; CAOTE" --families recall --shares 1/8
    scripts/write_tables                                      # then: the table in docs/results.md

Every variant turns a full-cache pass into an eviction trace of the same total size, which is replayed in one pass and measured
on answer-mask tokens.
- Labels: golden attention (Section 3.1 of arXiv 2602.03203) and other reductions of it; weighted by values; CAOTE's form (arXiv
  2504.14051), attention / (1 - attention) x distance between value and output; the gradient of the loss.
- Horizons: max, sums, squares, and an optimal plan ("priced": the dual of keeping what the future uses most, per head).
- The evicted run: labels recomputed from its queries and keys, beside what is left in it, event by event, or with queries
  weighted by the loss that eviction caused.
- Search: hill climbing on golden's scores, measured by the loss itself.
- Allocation: golden labels whose slots are pooled over a layer or the model, or fixed per head by a profile of training texts.

Texts are short, so attention is held as [T, T], and padded on the right. What is finished is kept in --out, and not done again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnevict import testbed
from learnevict.config import Budget
from learnevict.errors import UsageError, told_in_one_line
from learnevict.evals.methods import COMPARISON
from learnevict.evals.tasks import FamilyTask, family_tasks, read, resolve
from learnevict.files import locked
from learnevict.hub import weight_hash
from learnevict.oracle.traces import Share
from learnevict.train.run.flags import check_fields, flag, read_flags
from tools.results.hindsight import (
    Case,
    from_the_left,
    profile,
)
from tools.results.label_table import Tried, TriedLabels
from tools.results.label_variants import VARIANTS, Hints


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    families: str = flag("program,recall", "names between commas")
    shares: str = flag("1/6,1/8,1/12,1/15", "budgets between commas")
    variants: str = flag("", "names between semicolons; otherwise all")
    samples: int = flag(48, "of each family")
    fitting: int = flag(24, "training texts of each family behind a profile")
    climbs: int = flag(100, "replays per text in the search")
    batch_size: int = flag(24, "samples at a time")
    split: str = flag("validation", f"one of {', '.join(testbed.SPLITS)}")
    out: str = flag("docs/results/labels.json", "what is finished is kept there")
    threads: int = flag(1, "of torch", most=1024)
    smoke: bool = flag(False, "seconds, the same code")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.split not in testbed.SPLITS:
            raise UsageError(f"--split {self.split!r}: choose from {', '.join(testbed.SPLITS)}")
        for share in self.shares.split(","):
            Budget.parse(share)


SMOKE = {
    "families": "recall", "shares": "1/8", "samples": 4, "fitting": 2, "climbs": 2, "out": "runs/labels-smoke.json"
}  # fmt: skip


def main(config: Config) -> None:
    """Measures the cells that are missing."""
    families, shares = listed(config.families), listed(config.shares)
    family_tasks(families)  # refuses those that do not exist
    names = listed(config.variants, ";") or list(VARIANTS)
    if twice := [name for name in (*shares, *names) if (*shares, *names).count(name) > 1]:
        raise UsageError(f"{twice[0]!r} is given twice; give each share and each variant only once")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UsageError(f"no variant {', '.join(unknown)}; choose from {'; '.join(VARIANTS)}")
    torch.set_num_threads(config.threads)
    model, tokenizer = testbed.load()
    origin = {
        "weights": weight_hash(model), "tasks": testbed.fingerprint(), "split": config.split, "samples": config.samples,
        "fitting": config.fitting, "climbs": config.climbs,
    }  # fmt: skip
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out):
        done = TriedLabels.open(out, origin)
        for share in shares:
            missing = {family: [name for name in names if not done.has(family, share, name)] for family in families}
            if any(missing.values()):
                hints = Hints(fitted(config, (model, tokenizer), share), config.climbs)
                for family, some in missing.items():
                    for one in measure(config, (model, tokenizer), (family, share), some, hints):
                        done.add(one)


def listed(text: str, between: str = ",") -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(between) if name.strip()]


def measure(config: Config, subject: Any, cell: tuple[str, str], names: list[str], hints: Hints) -> list[Tried]:
    """Returns the measures of some variants on one family at one budget."""
    family, share = cell
    tried = {name: Tried(family, share, resolved(family, share), name) for name in names}
    for start in range(0, config.samples, config.batch_size):
        seeds = range(start, min(start + config.batch_size, config.samples))
        case = opened(subject, cell, seeds, config.split)
        for name in names:
            began = time.perf_counter()
            scores = case.measure(VARIANTS[name](case, hints))
            tried[name].add(scores, case.losses(case.logits).sum(-1).tolist(), time.perf_counter() - began)
    for name, one in tried.items():
        print(f"{family} {share} {name}: step accuracy {one.accuracy:.4f}, loss ratio {one.loss_ratio:.3g}", flush=True)
    return list(tried.values())


def fitted(config: Config, subject: Any, share: str) -> Tensor:
    """Returns the mean slots per head of golden pooled over the model, on training texts, as shares of the mean."""
    found: list[Tensor] = []
    for family in testbed.FAMILIES:
        case = opened(subject, (family, share), range(config.fitting), "train")
        held = profile(case.follow(case.golden_labels, share=Share("model", 0.1)), case.roll().position)
        found.append((held - case.reserved) / (case.budget - case.reserved))
    return torch.stack(found).mean(0)


def opened(subject: Any, cell: tuple[str, str], seeds: range, split: Any) -> Case:
    """Texts at a budget."""
    model, tokenizer = subject
    samples = [testbed.generate(cell[0], seed, split=split) for seed in seeds]
    return Case(model, from_the_left(read(tokenizer, samples)), resolved(*cell), COMPARISON)


def resolved(family: str, share: str) -> int:
    """Returns the budget in slots.

    Raises:
        UsageError: a budget that is no number of slots.
    """
    found = resolve(share, FamilyTask(family).mean_length)
    if not isinstance(found, int):
        raise UsageError(f"traces are rolled for a number of slots, not {share!r}; give 1/8 or tokens (64)")
    return found


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns the settings that a command line asks for."""
    return read_flags({"options": Config}, arguments, __doc__, smoke=SMOKE).of(Config)


if __name__ == "__main__":
    with told_in_one_line("run the same command again to go on"):
        main(parse())
