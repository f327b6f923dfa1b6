"""Accuracy of a model on the testbed with a full cache: teacher-forced on checked tokens, and by free generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from learnevict.testbed.clauses import Sample, final_answer
from learnevict.testbed.vocabulary import PAD


def batches(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Splits samples into groups of similar length whose padded size stays below the limit."""
    groups: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda sample: len(sample.answer_mask)):
        if groups[-1] and (len(groups[-1]) + 1) * len(sample.answer_mask) > max_tokens:
            groups.append([])
        groups[-1].append(sample)
    return groups


def to_tensors(samples: Sequence[Sample], ids: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns token ids, loss weights and answer masks [B, T], padded on the right: causal attention then needs no mask."""
    width = max(len(sample.answer_mask) for sample in samples)
    tokens = torch.full((len(samples), width), ids[PAD])
    weights = torch.zeros(len(samples), width)
    checked = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.answer_mask)
        tokens[row, :length] = torch.tensor([ids[word] for word in sample.text.split()])
        weights[row, :length] = torch.tensor(sample.weights)
        checked[row, :length] = torch.tensor(sample.answer_mask)
    return tokens, weights, checked


@torch.no_grad()
def step_accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> tuple[float, float]:
    """Returns the share of checked tokens right given the reference text, and of samples with every response token right."""
    ids, right, seen, perfect = tokenizer.get_vocab(), 0, 0, 0
    for group in batches(samples, 10_000):
        tokens, weights, checked = (tensor.to(model.device) for tensor in to_tensors(group, ids))
        hits = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1) == tokens[:, 1:]
        right, seen = right + int((hits & checked[:, 1:]).sum()), seen + int(checked.sum())
        perfect += int((hits | (weights[:, 1:] == 0)).all(-1).sum())
    return right / seen, perfect / len(samples)


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 400,
    rows: int = 50,
) -> float:
    """Returns the share of final answers right under greedy generation, in left-padded batches of so many rows."""
    right = 0
    for start in range(0, len(samples), rows):
        group = samples[start : start + rows]
        inputs = tokenizer([sample.prompt for sample in group], return_tensors="pt", padding=True).to(model.device)
        generated = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens, do_sample=False
        )
        texts = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :])
        right += sum(final_answer(text) == sample.answer for sample, text in zip(group, texts, strict=True))
    return right / len(samples)
