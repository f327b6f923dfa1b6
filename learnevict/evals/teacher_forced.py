"""Teacher-forced evaluation: the reference text is read once, under eviction, and every prediction along it is scored.

One forward of prompt and response through an evicting cache is the whole run: the event loop lives inside attention. (Policies
that decide when all layers have run need several, see infer.prefill.)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from learnevict.evals.methods import EvaluationSettings
from learnevict.evals.tasks import TextBatch
from learnevict.infer.attach import attach
from learnevict.infer.cache import EvictingCache, bytes_held
from learnevict.infer.teacher_forcing import read_once
from learnevict.methods import golden
from learnevict.oracle.collect import future_of
from learnevict.oracle.metrics import KeptSlots, compare
from learnevict.oracle.reference import Reference, losses, recording
from learnevict.policy import AnyPolicy, governor

Columns = dict[str, Any]
"""What goes into the log: a list has an entry per sample, a number holds for each of them.

`right` and `seen` are answer-mask tokens, `loss` is summed over the `spoken` tokens of the response; `peak`, `end` and `full`
are bytes of keys and values, per row; what was kept beside what the oracle would have kept is in the columns of KeptSlots.
"""


def reference(model: Any, texts: TextBatch, settings: EvaluationSettings) -> Reference:
    """Returns what the oracle says of texts: one full-cache pass, for all methods that are measured on them."""
    return Reference.of(
        model, texts.input_ids, texts.attention_mask, block=settings.block, prompt_length=texts.prompt_length,
        loss_mask=texts.loss_mask,
    )  # fmt: skip


@torch.no_grad()
def measure(model: Any, texts: TextBatch, policy: AnyPolicy | None, beside: Reference | None = None) -> Columns:
    """Returns scores of the texts under a policy (None: the model as it is, with its stock cache).

    Args:
        beside: of the same texts, which are aligned; what the policy keeps is then compared with what the oracle would.
    """
    if policy is None:
        position = (texts.attention_mask.cumsum(-1) - 1).clamp_min(0)
        output = model(
            input_ids=texts.input_ids, attention_mask=texts.attention_mask, position_ids=position,
            logits_to_keep=columns_to_score(texts),
        )  # fmt: skip
        return score(texts, output.logits) | _bytes_held(output.past_key_values, texts)
    if beside is None:
        logits, cache = _evicted_logits(model, texts, policy)
        return score(texts, logits) | _bytes_held(cache, texts)
    policy = governor(policy)
    recorded, scores = recording(policy)
    logits, cache = _evicted_logits(model, texts, recorded, record=True)
    return score(texts, logits) | _kept(compare(policy, beside, cache.trace(), scores)) | _bytes_held(cache, texts)


def measure_golden(
    model: Any,
    texts: TextBatch,
    budget: int | str,
    settings: EvaluationSettings,
    *,
    beside: Reference | None = None,
) -> Columns:
    """Returns scores under golden eviction, by labels of one full-cache pass; `beside` as of `measure`, with its labels."""
    texts = texts.aligned(settings.block)
    beside = reference(model, texts, settings) if beside is None else beside
    labels: list[Tensor | None] = [None] * model.config.get_text_config(decoder=True).num_hidden_layers
    for index, part in zip(beside.layers, beside.labels, strict=True):
        labels[index] = part
    return measure(model, texts, golden.from_labels(budget, future_of(labels), **settings.options), beside)


def columns_to_score(texts: TextBatch) -> int:
    """Returns how many last columns reach from the first one whose prediction is scored to the end."""
    scored = (texts.answer_mask | texts.loss_mask)[:, 1:].any(0)
    return len(scored) + 1 - int(scored.int().argmax())


def score(texts: TextBatch, logits: Float[Tensor, "B N V"]) -> Columns:
    """Compares predictions with the tokens that follow them; logits are of the last N columns, N >= columns_to_score(texts)."""
    input_ids, answer, loss = (
        part[:, -logits.shape[1] :] for part in (texts.input_ids, texts.answer_mask, texts.loss_mask)
    )
    right = (logits[:, :-1].argmax(-1) == input_ids[:, 1:]) & answer[:, 1:]
    return {
        "right": right.sum(-1).tolist(),
        "seen": answer[:, 1:].sum(-1).tolist(),
        "loss": [round(value, 6) for value in losses(logits, input_ids, loss).tolist()],
        "spoken": loss[:, 1:].sum(-1).tolist(),
    }


def _evicted_logits(
    model: Any, texts: TextBatch, policy: AnyPolicy, *, record: bool = False
) -> tuple[Float[Tensor, "B N V"], EvictingCache]:
    """Returns logits of what is scored of texts, read through an evicting cache, and the cache."""
    with attach(model, policy, record=record, prompt_length=texts.prompt_length) as cache:
        logits = read_once(model, cache, texts.input_ids, texts.attention_mask, columns_to_score(texts))
        return logits, cache


def _kept(slots: KeptSlots) -> Columns:
    """Returns six digits of each figure; a column that is undefined (NaN) in all samples is left out."""
    found = {
        name: [float(f"{value:.6g}") for value in part.tolist() if value == value] for name, part in vars(slots).items()
    }
    return {name: part for name, part in found.items() if part}


def _bytes_held(cache: Any, texts: TextBatch) -> Columns:
    """Returns bytes per row, as they are: padding columns of a full cache count."""
    return {name: total / len(texts.input_ids) for name, total in bytes_held(cache).items()}
