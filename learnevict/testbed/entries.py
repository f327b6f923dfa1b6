"""Bookkeeping in plain English, for models that read English: entries of several writers, of which some turn out to count.

A text tells how things stand, then numbered entries among remarks that use the same words; later sentences cancel or correct
some of them. Only the question, at the end, says whose entries count. The response goes through all entries in order and
carries the state on, so a step needs its entry, what became of it, the rule, and the state after its holder's last step.

    Ann has 4 coins. ... Entry 1 by Baker: Ann gets 2 coins. ... Entry 1 is cancelled. Only entries by Baker and Cook count.
    -> Entry 1 is cancelled. Entry 2 by Cook: Ann 4 + 3 = 7. ... Answer: Ann 7, ...

Families: accounts (people and coins, 0 to 9 each) and moves (things and rooms).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from learnevict.errors import UsageError

PEOPLE = "Ann Bob Carl Dora Emil Fay Gus Helen Ian Julia Karl Lucy".split()
WRITERS = "Baker Cook Fisher Hunter Mason Miller Smith Taylor".split()
THINGS = "lamp key book drum clock vase coat map ring bell".split()
ROOMS = "kitchen attic garden cellar hall library garage bedroom office tower".split()
SPLITS = ("train", "validation", "test")
SIZES = {
    "small": ((2, 5), (0, 40)), "medium": ((5, 9), (20, 100)), "normal": ((7, 9), (120, 320)), "long": ((12, 14), (400, 600))
}  # fmt: skip
"""Entries, and words of remarks."""


@dataclass(frozen=True)
class Case:
    """A text with its worked response; `checked`: the places [start, end) in the response that take memory or arithmetic."""

    family: str
    seed: int
    prompt: str
    response: str
    answer: str
    checked: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Family:
    """What holders, values and changes are called.

    Attributes:
        holders, values: what they are drawn from.
        start, past, change: sentences with {holder} and {value}; what a change says is made by `describe`.
        describe: returns what an entry says of a holder, its value before and its value after.
        step: returns how a response works it out, "?" before words that are checked.
        remarks: sentences that mean nothing.
    """

    holders: Sequence[str]
    values: Sequence[str]
    start: str
    past: str
    describe: Callable[[str, str, str], str]
    step: Callable[[str, str, str], str]
    remarks: tuple[str, ...]


def _difference(before: str, after: str) -> tuple[str, int]:
    change = int(after) - int(before)
    return ("+" if change > 0 else "-"), abs(change)


def _pays(holder: str, before: str, after: str) -> str:
    sign, amount = _difference(before, after)
    return f"{holder} {'gets' if sign == '+' else 'pays'} {amount} coin{'s' * (amount != 1)}"


def _sum(holder: str, before: str, after: str) -> str:
    sign, amount = _difference(before, after)
    return f"?{holder} ?{before} ?{sign} ?{amount} = ?{after}"


_COMMON = (
    "Entry {number} of last year was long, and {writer} read it twice.",
    "{writer} writes a letter to {other}.",
    "In the evening, {writer} told {other} a story about entry {number}.",
    "It rained all day, and {other} stayed at home.",
    "Nobody knows why {other} laughed at {writer}.",
    "Correction of the letter: {other} was in town on day {number}.",
)
FAMILIES = {
    "accounts": Family(
        PEOPLE, list("0123456789"), "{holder} has {value} coins.", "Last year {holder} had {value} coins.", _pays, _sum,
        (*_COMMON, "{other} dreams of {number} coins.", "{holder} asked {writer} for {number} coins and got none."),
    ),
    "moves": Family(
        THINGS, ROOMS, "The {holder} is in the {value}.", "Last year the {holder} was in the {value}.",
        lambda holder, before, after: f"the {holder} goes to the {after}",
        lambda holder, before, after: f"?{holder} from ?{before} to ?{after}",
        (*_COMMON, "{other} likes the {holder} and the {value}.", "{writer} painted the {value} on day {number}."),
    ),
}  # fmt: skip
_ENTRIES = (
    "Entry {number} by {writer}: {said}.",
    "{writer} writes entry {number}: {said}.",
    "In entry {number}, {writer} notes: {said}.",
)


def generate(family: str, seed: int, *, split: str = "test", size: str = "normal") -> Case:
    """Returns the case of this family, seed, split and size; the same for the same arguments, and of no other split.

    Raises:
        UsageError: there is no such family, split or size.
    """
    if family not in FAMILIES or split not in SPLITS or size not in SIZES:
        raise UsageError(
            f"no such case: family={family!r}, split={split!r}, size={size!r}; families are {', '.join(FAMILIES)}, splits "
            f"{', '.join(SPLITS)}, sizes {', '.join(SIZES)}"
        )
    draw = Random(int.from_bytes(hashlib.sha256(f"{family}/{split}/{size}/{seed}".encode()).digest()[:8], "big"))
    return _case(draw, family, seed, *SIZES[size])


def _case(draw: Random, name: str, seed: int, num_entries: tuple[int, int], num_words: tuple[int, int]) -> Case:
    family = FAMILIES[name]
    count = draw.randint(*num_entries)
    holders, writers = draw.sample(family.holders, 3 if count < 6 else 4), draw.sample(WRITERS, 3)
    state = {holder: draw.choice(family.values) for holder in holders}
    counting = draw.sample(writers, 2)
    told = [family.start.format(holder=holder, value=value) for holder, value in state.items()]
    sentences: list[tuple[float, str]] = []
    steps: list[str] = []
    for number in range(1, count + 1):
        place, writer, holder = float(number), draw.choice(writers), draw.choice(holders)
        fate = draw.choices(("stands", "cancelled", "corrected"), (6, 2, 2))[0]
        before = state[holder]
        after, other = draw.sample([value for value in family.values if value != before], 2)
        said, right = (
            family.describe(holder, before, value) for value in (other if fate == "corrected" else after, after)
        )
        sentences.append((place, draw.choice(_ENTRIES).format(number=number, writer=writer, said=said)))
        later = place + draw.uniform(0.5, 4)
        if fate == "cancelled":
            sentences.append((later, f"Entry {number} is cancelled."))
            steps.append(f"Entry {number} ?is ?cancelled.")
            continue
        if fate == "corrected":
            sentences.append((later, f"Correction of entry {number}: {right}."))
        line = f"Entry {number} ?by ?{writer}"
        if writer not in counting:
            steps.append(f"{line} ?does not count.")
            continue
        state[holder] = after
        steps.append(f"{line}{' ?corrected' * (fate == 'corrected')}: {family.step(holder, before, after)}.")
    remarks = _remarks(draw, family, (holders, writers), draw.randint(*num_words))
    sentences += [(draw.uniform(0, count + 1), remark) for remark in remarks]
    text = " ".join([*told, *(sentence for _, sentence in sorted(sentences))])
    rule = f"Only entries by {counting[0]} and {counting[1]} count. Go through all entries, then say how it stands in the end."
    answer = ", ".join(f"{holder} {state[holder]}" for holder in holders)
    marked = " ".join([*steps, "Answer: " + ", ".join(f"{holder} ?{state[holder]}" for holder in holders) + "."])
    response, checked = _unmark(marked)
    return Case(name, seed, f"{text}\n\n{rule}", response, answer, checked)


def _remarks(draw: Random, family: Family, names: tuple[Sequence[str], Sequence[str]], num_words: int) -> list[str]:
    """Returns sentences of so many words or a few more that mean nothing; `names` are those of holders and writers."""
    found: list[str] = []
    while num_words > 0:
        template = draw.choice((*family.remarks, family.past))
        remark = template.format(
            holder=draw.choice(names[0]), writer=draw.choice(names[1]), other=draw.choice(PEOPLE),
            value=draw.choice(family.values), number=draw.randint(1, 9),
        )  # fmt: skip
        num_words -= len(remark.split())
        found.append(remark)
    return found


def _unmark(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns the text without its marks, and the places of the words (with the space before them) that had one."""
    text, places = "", []
    for part in re.split(r"(?= \?)", marked):
        if part.startswith(" ?"):
            word = re.match(r" \?[^\s.,:]+", part)
            assert word is not None
            places.append((len(text), len(text) + word.end() - 1))
            part = part.replace("?", "", 1)
        text += part
    return text, tuple(places)


def final_answer(text: str) -> str | None:
    """Returns what stands between the last "Answer:" and the next full stop; None where a text never answers or never ends."""
    found = re.search(r"Answer: ([^.]*)\.", text[max(text.rfind("Answer: "), 0) :])
    return None if found is None else found[1]
