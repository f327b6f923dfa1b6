"""The margin: what is there to be learned, per task and budget, and how much of it a method reaches.

Two questions are kept apart: which tokens stay (ranking), and how many slots layers and heads have (allocation). So every
method has a column for each allocation it was measured under, at equal bytes, and recovery runs from the best training-free
method, whatever its allocation, to golden eviction pooled over the model. All figures are made of per-sample logs, in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from learnevict.evals import metrics
from learnevict.evals.contests import COLUMNS, MEASURES, OWN, Contest, read_contests
from learnevict.evals.methods import GOLDEN, RANDOM
from learnevict.evals.metrics import signed
from learnevict.evals.report import table
from learnevict.parts.options import EQUAL, POOLED
from learnevict.untrusted import one_line


def margin_tables(files: Sequence[Path]) -> str:
    """Returns Markdown: what there is to be learned in each task and budget, and every method under each allocation.

    Args:
        files: rows of `learnevict eval`; their logs lie beside them. Rows without a log, and demo reports, are left out.

    Returns:
        "" where no golden eviction and not more than one allocation was measured.

    Raises:
        DataError: a file is no result of an evaluation.
    """
    contests = list(read_contests(files))
    columns = {one.allocation for contest in contests for one in contest.scored}
    if len(columns) < 2 and not any(contest.reference for contest in contests):
        return ""
    parts = ["## What is there to be learned", MARGIN]
    for measure in MEASURES:
        mine = [contest for contest in contests if contest.measure is measure]
        if mine:
            parts += [f"{measure.title.capitalize()}:", margin_table(mine)]
    parts += ["## Ranking and allocation", ALLOCATION]
    for contest in contests:
        parts += [f"{one_line(contest.family)}, {contest.budget}, {contest.measure.title}{_endpoints(contest)}"]
        parts.append(allocation_table(contest))
    return "\n\n".join(parts) + "\n"


MARGIN = (
    "To learn: golden pooled over the model (else golden) minus the best training-free method, paired; where it is about 0, "
    "selection does not matter. The best training-free and the best learned method are chosen over all allocations, on "
    "validation samples if the report has rows of them; else on these very samples, which flatters both. 95 % intervals over "
    "samples. A kept prompt takes its bytes beside the budget."
)
ALLOCATION = (
    "A claim for a ranking stays within one column. Beside learned methods: recovery, sum(method - best) / sum(reference - "
    "best), with the endpoints named above; nothing where they lie too close."
)


def margin_table(contests: Sequence[Contest]) -> str:
    """Returns one measure: a line per family and budget."""
    header = ["family", "budget", "full cache", "random", "random, prompt kept", "best training-free", "best learned"]
    lines: list[list[str]] = []
    for contest in contests:
        best, learned, reference = contest.best(), contest.best("learned"), contest.reference
        lines.append([
            one_line(contest.family), contest.budget, contest.show(contest.full),
            contest.show(contest.of(RANDOM, EQUAL, OWN)), contest.show(contest.of(RANDOM, EQUAL, OWN, kept=True)),
            *(f"{contest.show(one)} ({one_line(one.title)})" if one else "–" for one in (best, learned)),
            contest.show(contest.of(GOLDEN, EQUAL, OWN)), contest.show(contest.of(GOLDEN, POOLED)),
            signed(metrics.paired_difference(reference.scores, best.scores, best.seen)) if reference and best else "–",
        ])  # fmt: skip
    return table([*header, "golden, equal", "golden, pooled", "to learn"], lines)


def allocation_table(contest: Contest) -> str:
    """Returns one family at one budget: methods down, allocations across."""
    there = {one.allocation for one in contest.scored}
    place = {column: index for index, column in enumerate(COLUMNS)}  # others, of rows not made here, come last
    columns = sorted(there, key=lambda title: (place.get(title.split(" ")[0], len(place)), title))
    lines: list[list[str]] = []
    for name in dict.fromkeys(one.name for one in contest.scored):
        found = {one.allocation: one for one in contest.scored if one.name == name}
        cells = [contest.show(found.get(column)) for column in columns]
        gained = [contest.recovery(found[column]) if column in found else "" for column in columns]
        lines.append(
            [one_line(name), *(f"{cell} ({part})" if part else cell for cell, part in zip(cells, gained, strict=True))]
        )
    profiles = [column for column in columns if column.startswith("profile")]
    titles = ["profile" if [column] == profiles else one_line(column) for column in columns]
    return table(["method", *titles], lines)


def _endpoints(contest: Contest) -> str:
    best, reference = contest.best(), contest.reference
    peaks = [one.peak for one in contest.scored if one.peak is not None and not one.kept]
    held = f"; {min(peaks) / 1024:.0f} to {max(peaks) / 1024:.0f} KiB at the peak" if peaks else ""
    if best is None or reference is None:
        return f"{held}:"
    return f"; recovery from {one_line(best.title)} to {one_line(reference.title)}{held}:"
