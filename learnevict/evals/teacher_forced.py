"""Teacher-forced evaluation: the reference text is read once, under eviction, and every prediction along it is scored.

One forward of prompt and response through an evicting cache is the whole run: the event loop lives inside attention. (Policies
that decide when all layers have run need several, see infer.prefill.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learnevict.errors import TraceError
from learnevict.evals.methods import GOLDEN, EvaluationSettings
from learnevict.infer.attach import attach
from learnevict.infer.cache import EvictingCache, stored_bytes
from learnevict.infer.teacher_forcing import read_once, replay
from learnevict.methods import golden
from learnevict.oracle import golden as roll_golden
from learnevict.oracle.metrics import KeptSlots, compare
from learnevict.oracle.reference import Reference, align, losses, recording
from learnevict.policy import Governor
from learnevict.signals import Trace
from learnevict.testbed import Sample

TOLERANCE = 1e-3
"""Between float32 logits of an incremental run and of the replay of its trace."""


@dataclass(frozen=True)
class TextBatch:
    """Reference texts, padded on the left (see `aligned` for an exception).

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T], 0 = padding.
        answer_mask: tokens that the verifier checks.
        loss_mask: tokens of the response, whose loss is measured.
        prompt_length: real tokens of each prompt.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    answer_mask: Bool[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]
    prompt_length: list[int]

    def aligned(self, block: int) -> TextBatch:
        """Returns the same, padded on the left by multiples of a block and on the right by the rest: events fall together."""
        parts = (self.input_ids, self.attention_mask, self.answer_mask, self.loss_mask)
        ids, mask, answer_mask, loss_mask = align(block, self.attention_mask, *parts)
        return TextBatch(ids, mask, answer_mask, loss_mask, self.prompt_length)


@dataclass(frozen=True)
class BytesHeld:
    """Bytes of keys and values, per row: the most held, held at the end, and what a full cache would hold."""

    peak: float
    end: float
    full: float


@dataclass(frozen=True)
class Scores:
    """One entry per sample: checked tokens right, checked tokens, summed loss of the response and its number of tokens.

    `choices`: what was kept beside what the oracle would have kept, if that was asked for.
    """

    right: list[int]
    seen: list[int]
    loss: list[float]
    loss_tokens: list[int]
    storage: BytesHeld | None = None
    choices: KeptSlots | None = None


def read(tokenizer: Any, samples: Sequence[Sample], device: Any = "cpu") -> TextBatch:
    """Tokenises samples, one token a word."""
    texts = tokenizer([sample.text for sample in samples], padding=True, padding_side="left", return_tensors="pt")
    ids, mask = texts["input_ids"], texts["attention_mask"]
    answer_mask, loss_mask = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    prompts = [len(sample.prompt.split()) for sample in samples]
    for row, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
        marks = torch.tensor(sample.answer_mask)
        assert int(mask[row].sum()) == len(marks), "the tokenizer does not make one token a word"
        answer_mask[row, -len(marks) :] = marks
        loss_mask[row, prompt - len(marks) :] = True
    return TextBatch(ids.to(device), mask.to(device), answer_mask.to(device), loss_mask.to(device), prompts)


def reference(model: Any, texts: TextBatch, rules: EvaluationSettings) -> Reference:
    """Returns what the oracle says of texts: one full-cache pass, for all methods that are measured on them."""
    return Reference.of(
        model, texts.input_ids, texts.attention_mask, block=rules.block, prompt_length=texts.prompt_length,
        loss_mask=texts.loss_mask,
    )  # fmt: skip


