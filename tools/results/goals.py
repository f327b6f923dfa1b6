"""The project's goals for the testbed beside what was found; every line is made from rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from learnevict import testbed
from learnevict.evals import tuning
from learnevict.evals.methods import GOLDEN
from learnevict.evals.metrics import SMALLEST_GAP
from learnevict.evals.report import table
from tools.results.records import Records
from tools.results.sections import LEXICAL, refined_pairs, signed

EQUAL = "-equal"
"""The end of the name of refined gates whose layers share the budget equally."""
PLACES = {"program": ("program",), "all families": testbed.FAMILIES}
POOLED = "all checked tokens"
"""The samples of all families as one; else the mean over families, in which those that check few tokens count as much."""
SMALLEST_P = 0.01
MET, MISSED, UNSCORED, UNMEASURED = "met", "**not met**", "not scored", "not measured"
NEEDS = {"above": "interval above 0", "reached": "interval not below 0", "tested": f"above 0, p < {SMALLEST_P}"}


class Goal(NamedTuple):
    """A goal, what was found, and whether that meets it."""

    what: str
    goal: str
    found: str
    status: str


@dataclass(frozen=True)
class Evidence:
    """The records against which goals are held.

    Attributes:
        main: teacher-forced comparison under the same rules.
        free: free generation; None if there was none.
        tuned: names the best training-free method of every cell; None if nothing was tuned.
    """

    main: Records
    free: Records | None
    tuned: tuning.Tuned | None

    def recovery(self, method: str, place: str, budget: str, least: float) -> Goal:
        """Returns the goal that a method recovers so much of the way from the best heuristic to golden."""
        what, goal = f"{method}: recovery, {place}, {budget}", f"at least {100 * least:.0f} %"
        best = {family: self.tuned.known_best(family, budget) if self.tuned else None for family in PLACES[place]}
        bases = {family: base for family, base in best.items() if base is not None}
        left = {family: "not tuned" for family in best if family not in bases}
        left |= self.main.left_out(method, bases, budget)
        reasons = ", ".join(f"{family} {reason}" for family, reason in left.items())
        if any(not reason.startswith("gap") for reason in left.values()):
            return Goal(what, goal, f"– ({reasons})", UNMEASURED)
        found = self.main.recovery(method, bases, budget)
        if math.isnan(found.value):
            return Goal(what, goal, f"– ({reasons})", UNSCORED)
        beside = f" (without {reasons})" if reasons else ""
        return Goal(what, goal, f"{found}{beside}", MET if found.value >= least else MISSED)

    def difference(self, pair: tuple[str, str], place: str, budget: str, mode: str, need: str) -> Goal:
        """Returns the goal that a method is above another, sample by sample.

        Args:
            pair: the method and the other.
            place: of PLACES, or POOLED.
            budget: a share.
            mode: "teacher" or "free".
            need: of NEEDS; "reached": not all of the interval lies below 0.
        """
        results = self.free if mode == "free" else self.main
        kind = "exact match in free generation" if mode == "free" else "step accuracy"
        what = f"{' minus '.join(pair)}: {kind}, {place}, {budget}"
        families = PLACES.get(place, testbed.FAMILIES)
        found = results and results.test(*pair, families, budget, mode, pooled=place == POOLED)
        if not found:
            return Goal(what, NEEDS[need], "–", UNMEASURED)
        apart, p = found
        met = {"above": apart.low > 0, "reached": apart.high >= 0, "tested": apart.value > 0 and p < SMALLEST_P}[need]
        shown = signed(apart) + (f", p = {p:.4f}" if need == "tested" else "")
        return Goal(what, NEEDS[need], shown, MET if met else MISSED)


def goal_tables(main: Records, free: Records | None, tuned: tuning.Tuned | None) -> list[str]:
    """Returns what was to be reached, with and without reinforcement, and by which gates."""
    evidence, ranking = Evidence(main, free, tuned), ranked(main)
    lines = supervised(evidence, ranking[0][0]) if ranking else []
    parts = [choice(ranking, [name for name in candidates(main) if name not in dict(ranking)]), goal_table(lines)]
    for name, start in refined_pairs(main):
        refined_lines = refined(evidence, name, start)
        lines = [*lines, *refined_lines]
        parts += [f"Refined is {name}, which began as {start}:", goal_table(refined_lines)]
        parts += ["Beyond what was asked for:", goal_table(stretched(evidence, name))]
    counts = Counter(line.status for line in lines)
    summed = ", ".join(f"{counts[status]} {status}" for status in (MET, MISSED, UNSCORED, UNMEASURED))
    return [
        "## Goals",
        f"{summed}. Recovery is of step accuracy, from the training-free method that was best on validation samples (0) to "
        f"golden (1), and the figure itself meets a goal; cells whose gap is below {SMALLEST_GAP} are not scored, those that "
        "were not run, or where heuristics were not tuned, not measured. Over all families gaps are pooled and differences "
        f"averaged; {POOLED} of all families are pooled, so that recall and dialogue, with few in a sample, count less; "
        "intervals are of 95 %.",
        *parts,
    ]


def goal_table(lines: Sequence[Goal]) -> str:
    """Returns goals as a Markdown table."""
    return table(["what", "goal", "found", "status"], lines) if lines else ""


def supervised(evidence: Evidence, method: str) -> list[Goal]:
    """Returns the goals of the best learned method that has not been refined."""
    least = {"1/4": 0.85, "1/6": 0.85, "1/8": 0.75}
    return [
        *(evidence.recovery(method, "program", budget, part) for budget, part in least.items()),
        *(evidence.recovery(method, "all families", budget, 0.65) for budget in least),
        *(evidence.difference((method, LEXICAL), "all families", budget, "teacher", "above") for budget in least),
    ]


def refined(evidence: Evidence, name: str, start: str) -> list[Goal]:
    """Returns the goals of refined gates: better than their start, and how near golden."""
    lines = [
        evidence.difference((name, start), place, budget, mode, "tested")
        for mode, places in (("teacher", (*PLACES, POOLED)), ("free", tuple(PLACES)))
        for place in places
        for budget in ("1/6", "1/8", "1/12")
    ]
    for place in PLACES:
        lines.append(evidence.difference((name, GOLDEN), place, "1/6", "teacher", "reached"))
        lines += [evidence.recovery(name, place, budget, least) for budget, least in (("1/8", 0.95), ("1/12", 0.75))]
    return lines


def stretched(evidence: Evidence, name: str) -> list[Goal]:
    """Returns further goals of refined gates, at smaller budgets and beyond the reference."""
    return [
        *(evidence.recovery(name, place, "1/15", 0.75) for place in PLACES),
        *(
            evidence.difference((name, GOLDEN), place, budget, "teacher", "above")
            for place in PLACES
            for budget in ("1/8", "1/12", "1/15")
        ),
    ]


def candidates(results: Records) -> list[str]:
    """Returns the supervised methods; the tables of words and clauses that they have to beat do not count."""
    better = [name for name, _ in refined_pairs(results)]
    others = (*better, *(name + EQUAL for name in better), *tuning.TABLES)
    return [name for name in results.methods("learned") if name not in others]


def ranked(results: Records, budgets: Sequence[str] = ("1/4", "1/6", "1/8")) -> list[tuple[str, float]]:
    """Returns supervised methods by step accuracy, mean over families and budgets, the best first; only those run
    everywhere."""
    found: dict[str, float] = {}
    for name in candidates(results):
        rows = [results.row(name, family, budget) for family in testbed.FAMILIES for budget in budgets]
        reached = [row["step_accuracy"] for row in rows if row is not None and row["step_accuracy"] is not None]
        if len(reached) == len(rows):
            found[name] = sum(reached) / len(reached)
    return sorted(found.items(), key=lambda item: -item[1])


def choice(ranking: Sequence[tuple[str, float]], left: Sequence[str]) -> str:
    """Says which method stands for supervised learning, and what that choice rests on; `left` were not run everywhere."""
    if not ranking:
        return "No supervised method was run on all families at 1/4, 1/6 and 1/8."
    (name, value), *others = ranking
    missing = f" Not run everywhere: {', '.join(left)}." if left else ""
    if not others:
        return f"Supervised is {name}, the only such method that was run everywhere.{missing}"
    return (
        f"Supervised is {name}: of {len(ranking)} learned methods without reinforcement it has the highest step accuracy, mean "
        f"over families at 1/4, 1/6 and 1/8 ({value:.4f}; next is {others[0][0]} with {others[0][1]:.4f}). It was chosen on "
        f"the test rows that it is measured on here, which flatters it a little; all others are in the tables below.{missing}"
    )
