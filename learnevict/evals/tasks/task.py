"""What a model is asked: a task yields samples, says what is read of them, and scores answers.

The suite, its log, resume and reports know a task by the protocol `Task` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.config import Budget
from learnevict.errors import UsageError
from learnevict.oracle.reference import align
from learnevict.policy import AnyPolicy

SHARED_MODES = ("teacher", "free")
"""Modes that the suite measures itself; a task measures its own."""


@dataclass(frozen=True)
class TextBatch:
    """Reference texts, padded on the left (see `aligned` for an exception).

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T], 0 = padding.
        answer_mask: tokens that decide whether an answer is right.
        loss_mask: tokens of the response, whose loss is measured.
        prompt_length: real tokens of each prompt.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    answer_mask: Bool[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    prompt_length: list[int]

    def to(self, device: Any) -> TextBatch:
        """Returns the same on a device."""
        parts = (self.input_ids, self.attention_mask, self.answer_mask, self.loss_mask)
        return TextBatch(*(part.to(device) for part in parts), prompt_length=self.prompt_length)

    def aligned(self, block: int) -> TextBatch:
        """Returns the same, padded on the left by multiples of a block and on the right by the rest: events fall together."""
        parts = (self.input_ids, self.attention_mask, self.answer_mask, self.loss_mask)
        return TextBatch(*align(block, self.attention_mask, *parts), prompt_length=self.prompt_length)


class Task(Protocol):
    """Samples of one kind. What its modes ask of a task besides is in the protocols below."""

    @property
    def name(self) -> str:
        """What rows and the log call it: their family."""
        ...

    @property
    def modes(self) -> tuple[str, ...]:
        """How it can be measured: "teacher" (ReferenceTask), "free" (AnsweredTask), or ways of its own (MeasuredTask)."""
        ...

    @property
    def origin(self) -> dict[str, Any]:
        """Everything but the seed that makes its samples what they are; the tasks of one log have it in common."""
        ...

    def mean_length(self, *, prompt: bool = True) -> float:
        """Returns mean tokens of a sample, with or without its prompt: what a budget such as "1/4" is a share of."""
        ...

    def samples(self, seeds: Sequence[int]) -> Sequence[Any]:
        """Returns the samples of these seeds; only the task itself looks into them."""
        ...


def joined(pairs: Sequence[tuple[list[int], list[int]]], pad: int, checked: Sequence[Bool[Tensor, "_"]]) -> TextBatch:
    """Returns reference texts made of token ids of prompts and responses.

    Args:
        pairs: prompt and response of each text.
        pad: the token to pad with.
        checked: which tokens of each response decide whether an answer is right.
    """
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    ids = torch.full((len(pairs), width), pad)
    mask, answer, loss = torch.zeros_like(ids), *(torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
    for row, ((prompt, response), marks) in enumerate(zip(pairs, checked, strict=True)):
        ids[row, width - len(prompt) - len(response) :] = torch.tensor(prompt + response)
        mask[row, width - len(prompt) - len(response) :] = 1
        loss[row, width - len(response) :] = True
        answer[row, width - len(response) :] = marks
    return TextBatch(ids, mask, answer, loss, [len(prompt) for prompt, _ in pairs])


def unknown_length(name: str) -> NoReturn:
    """Raises a UsageError: a task whose answers are of any length has no mean that a budget could be a share of."""
    raise UsageError(f"how long answers to {name} get is not known; give budgets in tokens, such as 512, or 25%")


class ReferenceTask(Task, Protocol):
    """A task that is measured along reference texts: mode "teacher"."""

    def reference(self, tokenizer: Any, samples: Sequence[Any]) -> TextBatch:
        """Returns prompts with their reference answers."""
        ...


class AnsweredTask(Task, Protocol):
    """A task whose answers the model writes itself: mode "free"."""

    @property
    def max_new_tokens(self) -> int:
        """The longest answer that is waited for."""
        ...

    @property
    def graded(self) -> bool:
        """Whether an answer that is partly right has a score between 0 and 1."""
        ...

    def prompt(self, tokenizer: Any, sample: Any) -> list[int]:
        """Returns the token ids after which the model answers."""
        ...

    def score(self, sample: Any, answer: str) -> float:
        """Returns 1 for a right answer and 0 for a wrong one, or a share of it."""
        ...


class MeasuredTask(Task, Protocol):
    """A task that is measured in ways of its own, which `modes` names."""

    def measure(
        self, mode: str, model: Any, tokenizer: Any, samples: Sequence[Any], policy: AnyPolicy | None
    ) -> Mapping[str, Any]:
        """Returns columns of the log for one batch: `exact`, `tokens` and bytes as of evals.generation.answer."""
        ...

    def future(
        self, mode: str, model: Any, tokenizer: Any, samples: Sequence[Any], block: int
    ) -> Float[Tensor, "L B H T M"]:
        """Returns what the full cache says of one batch, as `methods.golden.from_labels` reads it: golden evicts by it."""
        ...


def fingerprint(parts: Iterable[str]) -> str:
    """Returns a short hash of what samples are made of: a file of the same name may hold something else tomorrow."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def is_share(text: str) -> bool:
    """Returns whether a budget is a share such as "1/4"."""
    return "/" in text


def resolve(text: str, whole: Callable[[], float]) -> int | str:
    """Returns tokens for "1/4" (of what `whole` returns) and "64"; per cent and bytes are left to the cache.

    Raises:
        BudgetError: not understood, or a share above 1.
    """
    budget = Budget.parse(text)
    if not is_share(text):
        return int(budget.amount) if budget.unit == "tokens" else text
    above, below = map(float, text.split("/"))
    return round(whole() * above / below)
