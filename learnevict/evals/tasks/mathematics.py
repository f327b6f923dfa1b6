"""Mathematics in words as a task: problems of a JSONL file, such as GSM8K, MATH-500 or AIME, with a final answer each.

Numbers are compared as numbers; other answers need math-verify (`pip install 'learnevict[eval]'`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch

from learnevict.errors import DataError, UsageError
from learnevict.evals.tasks.task import TextBatch, fingerprint, joined, unknown_length
from learnevict.infer.generate import read_chat, read_text
from learnevict.infer.prompts import checked

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
INSTRUCTION = "Solve the problem step by step. Write the final answer in \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """A problem, its worked solution (may be empty) and its final answer."""

    question: str
    solution: str
    answer: str


def read_problem(row: Mapping[str, Any]) -> Problem:
    """Returns a problem from a row of GSM8K, MATH-500 or AIME.

    Raises:
        DataError: neither "question" nor "problem", no "answer", or half a character; worded to follow the name of the row.
    """
    question, answer = row.get("question", row.get("problem")), row.get("answer")
    if not isinstance(question, str) or answer is None:
        raise DataError(f'is no problem: it needs "question" or "problem", and "answer", and has {", ".join(row)}')
    for part in (question, str(answer), str(row.get("solution", ""))):
        checked(part)
    solution, mark, final = str(answer).rpartition("####")
    if mark:  # GSM8K: "...<<3*4=12>>12 eggs\n#### 12"
        return Problem(question, re.sub(r"<<[^>]*>>", "", solution).strip(), final.strip())
    return Problem(question, str(row.get("solution", "")), str(answer))


def final_answer(text: str) -> str:
    """Returns what stands in the last \\boxed{...}, else behind the last "####", else the last number; "" if there is none."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 0, start + len("\\boxed{")
        for index in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth < 0:
                return text[begin:index].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip()
    found = NUMBER.findall(text)
    return found[-1] if found else ""


def number(text: str) -> Fraction | None:
    """Returns the number that a text is, without thousands separators, dollars and per cent signs; None if it is none."""
    above, _, below = text.replace(",", "").strip(" $%.").partition("/")
    try:  # a model may write anything: 3.5/2, 5/00, or thousands of digits
        return Fraction(above) / Fraction(below or 1) if NUMBER.fullmatch(f"{above}/{below or 1}") else None
    except (ValueError, ZeroDivisionError):
        return None


def same(gold: str, found: str) -> bool:
    """Returns whether two final answers are the same: of a number, the only one in what was found; else as math-verify says."""
    wanted = number(gold)
    if wanted is not None:
        given = NUMBER.findall(found)
        return number(given[0] if len(given) == 1 else found) == wanted
    if gold.strip() == found.strip() or not found:
        return bool(found)
    parse, verify = math_verify()
    return bool(verify(*(parse(f"${text}$") for text in (gold, found))))


def math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the parser and the comparison of math-verify, each with its own limit of some seconds.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from math_verify import parse, verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            "answers that are no numbers are compared by math-verify: pip install 'learnevict[eval]'"
        ) from error
    return parse, verify


@dataclass(frozen=True)
class MathTask:
    """Problems with final answers, worked out freely, and along their worked solutions.

    Attributes:
        name: what rows call it.
        problems: in the file's order; the seed of a sample is its place.
        examples: worked examples before every problem, as plain text; none: the problem alone.
        chat: ask under the model's chat template, with an instruction.
        max_new_tokens: the longest answer.
    """

    name: str
    problems: tuple[Problem, ...]
    examples: tuple[Problem, ...] = ()
    chat: bool = True
    max_new_tokens: int = 1024

    graded = False

    def __post_init__(self) -> None:
        if any(number(one.answer) is None for one in self.problems):
            math_verify()  # missing, it would stop the run in its middle

    @property
    def modes(self) -> tuple[str, ...]:
        """Returns "teacher" besides "free" if all problems have worked solutions."""
        return ("teacher", "free") if all(one.solution for one in self.problems) else ("free",)

    @property
    def origin(self) -> dict[str, Any]:
        """See Task."""
        return {
            "tasks": "mathematics 1",
            "problems": fingerprint(map(repr, self.problems)),
            "examples": fingerprint(map(repr, self.examples)),
            "chat": self.chat,
            "limit": self.max_new_tokens,
        }

    @cached_property
    def shown(self) -> str:
        """Returns the worked examples."""
        return "".join(
            f"Question: {one.question}\nAnswer: {one.solution}\n#### {one.answer}\n\n" for one in self.examples
        )

    def mean_length(self, *, prompt: bool = True) -> float:
        """Raises a UsageError, see unknown_length."""
        unknown_length(self.name)

    def samples(self, seeds: Sequence[int]) -> list[Problem]:
        """Returns problems by their places.

        Raises:
            DataError: there are fewer.
        """
        if max(seeds) >= len(self.problems):
            raise DataError(f"{self.name} has {len(self.problems)} problems; use fewer --samples or a smaller --seed")
        return [self.problems[seed] for seed in seeds]

    def prompt(self, tokenizer: Any, sample: Problem) -> list[int]:
        """See Task."""
        if self.chat:
            return read_chat(
                tokenizer, [{"role": "user", "content": f"{self.shown}{sample.question}\n\n{INSTRUCTION}"}]
            )
        return read_text(tokenizer, f"{self.shown}Question: {sample.question}\nAnswer:")

    def reference(self, tokenizer: Any, samples: Sequence[Problem]) -> TextBatch:
        """Returns prompts with worked solutions; every token of a solution is checked and counts."""
        texts = [(self.prompt(tokenizer, one), self._solution(tokenizer, one)) for one in samples]
        checked = [torch.ones(len(solution), dtype=torch.bool) for _, solution in texts]
        return joined(texts, tokenizer.pad_token_id or 0, checked)

    def _solution(self, tokenizer: Any, sample: Problem) -> list[int]:
        text = f"{'' if self.chat else ' '}{sample.solution}\n#### {sample.answer}"
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def score(self, sample: Problem, answer: str) -> float:
        """Returns 1 if the final answer is right."""
        return float(same(sample.answer, final_answer(answer.partition("\nQuestion:")[0])))
