"""Free generation under eviction: does the model still reach the answer when it has to live with its own text?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from learnevict.evals.methods import EvaluationSettings, golden_policy
from learnevict.evals.tasks import AnsweredTask
from learnevict.infer.generate import Completion, generate
from learnevict.policy import AnyPolicy


def answer(
    model: Any,
    tokenizer: Any,
    task: AnsweredTask,
    samples: Sequence[Any],
    policy: AnyPolicy | None,
    *,
    tries: int = 1,
    **sampling: Any,
) -> dict[str, Any]:
    """Answers every prompt, in one batch, under the policy (None: the stock cache).

    Args:
        tries: answers to each sample; their figures are averaged (avg@k).
        **sampling: see infer.generate: max_new_tokens, temperature, seed.

    Returns:
        Columns of the log, an entry per sample: `exact`, the share of its tries that are right, of a graded task `score`, the
        mean of their scores, and `tokens` generated in all of them;
        for each sample alike: `seconds` after each batch's first token, and bytes held (`peak`, `end`, `full`).
    """
    prompts = [task.prompt(tokenizer, sample) for sample in samples for _ in range(tries)]
    found = generate(model, tokenizer, policy, prompts, batch_size=len(prompts), **sampling)
    return _scored(tokenizer, task, samples, found, tries)


def answer_golden(
    model: Any,
    tokenizer: Any,
    task: AnsweredTask,
    samples: Sequence[Any],
    budget: int | str,
    settings: EvaluationSettings,
    **sampling: Any,
) -> dict[str, Any]:
    """Answers under golden eviction: a ceiling only while both runs agree (see `generate_golden`).

    Returns:
        As `answer`; `agreed` is the share of each second text that is still the one the oracle has seen.
    """
    prompts = [task.prompt(tokenizer, sample) for sample in samples]
    found, agreed = generate_golden(model, tokenizer, prompts, budget, settings, **sampling)
    return {**_scored(tokenizer, task, samples, found, 1), "agreed": agreed}


def generate_golden(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    budget: int | str,
    settings: EvaluationSettings,
    *,
    streamer: Any = None,
    **sampling: Any,
) -> tuple[list[Completion], list[float]]:
    """Generates answers under golden eviction, in two runs, and says how far the second text follows the first.

    The first run has the full cache; its text gives the labels. The second keeps what they say while it writes the same
    text, and falls back on recency behind the guards from a row's first divergence on.
    """
    first = generate(model, tokenizer, None, prompts, batch_size=len(prompts), **sampling)
    ids, mask = (part.to(model.device) for part in padded(first, tokenizer.pad_token_id or 0))
    policy = golden_policy(model, ids, budget, settings, mask=mask)
    second = generate(model, tokenizer, policy, prompts, batch_size=len(prompts), streamer=streamer, **sampling)
    return second, [agreement(one.tokens, other.tokens) for one, other in zip(first, second, strict=True)]


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
    """Returns the share of the second text before it leaves the first."""
    pairs = enumerate(zip(first, second, strict=False))
    apart = next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
    return apart / len(second)


def _scored(
    tokenizer: Any, task: AnsweredTask, samples: Sequence[Any], answers: list[Completion], tries: int
) -> dict[str, Any]:
    scores = [task.score(samples[index // tries], tokenizer.decode(one.tokens)) for index, one in enumerate(answers)]
    starts, one = range(0, len(answers), tries), answers[0]
    late = sum(len(one.tokens) - 1 for one in answers)
    shares = [round(sum(scores[start : start + tries]) / tries, 6) for start in starts]
    return {
        **({"score": shares} if task.graded else {}),
        "exact": [sum(score == 1 for score in scores[start : start + tries]) / tries for start in starts],
        "tokens": [sum(len(one.tokens) for one in answers[start : start + tries]) for start in starts],
        "seconds": late / one.tokens_per_second / len(samples),
        "peak": one.kv_bytes_peak,
        "end": one.kv_bytes,
        "full": one.kv_bytes_full,
    }
