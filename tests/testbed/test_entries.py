"""Bookkeeping cases: an independent reader derives every response from its prompt."""

from __future__ import annotations

import re

import pytest

from learnevict.errors import UsageError
from learnevict.testbed.entries import FAMILIES, SIZES, final_answer, generate

START = re.compile(r"(?:The )?(\w+) (?:has|is in the) (\w+)(?: coins)?")
ENTRY = re.compile(r"(?:Entry (\d+) by (\w+)|(\w+) writes entry (\d+)|In entry (\d+), (\w+) notes): (.*)")
LATER = re.compile(r"(?:Entry (\d+) is cancelled|Correction of entry (\d+): (.*))")


def worked_out(prompt: str) -> str:
    """Returns the response that a prompt asks for."""
    text, question = prompt.split("\n\n")
    counting = re.findall(r"by (\w+) and (\w+) count", question)[0]
    state: dict[str, str] = {}
    entries: dict[int, tuple[str, str]] = {}
    cancelled, corrected = set[int](), dict[int, str]()
    for sentence in text.removesuffix(".").split(". "):
        if found := LATER.fullmatch(sentence):
            (cancelled.add(int(found[1])) if found[1] else corrected.update({int(found[2]): found[3]}))
        elif found := ENTRY.fullmatch(sentence):
            entries[int(found[1] or found[4] or found[5])] = (found[2] or found[3] or found[6], found[7])
        elif (found := START.fullmatch(sentence)) and not entries and len(state) < 4 and found[1] not in state:
            state[found[1]] = found[2]
    lines: list[str] = []
    for number, (writer, said) in sorted(entries.items()):
        if number in cancelled:
            lines.append(f"Entry {number} is cancelled.")
        elif writer not in counting:
            lines.append(f"Entry {number} by {writer} does not count.")
        else:
            words = corrected.get(number, said).split()
            head = f"Entry {number} by {writer}{' corrected' * (number in corrected)}: "
            if words[1] in ("gets", "pays"):
                before, change = int(state[words[0]]), int(words[2]) * (1 if words[1] == "gets" else -1)
                state[words[0]] = str(before + change)
                lines.append(
                    f"{head}{words[0]} {before} {'+' if change > 0 else '-'} {abs(change)} = {before + change}."
                )
            else:
                lines.append(f"{head}{words[1]} from {state[words[1]]} to {words[-1]}.")
                state[words[1]] = words[-1]
    return " ".join([*lines, "Answer: " + ", ".join(f"{holder} {value}" for holder, value in state.items()) + "."])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_response_follows_from_its_prompt(family: str, size: str):
    cases = [generate(family, seed, size=size) for seed in range(40)]
    for case in cases:
        assert worked_out(case.prompt) == case.response
        assert final_answer(case.response) == case.answer
        assert all(re.fullmatch(r" [^\s.,:]+", case.response[start:end]) for start, end in case.checked)
    assert len({case.prompt for case in cases}) == 40
    assert cases[3] == generate(family, 3, size=size) != generate(family, 3, split="train", size=size)


def test_what_does_not_answer_has_no_answer():
    assert final_answer("Entry 1 is cancelled.") is None
    assert final_answer("Answer: Ann 4, Bob") is None
    assert final_answer("Answer: Ann 1. Answer: Ann 4, Bob 2. More") == "Ann 4, Bob 2"
    with pytest.raises(UsageError, match="families are accounts, moves"):
        generate("books", 0)
