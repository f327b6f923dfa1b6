"""Samples, difficulty levels, filler and the shuffling of true statements among decoys, which all families share.

In a generator's text a word that starts with "?" belongs to the answer mask (it needs memory or arithmetic); the "?" is removed
when the sample is assembled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from learnevict.testbed.vocabulary import ASSISTANT, BOS, DIGITS, END, LABELS, NAMES, PLACES, VALUES, VARIABLES

ANSWER = "?"


@dataclass(frozen=True)
class Sample:
    """One task with its reasoning. `answer_mask` and loss `weights` have an entry per word of prompt + response."""

    family: str
    seed: int
    split: str
    prompt: str
    response: str
    answer: str
    messages: list[dict[str, str]]
    answer_mask: tuple[bool, ...]
    weights: tuple[float, ...]

    @property
    def text(self) -> str:
        """Returns the prompt and the response, as the model reads them."""
        return f"{self.prompt} {self.response}"


@dataclass(frozen=True)
class Level:
    """The difficulty of a sample: ranges of true statements and filler words, decoys per statement, remarks in the reply."""

    items: tuple[int, int]
    decoys: float
    filler: tuple[int, int]
    chatter: bool = True

    def num_items(self, rng: Random) -> int:
        """Returns the number of true statements."""
        return rng.randint(*self.items)

    def num_decoys(self, rng: Random, items: int) -> int:
        """Returns the number of decoys for so many true statements; the fraction is drawn."""
        wanted = self.decoys * items
        return int(wanted) + (rng.random() < wanted - int(wanted))


def assemble(family: str, seed: int, split: str, turns: Sequence[tuple[str, str]]) -> Sample:
    """Turns (role, marked text) pairs, the last by the assistant, into a Sample."""
    tokens, answer_mask, weights = [BOS], [False], [0.0]
    prompt_length = 0
    for role, marked in turns:
        tokens.append(f"<{role}>")
        prompt_length = len(tokens)
        message = [*marked.split(), END]
        tokens += [word.removeprefix(ANSWER) for word in message]
        answer_mask += [False] + [word.startswith(ANSWER) for word in message]
        weights += [0.0] + [float(role == "assistant")] * len(message)
    assert tokens[prompt_length - 1] == ASSISTANT
    messages = [
        {"role": role, "content": " ".join(w.removeprefix(ANSWER) for w in text.split())} for role, text in turns
    ]
    response = " ".join(tokens[prompt_length:])
    return Sample(
        family=family, seed=seed, split=split, prompt=" ".join(tokens[:prompt_length]), response=response,
        answer=final_answer(response) or "", messages=messages[:-1], answer_mask=tuple(answer_mask), weights=tuple(weights),
    )  # fmt: skip


def final_answer(text: str) -> str | None:
    """Returns the words between the last "answer" and the end of the turn, or None if the text never answers or never ends."""
    _, found, after = text.rpartition("answer ")
    if not found or END not in after.split():
        return None
    answer = after.split()
    return " ".join(answer[: answer.index(END)])


FILLERS: dict[str, tuple[str, ...]] = {
    "number": ("page # of # ;", "see page # and page # ;", "look at # again ;"),
    "variable": ("double check @ and @ ;", "compare @ # with @ # ;", "see @ near @ ;", "so @ was # again ;"),
    "label": ("see ! and ! ;", "next to ! was @ + @ ;", "check ! by page # ;"),
    "account": ("% met % by page # ;", "compare % # with % # ;", "% asked for # and # ;", "see ! by % + # ;"),
    "person": (
        "% met % by the $ ;", "the $ was near the $ ;", "% asked about $ $ ;", "% saw the $ and the $ ;",
        "compare % with $ $ ;", "% and % talk about the $ ;",
    ),
    "road": (
        "& was near & ;", "% sold the $ at & ;", "see & and & again ;", "at & we saw the $ ;",
        "compare & with & and $ ;", "the $ was at & ;",
    ),
}  # fmt: skip
_SLOTS = {"#": DIGITS, "@": VARIABLES, "!": LABELS, "%": NAMES, "&": PLACES, "$": VALUES}


def filler(
    rng: Random, kinds: Sequence[str], num_words: int, pools: dict[str, Sequence[str]] | None = None
) -> list[str]:
    """Returns clauses of about so many words that mean nothing but reuse the words that matter; pools narrow a slot's words."""
    slots = {**_SLOTS, **(pools or {})}
    clauses: list[str] = []
    while num_words > 0:
        clause: list[str] = []
        for word in rng.choice(FILLERS[rng.choice(kinds)]).split():
            clause.append(another(rng, slots[word], *clause) if word in slots else word)
        clauses.append(" ".join(clause))
        num_words -= len(clause)
    return clauses


def scatter(rng: Random, statements: Sequence[str], others: Sequence[str]) -> list[str]:
    """Puts the others at random places between the statements, which keep their order."""
    places = sorted(rng.randint(0, len(statements)) for _ in others)
    mixed: list[str] = []
    waiting = list(others)
    rng.shuffle(waiting)
    for index in range(len(statements) + 1):
        while places and places[0] == index:
            places.pop(0)
            mixed.append(waiting.pop())
        mixed += statements[index : index + 1]
    return mixed


def another(rng: Random, pool: Sequence[str], *not_these: str) -> str:
    """Returns a word of the pool that differs from the given ones."""
    return rng.choice([word for word in pool if word not in not_these])
