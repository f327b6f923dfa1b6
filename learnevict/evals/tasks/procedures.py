"""Procedures as a task: a long response that follows from the prompt, row by row of a table or step by step of a path.

In the spirit of LongProc (Ye et al. 2025, arXiv 2501.05414: HTML to TSV, path traversal), with texts and sizes of our own: a
row of the table needs its place on the page, a step of the path the one before it and a connection somewhere in the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import torch

from learnevict.errors import UsageError
from learnevict.evals.tasks.contexts import ADJECTIVES, NOUNS
from learnevict.evals.tasks.task import TextBatch, joined
from learnevict.infer.generate import read_chat, read_text

NAMES = tuple(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
VISITORS = "Ann Bob Carl Dora Emil Fay Gus Helen Ian Julia".split()
TABLE = (
    "{page}\n\nList all items that are not sold, in the order of the page, one a line, with tabs between name, year and price, "
    "such as\nsilver spoon\t1901\t25\nWrite nothing else."
)
PATH = (
    "{page}\n\nAt most one line leaves a place, and it goes one way. Travel from the {start} to the {goal}. Write one step a "
    "line, such as\nsilver spoon -> 25 -> iron gate\nWrite nothing else."
)
NUM_MEASURED = 20
"""Samples whose mean length budgets such as "1/4" are a share of."""
SPARE = 64
"""Tokens that an answer may have beyond the length asked for."""


@dataclass(frozen=True)
class Procedure:
    """What is asked, and the lines of the right response."""

    prompt: str
    lines: tuple[str, ...]


def make(kind: str, seed: int, tokens: int, count: Callable[[str], int]) -> Procedure:
    """Returns a procedure whose right response has as many lines as fit into so many tokens.

    Args:
        kind: one of KINDS.
        seed: draws names, numbers and order.
        count: returns how many tokens a text has.

    Raises:
        UsageError: not one line fits, or so many that names run out.
    """
    draw = Random(f"{kind} {seed}")
    left = tokens

    def fits(line: str) -> bool:
        nonlocal left
        left -= count(f"{line}\n")
        return left >= 0

    prompt, lines = KINDS[kind](draw, iter(draw.sample(NAMES, len(NAMES))), fits)
    if not lines or left >= 0:
        raise UsageError(f"{tokens} tokens are too {'many' if lines else 'few'} for a {kind}; give another --length")
    return Procedure(prompt, tuple(lines))


def _table(draw: Random, names: Iterator[str], fits: Callable[[str], bool]) -> tuple[str, list[str]]:
    page: list[str] = []
    rows: list[str] = []
    for name in names:
        year, price, sold = draw.randrange(1700, 2000), draw.randrange(10, 1000), draw.random() < 1 / 3
        row = f"{name}\t{year}\t{price}"
        if not sold and not fits(row):
            break
        rows += [] if sold else [row]
        page.append(
            f"<li><h3>{name}</h3> <p>Made in {year}, seen by {draw.choice(VISITORS)} on day {draw.randrange(1, 366)}.</p> "
            f'<span class="{"sold" if sold else "price"}">{price}</span></li>'
        )
    return TABLE.format(page="\n".join(page)), rows


def _path(draw: Random, names: Iterator[str], fits: Callable[[str], bool]) -> tuple[str, list[str]]:
    places = [next(names)]
    steps: list[str] = []
    lines: list[str] = []
    for there, aside in zip(names, names, strict=False):
        number, other = draw.sample(range(10, 1000), 2)
        step = f"{places[-1]} -> {number} -> {there}"
        if not fits(step):
            break
        steps.append(step)
        lines.append(f"Line {number} goes from the {places[-1]} to the {there}.")
        lines.append(f"Line {other} goes from the {aside} to the {draw.choice(places)}.")
        places.append(there)
    draw.shuffle(lines)
    return PATH.format(page=" ".join(lines), start=places[0], goal=places[-1]), steps


KINDS = {"table": _table, "path": _path}


@dataclass(frozen=True)
class ProcedureTask:
    """One kind of procedure at one length, carried out freely and along the right response.

    Attributes:
        kind: one of KINDS.
        tokens: of the right response, at most.
        tokenizer: of the model, whose tokens are counted.
        chat: ask under the model's chat template.
        limit: the longest answer; None: SPARE tokens longer than the right one may be.
    """

    kind: str
    tokens: int
    tokenizer: Any
    chat: bool = True
    limit: int | None = None

    modes = ("teacher", "free")
    graded = True

    @property
    def name(self) -> str:
        """Returns the kind and the length, such as "path@1000"."""
        return f"{self.kind}@{self.tokens}"

    @property
    def max_new_tokens(self) -> int:
        """See AnsweredTask."""
        return self.tokens + SPARE if self.limit is None else self.limit

    @property
    def origin(self) -> dict[str, Any]:
        """See Task."""
        return {"tasks": "procedures 1", "chat": self.chat, "limit": self.limit}

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """Returns tokens of prompt and right response of the first samples."""
        samples = self.samples(range(NUM_MEASURED))
        return [(len(self.prompt(self.tokenizer, one)), len(_response(self.tokenizer, one))) for one in samples]

    def mean_length(self, *, prompt: bool = True) -> float:
        """Returns the mean over the first NUM_MEASURED samples."""
        return sum(prompt * before + response for before, response in self.lengths) / len(self.lengths)

    def samples(self, seeds: Sequence[int]) -> list[Procedure]:
        """See Task."""

        def count(text: str) -> int:
            return len(self.tokenizer(text, add_special_tokens=False).input_ids)

        return [make(self.kind, seed, self.tokens, count) for seed in seeds]

    def prompt(self, tokenizer: Any, sample: Procedure) -> list[int]:
        """See Task."""
        if self.chat:
            return read_chat(tokenizer, [{"role": "user", "content": sample.prompt}])
        return read_text(tokenizer, f"{sample.prompt}\n\nAnswer:\n")

    def reference(self, tokenizer: Any, samples: Sequence[Procedure]) -> TextBatch:
        """Returns prompts with right responses, whose every token is checked."""
        pairs = [(self.prompt(tokenizer, one), _response(tokenizer, one)) for one in samples]
        checked = [torch.ones(len(response), dtype=torch.bool) for _, response in pairs]
        return joined(pairs, tokenizer.pad_token_id or 0, checked)

    def score(self, sample: Procedure, answer: str) -> float:
        """Returns 1 for the right lines, and else a share: of a table the F1 of its rows, of a path its steps before the first
        that is wrong. Lines too many cost as much as lines too few; others than rows and steps are no answer."""
        for mark in self.tokenizer.all_special_tokens:
            answer = answer.replace(mark, "\n")
        between = "\t" if self.kind == "table" else "->"
        found = [_cells(line, between) for line in answer.splitlines() if between in line]
        wanted = [_cells(line, between) for line in sample.lines]
        if self.kind == "table":
            return 2 * (Counter(wanted) & Counter(found)).total() / (len(wanted) + len(found))
        pairs = zip(wanted, found, strict=False)
        right = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(wanted), len(found)))
        return right / max(len(wanted), len(found))


def _cells(line: str, between: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.split(between))


def _response(tokenizer: Any, sample: Procedure) -> list[int]:
    return list(tokenizer("\n".join(sample.lines), add_special_tokens=False).input_ids)