@torch.no_grad()
def measure(model: Any, texts: TextBatch, policy: Governor | None, beside: Reference | None = None) -> Scores:
    """Returns scores of the texts under a policy (None: the model as it is, with its stock cache).

    Args:
        beside: of the same texts, which are aligned; what the policy keeps is then compared with what the oracle would.
    """
    if policy is None:
        output = model(input_ids=texts.input_ids, attention_mask=texts.attention_mask, position_ids=positions(texts))
        held = sum(map(stored_bytes, output.past_key_values.layers)) / len(texts.input_ids)
        return score(texts, output.logits, BytesHeld(held, held, held))
    if beside is None:
        logits, cache = evicted_logits(model, texts, policy)
        return score(texts, logits, storage(cache))
    recorded, scores = recording(policy)
    logits, cache = evicted_logits(model, texts, recorded, record=True)
    return replace(score(texts, logits, storage(cache)), choices=compare(policy, beside, cache.trace(), scores))


@torch.no_grad()
def measure_golden(
    model: Any,
    texts: TextBatch,
    budget: int,
    rules: EvaluationSettings,
    *,
    verify: bool = False,
    beside: Reference | None = None,
) -> Scores:
    """Returns scores under golden eviction: labels of one full-cache pass, rolled into a trace, replayed.

    Args:
        verify: also run the trace incrementally, through the cache, and compare; gives the storage too.
        beside: see `measure`; its labels are used.

    Raises:
        TraceError: both runs disagree.
    """
    texts = texts.aligned(rules.block)
    beside = reference(model, texts, rules) if beside is None else beside
    trace = golden_trace_of(model, beside, budget, rules)
    logits = replay(model, texts.input_ids, trace, texts.attention_mask).logits
    policy = golden.policy(budget, trace=trace, **rules.options)
    scores = replace(score(texts, logits, None), choices=compare(policy, beside, trace, []))
    if not verify:
        return scores
    again, cache = evicted_logits(model, texts, policy)
    apart = float((again - logits)[texts.attention_mask.bool()].abs().max())
    if logits.dtype == torch.float32 and apart > TOLERANCE:
        raise TraceError(
            f"the {GOLDEN} trace replayed and run incrementally gives logits {apart:.2g} apart; please report this"
        )
    return replace(scores, storage=storage(cache))


def golden_trace_of(model: Any, beside: Reference, budget: int, rules: EvaluationSettings) -> Trace:
    """Returns the golden trace of texts whose labels are known."""
    labels: list[Tensor | None] = [None] * model.config.get_text_config(decoder=True).num_hidden_layers
    for index, part in zip(beside.layers, beside.labels, strict=True):
        labels[index] = part
    valid = beside.attention_mask.bool()
    prompt = beside.prompt if rules.prompt else None
    return roll_golden(labels, budget=budget, block=rules.block, guard=rules.guard, valid=valid, prompt_length=prompt)


def evicted_logits(
    model: Any, texts: TextBatch, policy: Governor, *, record: bool = False
) -> tuple[Float[Tensor, "B T V"], EvictingCache]:
    """Returns logits of texts read through an evicting cache, and the cache."""
    with attach(model, policy, record=record, prompt_length=texts.prompt_length) as cache:
        logits = read_once(model, cache, texts.input_ids, texts.attention_mask)
    return logits, cache


def positions(texts: TextBatch) -> Int[Tensor, "B T"]:
    """Returns position of each token in its row, padding aside."""
    return (texts.attention_mask.cumsum(-1) - 1).clamp_min(0)


def score(texts: TextBatch, logits: Float[Tensor, "B T V"], held: BytesHeld | None) -> Scores:
    """Compares predictions with the tokens that follow them."""
    right = (logits[:, :-1].argmax(-1) == texts.input_ids[:, 1:]) & texts.answer_mask[:, 1:]
    return Scores(
        right=right.sum(-1).tolist(),
        seen=texts.answer_mask[:, 1:].sum(-1).tolist(),
        loss=losses(logits, texts.input_ids, texts.loss_mask).tolist(),
        loss_tokens=texts.loss_mask[:, 1:].sum(-1).tolist(),
        storage=held,
    )


def storage(cache: EvictingCache) -> BytesHeld:
    """Returns bytes per row, as they are: padding columns of a full cache count."""
    rows = len(cache.clock.seen)
    return BytesHeld(cache.peak_nbytes / rows, cache.nbytes / rows, cache.full_nbytes / rows)
