"""Budgets as comparisons state them: a share of the mean length of a family, the same number for every method."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from learnevict import testbed
from learnevict.config import Budget

NUM_MEASURED = 200


@cache
def lengths(family: str, length: str = "normal") -> list[tuple[int, int]]:
    """Returns tokens of prompt and of response of the first 200 validation samples: what shares are shares of."""
    samples = [testbed.generate(family, seed, split="validation", length=length) for seed in range(NUM_MEASURED)]
    return [(len(sample.prompt.split()), len(sample.response.split())) for sample in samples]


def mean_length(family: str, length: str = "normal", *, prompt: bool = True) -> float:
    """Returns mean tokens of a sample; without its prompt if that is protected and the budget counts the rest."""
    found = lengths(family, length)
    return sum(prompt * one + other for one, other in found) / len(found)


def longest_response(family: str, length: str = "normal") -> int:
    """Returns tokens of the longest reference answer among them."""
    return max(response for _, response in lengths(family, length))


def is_share(text: str) -> bool:
    """Returns whether a budget is a share such as "1/4"."""
    return "/" in text


def resolve(text: str, family: str, length: str = "normal", *, prompt: bool = True) -> int | str:
    """Returns tokens for "1/4" (of the family's mean length) and "64"; per cent and bytes are left to the cache.

    Raises:
        BudgetError: not understood, or a share above 1.
    """
    return resolved(text, lambda: mean_length(family, length, prompt=prompt))


def resolved(text: str, whole: Callable[[], float]) -> int | str:
    """Returns the same for a share of what `whole` returns."""
    budget = Budget.parse(text)
    if not is_share(text):
        return int(budget.amount) if budget.unit == "tokens" else text
    above, below = map(float, text.split("/"))
    return round(whole() * above / below)
