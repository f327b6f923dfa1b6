"""Teacher-forced judging: the reference text is read once, under eviction, and every prediction along it is scored.

One forward of prompt and response through an evicting cache is the whole run: the event loop lives inside attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.errors import TraceError
from learnevict.evals.contenders import GOLDEN, Rules
from learnevict.infer.attach import attach
from learnevict.infer.cache import EvictingCache, stored_bytes
from learnevict.infer.replay import replay
from learnevict.methods import golden
from learnevict.oracle.collect import golden_trace
from learnevict.policy import Governor
from learnevict.testbed import Sample

TOLERANCE = 1e-3
"""Between float32 logits of an incremental run and of the replay of its trace."""


@dataclass(frozen=True)
class Texts:
    """Reference texts, padded on the left.

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T], 0 = padding.
        checked: tokens the verifier checks.
        spoken: tokens of the response, whose loss is measured.
        prompt_length: real tokens of each prompt.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    checked: Bool[Tensor, "B T"]
    spoken: Bool[Tensor, "B T"]
    prompt_length: list[int]


@dataclass(frozen=True)
class Storage:
    """Bytes of keys and values, per row: the most held, held at the end, and what a full cache would hold."""

    peak: float
    end: float
    full: float


@dataclass(frozen=True)
class Scores:
    """One entry per sample: checked tokens right, checked tokens, and the summed loss of so many response tokens."""

    right: list[int]
    seen: list[int]
    loss: list[float]
    spoken: list[int]
    storage: Storage | None = None


def read(tokenizer: Any, samples: Sequence[Sample], device: Any = "cpu") -> Texts:
    """Tokenise samples, one token a word."""
    texts = tokenizer([sample.text for sample in samples], padding=True, padding_side="left", return_tensors="pt")
    ids, mask = texts["input_ids"], texts["attention_mask"]
    checked, spoken = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    prompts = [len(sample.prompt.split()) for sample in samples]
    for row, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
        marks = torch.tensor(sample.checked)
        assert int(mask[row].sum()) == len(marks), "the tokenizer does not make one token a word"
        checked[row, -len(marks) :] = marks
        spoken[row, prompt - len(marks) :] = True
    return Texts(ids.to(device), mask.to(device), checked.to(device), spoken.to(device), prompts)


@torch.no_grad()
def judge(model: Any, texts: Texts, policy: Governor | None) -> Scores:
    """Scores of the texts under a policy (None: the model as it is, with its stock cache)."""
    if policy is None:
        output = model(input_ids=texts.input_ids, attention_mask=texts.attention_mask, position_ids=positions(texts))
        held = sum(map(stored_bytes, output.past_key_values.layers)) / len(texts.input_ids)
        return score(texts, output.logits, Storage(held, held, held))
    logits, cache = evicted_logits(model, texts, policy)
    return score(texts, logits, storage(cache))


@torch.no_grad()
def judge_golden(model: Any, texts: Texts, budget: int, rules: Rules, *, verify: bool = False) -> Scores:
    """Scores under golden eviction: labels of one full-cache pass, rolled into a trace, replayed.

    Args:
        verify: also run the trace incrementally, through the cache, and compare; gives the storage too.

    Raises:
        TraceError: both runs disagree.
    """
    prompts = torch.tensor(texts.prompt_length) if rules.prompt else None
    trace = golden_trace(
        model, texts.input_ids, texts.attention_mask, budget=budget, block=rules.block, guard=rules.guard,
        prompt_length=prompts,
    )  # fmt: skip
    logits = replay(model, texts.input_ids, trace, texts.attention_mask).logits
    if not verify:
        return score(texts, logits, None)
    policy = golden.policy(budget, trace=trace, **rules.options)
    again, cache = evicted_logits(model, texts, policy)
    apart = float((again - logits)[texts.attention_mask.bool()].abs().max())
    if logits.dtype == torch.float32 and apart > TOLERANCE:
        raise TraceError(
            f"the {GOLDEN} trace replayed and run incrementally gives logits {apart:.2g} apart; please report this"
        )
    return score(texts, logits, storage(cache))


def evicted_logits(model: Any, texts: Texts, policy: Governor) -> tuple[Float[Tensor, "B T V"], EvictingCache]:
    """Logits of one forward through an evicting cache, and the cache."""
    with attach(model, policy, prompt_length=texts.prompt_length) as cache:
        output = model(
            input_ids=texts.input_ids, attention_mask=texts.attention_mask, position_ids=positions(texts),
            past_key_values=cache,
        )  # fmt: skip
    return output.logits, cache


def positions(texts: Texts) -> Int[Tensor, "B T"]:
    """Position of each token in its row, padding aside."""
    return (texts.attention_mask.cumsum(-1) - 1).clamp_min(0)


def score(texts: Texts, logits: Float[Tensor, "B T V"], held: Storage | None) -> Scores:
    """Compare predictions with the tokens that follow them."""
    target, checked, spoken = texts.input_ids[:, 1:], texts.checked[:, 1:], texts.spoken[:, 1:]
    right = (logits[:, :-1].argmax(-1) == target) & checked
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), target.flatten(), reduction="none"
    ).view_as(target)
    return Scores(
        right=right.sum(-1).tolist(),
        seen=checked.sum(-1).tolist(),
        loss=(loss * spoken).sum(-1).tolist(),
        spoken=spoken.sum(-1).tolist(),
        storage=held,
    )


def storage(cache: EvictingCache) -> Storage:
    """Bytes per row, as they are: padding columns of a full cache count."""
    rows = len(cache.clock.seen)
    return Storage(cache.peak_nbytes / rows, cache.nbytes / rows, cache.full_nbytes / rows)
