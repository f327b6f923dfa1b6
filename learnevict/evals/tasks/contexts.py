"""Contexts with questions: facts hidden in a haystack of the user's own text.

The six kinds follow the definitions of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3): needle, multi_key, multi_value,
multi_query, variable_tracking and frequent_words. Sentences, words and numbers are our own, drawn from the seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from learnevict.errors import DataError, UsageError

ADJECTIVES = (
    "amber brass cedar copper coral crimson dusty eastern emerald frozen gentle golden granite hidden hollow ivory "
    "lonely lunar marble misty northern olive patient quiet rusty sandy scarlet silver slender southern stormy "
    "sunken velvet western winter wooden"
).split()
NOUNS = (
    "anchor archive balcony barrel beacon bridge cabinet canyon castle cellar chapel clock compass cottage "
    "courtyard ferry fountain furnace garden gallery harbor island kitchen ladder lantern library lighthouse market "
    "meadow mill mirror museum orchard palace pavilion piano quarry railway river saddle school shelter stable "
    "station statue theatre tower tunnel vault village warehouse wharf windmill workshop"
).split()
SYLLABLES = "ba do fe gi ku la mo ne pi ro sa te vu wi zo".split()


@dataclass(frozen=True)
class Question:
    """A question about a context: `answers` must all stand in the reply; `depth` in [0, 1] is where the first fact lies."""

    text: str
    answers: tuple[str, ...]
    depth: float | None = None

    def score(self, reply: str) -> float:
        """Returns the share of the answers that stand in the reply as whole words or numbers."""
        return sum(
            bool(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", reply, re.IGNORECASE)) for one in self.answers
        ) / len(self.answers)


@dataclass(frozen=True)
class Context:
    """A text that is read and compressed once, and the questions that are asked about it."""

    text: str
    questions: tuple[Question, ...]


class Haystack:
    """A text cut into sentences, from which stretches of about so many tokens are taken.

    Args:
        text: any prose; blank lines and line breaks become spaces.
        count: returns how many tokens a text has.

    Raises:
        DataError: fewer than ten sentences.
    """

    def __init__(self, text: str, count: Callable[[str], int]) -> None:
        found = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text).strip())
        self.sentences = [one for one in found if 3 <= len(one.split()) <= 80]
        self.count = count
        if len(self.sentences) < 10:
            raise DataError(
                f"a haystack needs at least ten sentences, not {len(self.sentences)}; give a longer text of prose"
            )
        self.sizes: list[int | None] = [None] * len(self.sentences)

    def stretch(self, start: int, tokens: int) -> list[str]:
        """Returns consecutive sentences from `start` on, round the end if need be, of at most so many tokens in all.

        Raises:
            DataError: the whole text is shorter, so it would stand in the context twice.
        """
        taken: list[str] = []
        for step in range(len(self.sentences)):
            index = (start + step) % len(self.sentences)
            size = self.sizes[index] = self.sizes[index] or self.count(" " + self.sentences[index])
            if size > tokens:
                return taken
            tokens -= size
            taken.append(self.sentences[index])
        raise DataError("the haystack is shorter than the contexts asked for; give a longer text or a smaller length")


Fact = str
Draft = tuple[list[Fact], list[tuple[str, tuple[str, ...], int]]]
"""Sentences to hide, and (question, answers, index of the fact whose depth counts)."""


def _names(draw: random.Random, count: int) -> list[str]:
    every = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    return draw.sample(every, count)


def _codes(draw: random.Random, count: int) -> list[str]:
    return [str(number) for number in draw.sample(range(1000, 10000), count)]


def _fact(name: str, code: str) -> Fact:
    return f"The access code of the {name} is {code}."


def _ask(name: str) -> str:
    return f"What is the access code of the {name}? Answer with the code alone."


def _needle(draw: random.Random) -> Draft:
    (name,), (code,) = _names(draw, 1), _codes(draw, 1)
    return [_fact(name, code)], [(_ask(name), (code,), 0)]


def _multi_key(draw: random.Random, keys: int = 4) -> Draft:
    pairs = list(zip(_names(draw, keys), _codes(draw, keys), strict=True))
    return [_fact(*pair) for pair in pairs], [(_ask(name), (code,), index) for index, (name, code) in enumerate(pairs)]


def _multi_value(draw: random.Random, values: int = 3) -> Draft:
    (name,), codes = _names(draw, 1), _codes(draw, values)
    asked = f"What are all {values} access codes of the {name}? Answer with the codes alone."
    return [f"One access code of the {name} is {code}." for code in codes], [(asked, tuple(codes), 0)]


def _multi_query(draw: random.Random, keys: int = 4, asked: int = 2) -> Draft:
    names, codes = _names(draw, keys), _codes(draw, keys)
    question = f"What are the access codes of the {' and the '.join(names[:asked])}? Answer with the codes alone."
    return [_fact(*pair) for pair in zip(names, codes, strict=True)], [(question, tuple(codes[:asked]), 0)]


def _variable_tracking(draw: random.Random, chains: int = 2, hops: int = 3) -> Draft:
    letters = [f"{one}{other}{third}" for one in "BDFGKL" for other in "AEIOU" for third in "MNPRSTX"]
    names, codes = draw.sample(letters, chains * (hops + 1)), _codes(draw, chains)
    facts: list[Fact] = []
    questions: list[tuple[str, tuple[str, ...], int]] = []
    for chain, code in enumerate(codes):
        of = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        questions.append(
            (f"Which variables have the value {code}? Answer with their names alone.", tuple(of), len(facts))
        )
        facts.append(f"Variable {of[0]} is set to {code}.")
        facts += [f"Variable {new} is set to the value of variable {old}." for old, new in pairwise(of)]
    return facts, questions


FACTS: dict[str, Callable[[random.Random], Draft]] = {
    "needle": _needle,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
}
KINDS = (*FACTS, "frequent_words")


def make(kind: str, seed: int, haystack: Haystack, tokens: int, depth: float | None = None) -> Context:
    """Returns a context of at most `tokens` tokens with its questions; the same for the same arguments.

    Args:
        kind: one of KINDS.
        seed: draws names, numbers, the stretch of text and the depths.
        haystack: what the facts are hidden in; frequent_words makes up its own.
        tokens: size of the context.
        depth: where in [0, 1] the first fact lies; drawn evenly by default, as those of all further facts are. The facts of a
            chain keep their order.

    Raises:
        UsageError: no such kind, or the context is too short for the facts.
        DataError: the haystack is too short.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no retrieval task {kind!r}; choose {', '.join(KINDS)}")
    draw = random.Random(f"{kind} {seed}")
    if kind == "frequent_words":
        return _frequent_words(draw, haystack.count, tokens)
    facts, asked = FACTS[kind](draw)
    left = tokens - sum(haystack.count(" " + fact) for fact in facts)
    if left < tokens // 2:
        raise UsageError(f"{tokens} tokens are too few for the facts of {kind!r}; give a greater length")
    prose = haystack.stretch(draw.randrange(len(haystack.sentences)), left)
    depths = [draw.random() for _ in facts]
    depths = sorted(depths) if kind == "variable_tracking" else depths
    if depth is not None:
        depths[0] = depth
    places = [round(one * len(prose)) for one in depths]
    for place, _, fact in sorted(zip(places, range(len(facts)), facts, strict=True), reverse=True):
        prose.insert(place, fact)
    return Context(" ".join(prose), tuple(Question(text, answers, depths[index]) for text, answers, index in asked))


def _frequent_words(draw: random.Random, count: Callable[[str], int], tokens: int, asked: int = 3) -> Context:
    """Returns made-up words drawn with frequencies falling as 1 / rank^2, of which the three most frequent are asked for."""
    every = [one + other + third for one in SYLLABLES for other in SYLLABLES for third in SYLLABLES]
    words = draw.sample(every, 40)
    weights = [1 / (rank + 1) ** 2 for rank in range(len(words))]
    text: list[str] = []
    used = 0
    while True:
        word = draw.choices(words, weights)[0]
        used += count(" " + word)
        if used > tokens:
            break
        text.append(word)
    ranked = sorted(words, key=text.count, reverse=True)
    least = text.count(ranked[asked - 1])
    if not least:
        raise UsageError(f"{tokens} tokens are too few for 'frequent_words'; give a greater length")
    text = [word for word in text if word in ranked[:asked] or text.count(word) < least]  # no other answer is as right
    question = f"Which {asked} words occur most often in the list? Answer with the words alone."
    return Context(" ".join(text), (Question(question, tuple(ranked[:asked])),))
