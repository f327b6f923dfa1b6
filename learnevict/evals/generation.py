"""Free generation under eviction: does the model still reach the answer when it has to live with its own text?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from learnevict.evals.methods import EvaluationSettings
from learnevict.evals.teacher_forced import BytesHeld
from learnevict.infer.generate import Completion, generate, read_text
from learnevict.methods import golden
from learnevict.oracle.collect import golden_trace
from learnevict.policy import Governor
from learnevict.testbed import Sample, verify


@dataclass(frozen=True)
class Decoding:
    """How answers are written: greedy at temperature 0, else `tries` draws per sample (avg@k) from `seed` on."""

    max_new_tokens: int = 400
    temperature: float = 0.0
    tries: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Answers:
    """One entry per sample: share of its tries that are right, and tokens generated in all of them.

    Attributes:
        seconds: spent on new tokens after each batch's first.
        agreed: golden only: share of the second text that is still the one the oracle has seen.
    """

    exact: list[float]
    tokens: list[int]
    storage: BytesHeld
    seconds: float
    agreed: list[float] | None = None


def answer(
    model: Any, tokenizer: Any, samples: Sequence[Sample], policy: Governor | None, decoding: Decoding
) -> Answers:
    """Generates an answer to every prompt, in one batch, under the policy (None: the stock cache)."""
    prompts = [read_text(tokenizer, sample.prompt) for sample in samples for _ in range(decoding.tries)]
    return _marked(tokenizer, samples, _generate(model, tokenizer, policy, prompts, decoding), decoding.tries)


def answer_golden(
    model: Any, tokenizer: Any, samples: Sequence[Sample], budget: int, rules: EvaluationSettings, decoding: Decoding
) -> Answers:
    """Generates answers under golden eviction, in two runs: a ceiling only while their texts agree.

    The first run has the full cache; its text gives the labels. The second follows their trace while it writes the same
    text, and falls back on recency behind the guards from a row's first divergence on.
    """
    prompts = [read_text(tokenizer, sample.prompt) for sample in samples]
    first = _generate(model, tokenizer, None, prompts, decoding)
    ids, mask = padded(first, tokenizer.pad_token_id)
    ids, mask = ids.to(model.device), mask.to(model.device)
    length = torch.tensor([len(prompt) for prompt in prompts])
    trace = golden_trace(model, ids, mask, budget=budget, block=rules.block, guard=rules.guard, prompt_length=length)
    policy = golden.policy(budget, trace=trace, text=ids, **rules.options)
    second = _generate(model, tokenizer, policy, prompts, decoding)
    marked = _marked(tokenizer, samples, second, 1)
    agreed = [agreement(one.tokens, other.tokens) for one, other in zip(first, second, strict=True)]
    return Answers(marked.exact, marked.tokens, marked.storage, marked.seconds, agreed)


def padded(answers: Sequence[Completion], pad: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Returns prompts and answers as generation laid them out: prompts end in one column, answers begin in the next."""
    left = max(len(one.prompt) for one in answers)
    width = left + max(len(one.tokens) for one in answers)
    ids, mask = torch.full((len(answers), width), pad), torch.zeros(len(answers), width, dtype=torch.int64)
    for row, one in enumerate(answers):
        span = slice(left - len(one.prompt), left + len(one.tokens))
        ids[row, span], mask[row, span] = torch.tensor(one.prompt + one.tokens), 1
    return ids, mask


def agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Returns share of the second text before it leaves the first."""
    pairs = enumerate(zip(first, second, strict=False))
    apart = next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
    return apart / len(second)


def _generate(
    model: Any, tokenizer: Any, policy: Governor | None, prompts: list[list[int]], decoding: Decoding
) -> list[Completion]:
    return generate(
        model, tokenizer, policy, prompts, batch_size=len(prompts), max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature, seed=decoding.seed,
    )  # fmt: skip


def _marked(tokenizer: Any, samples: Sequence[Sample], answers: list[Completion], tries: int) -> Answers:
    right = [verify(samples[index // tries], tokenizer.decode(one.tokens)) for index, one in enumerate(answers)]
    starts = range(0, len(answers), tries)
    late = sum(len(one.tokens) - 1 for one in answers)
    one = answers[0]
    return Answers(
        exact=[sum(right[start : start + tries]) / tries for start in starts],
        tokens=[sum(len(one.tokens) for one in answers[start : start + tries]) for start in starts],
        storage=BytesHeld(one.kv_bytes_peak, one.kv_bytes, one.kv_bytes_full),
        seconds=late / one.tokens_per_second,
    )
