"""Methods side by side, in pairs: what the per-sample logs of several runs say of each family, budget and measure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from learnevict.errors import DataError, LearnevictWarning
from learnevict.evals import metrics
from learnevict.evals.methods import FULL, GOLDEN, RANDOM
from learnevict.evals.metrics import SMALLEST_GAP, RecoveryCell, signed
from learnevict.evals.plan import Key
from learnevict.evals.records import Row, read_rows
from learnevict.evals.report import budget_label
from learnevict.evals.sample_log import SampleLog, log_path
from learnevict.parts.options import EQUAL, POOLED
from learnevict.untrusted import one_line

OWN = "own"
COLUMNS = (OWN, EQUAL, "profile", POOLED)
"""Allocations, in the order of tables; "own" is whatever a method does by itself, and equal for most."""


@dataclass(frozen=True)
class Measure:
    """A figure of the log: the sum of one column over that of another (None: over samples).

    Attributes:
        sign: -1 where less is better, and the figure is the difference to the full cache.
        least: the smallest gap between golden and the best training-free method that recovery is measured over.
    """

    title: str
    mode: str
    above: str
    below: str | None = None
    sign: int = 1
    least: float = SMALLEST_GAP


MEASURES = (
    Measure("step accuracy", "teacher", "right", "seen"),
    Measure("exact match", "free", "exact"),
    Measure("score", "free", "score"),
    Measure("exact match, asked afterwards", "after", "exact"),
    Measure("exact match, question known", "known", "exact"),
    Measure("added nats per token", "teacher", "loss", "spoken", sign=-1, least=0.003),
)


@dataclass(frozen=True)
class Scored:
    """One method under one allocation; of `scores`, by sample, higher is better; `kept`: it never evicts the prompt."""

    name: str
    allocation: str
    kind: str
    kept: bool
    scores: list[float]
    seen: list[float]
    peak: int | None

    @property
    def value(self) -> float:
        """Returns the figure, higher is better."""
        return sum(self.scores) / sum(self.seen)

    @property
    def title(self) -> str:
        """Returns the method and its allocation."""
        return self.name if self.allocation == OWN else f"{self.name}, {self.allocation}"

    @property
    def training_free(self) -> bool:
        """Returns whether it needs neither training nor an oracle, and no bytes for the prompt beside the budget."""
        return (self.kind == "heuristic" or self.name == RANDOM) and not self.kept


@dataclass(frozen=True)
class Contest:
    """All methods on one family at one budget by one measure.

    Attributes:
        full: the full cache.
        validation: the same on validation samples, if there are any.
    """

    family: str
    budget: str
    measure: Measure
    scored: list[Scored]
    full: Scored | None
    validation: Contest | None = None

    def best(self, kind: str = "heuristic") -> Scored | None:
        """Returns the best training-free method, or the best learned one, over all allocations; chosen on validation samples
        if there are any."""
        found = [one for one in self.scored if (one.training_free if kind == "heuristic" else one.kind == kind)]
        if self.validation is not None:
            before = {one.title: one.value for one in self.validation.scored}
            return max((one for one in found if one.title in before), key=lambda one: before[one.title], default=None)
        return max(found, key=lambda one: one.value, default=None)

    def of(self, name: str, *allocations: str, kept: bool = False) -> Scored | None:
        """Returns a method, its prompt kept or not, under the first of these allocations that it has."""
        mine = [one for one in self.scored if one.name.split("+")[0] == name and one.kept == kept]
        found = {one.allocation.split(" ")[0]: one for one in mine}
        return next((found[column] for column in allocations if column in found), None)

    @property
    def reference(self) -> Scored | None:
        """Returns golden, pooled if it was measured so."""
        return self.of(GOLDEN, POOLED, EQUAL, OWN)

    def recovery(self, one: Scored) -> str:
        """Returns how much of the way from the best training-free method to the reference a learned method has come."""
        best, reference = self.best(), self.reference
        if best is None or reference is None or one.kind != "learned" or one.kept:
            return ""
        cell = RecoveryCell(one.scores, best.scores, reference.scores, one.seen, self.measure.least)
        found = metrics.recovery([cell])
        return "" if math.isnan(found.value) else f"{found.value:.0%} [{found.low:.0%}, {found.high:.0%}]"

    def show(self, one: Scored | None) -> str:
        """Returns a figure with its interval; of a loss as it is, not its negative."""
        if one is None:
            return "–"
        if self.measure.sign < 0:
            return signed(metrics.ratio([-value for value in one.scores], one.seen))
        whole = self.measure.below is None
        return str(metrics.share(one.scores) if whole else metrics.ratio(one.scores, one.seen))


def read_contests(files: Sequence[Path]) -> Iterator[Contest]:
    """Yields every family, budget and measure of the files, over samples that all methods were measured on.

    Rows of the validation split only choose where there are others. Warns of what is left out because there are none.
    """
    opened = open_rows(files)
    check_origin([row for row, _ in opened])
    tried = [one for one in opened if one[0].get("split") == "validation"]
    shown = [one for one in opened if one[0].get("split") != "validation"] or tried
    places = dict.fromkeys((row["family"], budget_label(row)) for row, _ in shown if row["budget"] is not None)
    for family, budget in places:
        for measure in MEASURES:
            found = _contest(shown, family, str(budget), measure)
            if found is not None:
                chooser = None if shown is tried else _contest(tried, family, str(budget), measure)
                yield replace(found, validation=chooser)


def _contest(opened: Sequence[tuple[Row, SampleLog]], family: str, budget: str, measure: Measure) -> Contest | None:
    """Returns what rows of one split say; None where nothing was measured so, or on no common sample."""
    mine = [(row, log) for row, log in opened if row["family"] == family and budget_label(row) in (None, budget)]
    there = [row for row, log in mine if row["budget"] is not None and _scored(row, log, measure, _seeds(row))]
    if not there:
        return None
    seeds = sorted(set(_seeds(there[0])).intersection(*map(_seeds, there)))
    if not seeds:
        said = f"{one_line(family)}, {budget}, {measure.title}: no sample that all methods were measured on; left out"
        warnings.warn(said, LearnevictWarning, 3)
        return None
    found = {id(row): one for row, log in mine if (one := _scored(row, log, measure, seeds)) is not None}
    full = next((found[id(row)] for row, _ in mine if row["budget"] is None and id(row) in found), None)
    return Contest(family, budget, measure, [found[id(row)] for row in there if id(row) in found], full)


ORIGIN = ("model", "weights", "tasks", "haystack", "problems", "text", "chat", "limit")


def check_origin(rows: Sequence[Row]) -> None:
    """Checks that what is compared was measured on one model and the same samples.

    Raises:
        DataError: rows of one family differ in what their samples are.
    """
    for family in dict.fromkeys(row["family"] for row in rows):
        for name in ORIGIN:
            found = {str(row[name]) for row in rows if row["family"] == family and row.get(name) is not None}
            if len(found) > 1:
                raise DataError(
                    f"rows of {one_line(family)} are of several values of {name} ({one_line(', '.join(sorted(found)))}) and "
                    "cannot be compared; report them apart"
                )


def open_rows(files: Sequence[Path]) -> list[tuple[Row, SampleLog]]:
    """Returns the rows of files whose per-sample logs lie beside them, each with its log.

    Raises:
        DataError: a file is no result of an evaluation.
    """
    logs = {path: SampleLog(log_path(path), None, resume=True) for path in files if log_path(path).exists()}
    return [(row, log) for path, log in logs.items() for row in read_rows(path)]


def _seeds(row: Row) -> range:
    """Returns the seeds of the samples of a row."""
    return range(row.get("seed", 0), row.get("seed", 0) + row["samples"])


def _scored(row: Row, log: SampleLog, measure: Measure, seeds: Sequence[int]) -> Scored | None:
    """Returns one row's numbers on samples; None where it was not measured so."""

    def column(method: str, budget: str, name: str) -> list[float] | None:
        return log.column(Key(method, row["family"], budget, measure.mode), seeds, name)

    asked = budget_label(row) or FULL
    scores = column(row["method"], asked, measure.above)
    seen = [1.0] * len(seeds) if measure.below is None else column(row["method"], asked, measure.below)
    if scores is None or seen is None:
        return None
    if measure.sign < 0:
        full = column(FULL, FULL, measure.above)
        if full is None:
            return None
        scores = [least - own for own, least in zip(scores, full, strict=True)]
    allocation = str(row.get("allocation") or row.get("rules", {}).get("allocation") or OWN)
    plain, mark, end = row["method"].rpartition("+")
    name = plain if mark and end != "prompt" and allocation not in (OWN, EQUAL) else row["method"]
    if name == plain and allocation.startswith("profile "):  # the file's name tells more than the hash of its content
        allocation = f"profile {end} {allocation.split()[1][:4]}"
    kept = bool({**row.get("rules", {}), **row.get("options", {})}.get("prompt"))
    return Scored(name, allocation, row.get("kind", ""), kept, scores, seen, row.get("kv_bytes_peak"))
