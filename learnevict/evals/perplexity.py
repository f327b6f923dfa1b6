"""Perplexity of a text under eviction, streamed through the cache in chunks, so that memory stays bounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from learnevict.errors import DataError, UsageError
from learnevict.evals.methods import FULL, GOLDEN, EvaluatedMethod, EvaluationSettings, golden_policy
from learnevict.evals.plan import Cell
from learnevict.evals.records import TEXT_KEYS, Row, source, start_row
from learnevict.evals.tasks import resolve
from learnevict.infer.attach import attach
from learnevict.infer.cache import bytes_held
from learnevict.infer.teacher_forcing import prefill
from learnevict.policy import AnyPolicy, Governor

CHUNK = 512


@dataclass(frozen=True)
class Perplexity:
    """The loss of a text under a cache, and the cache's bytes.

    Attributes:
        loss: negative log-likelihood, summed over `num_tokens` predicted tokens.
        peak, end, full: bytes of the cache.
    """

    loss: float
    num_tokens: int
    peak: int
    end: int
    full: int

    @property
    def value(self) -> float:
        """Returns exp of the mean loss."""
        return math.exp(self.loss / self.num_tokens)


def encode(model: Any, tokenizer: Any, text: str, *, max_tokens: int | None = None) -> Int[Tensor, "1 T"]:
    """Returns token ids of the text, or of its beginning.

    Raises:
        DataError: fewer than two tokens, or words that the vocabulary lacks.
        UsageError: more tokens than the model has positions for.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :max_tokens]
    if ids.shape[1] < 2:
        raise DataError("the text has fewer than two tokens, so nothing is predicted; give a longer one")
    check_known(tokenizer, ids[0], text)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] > limit:
        raise UsageError(
            f"the text has {ids.shape[1]} tokens and the model positions for {limit}; evaluate its beginning with "
            f"--max-tokens {limit}"
        )
    return ids.to(model.device)


def check_known(tokenizer: Any, ids: Int[Tensor, "T"], text: str) -> None:
    """Raises a DataError if the vocabulary lacks words of a text, whose beginning has these ids.

    Some models write their unknown token themselves (SmolLM2: <|endoftext|>); where the text has it, that is no unknown word.
    """
    unknown = tokenizer.unk_token_id
    if unknown is not None and tokenizer.unk_token not in text and bool((ids == unknown).any()):
        known = {tokenizer.decode([token]) for token in set(ids.tolist()) - {unknown}}
        words = [word for word in dict.fromkeys(text.split()) if word not in known][:5]
        raise DataError(f"the model does not know words of this text, such as {', '.join(words)}; use another model")


@torch.no_grad()
def perplexity(
    model: Any,
    ids: Int[Tensor, "1 T"],
    policy: AnyPolicy | None,
    *,
    chunk: int = CHUNK,
    advance: Callable[[int], None] | None = None,
) -> Perplexity:
    """Reads the text once, chunk by chunk, each token predicted from what the cache still holds.

    Args:
        policy: governs the cache; None: the model's own stock cache, the reference.
        chunk: tokens per forward; changes no number.
        advance: called with the number of tokens just read.
    """
    total, last, cache = 0.0, None, None
    with nullcontext() if policy is None else attach(model, policy, prompt_length=[0]) as evicting:
        for part in ids.split(chunk, dim=1):
            if evicting is None:
                output = model(input_ids=part, past_key_values=cache, use_cache=True)
                found, cache = output.logits, output.past_key_values
            else:
                found, cache = prefill(model, evicting, part), evicting
            logits = found[0].float()
            before = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
            target = part[0, 1:] if last is None else part[0]
            total += float(torch.nn.functional.cross_entropy(before, target, reduction="sum"))
            last = logits[-1:]
            if advance is not None:
                advance(part.shape[1])
    assert cache is not None
    return Perplexity(total, ids.shape[1] - 1, **bytes_held(cache))


def text_cells(
    name: str, ids: Int[Tensor, "1 T"], methods: Sequence[EvaluatedMethod], budgets: Sequence[str]
) -> list[Cell]:
    """Returns the cells of one text, the full cache first; a budget such as "1/4" is a share of this text.

    Raises:
        BudgetError: a budget that is not understood.
    """
    cells = [Cell(EvaluatedMethod(FULL, FULL), name, FULL, None)]
    for asked in budgets:
        budget = resolve(asked, lambda: ids.shape[1])
        cells += [Cell(one, name, asked, budget) for one in methods if one.method != FULL]
    return cells


def policy_for(cell: Cell, settings: EvaluationSettings, model: Any, ids: Int[Tensor, "1 T"]) -> Governor | None:
    """Returns the policy of a cell, None for the full cache; golden reads the text beforehand.

    Raises:
        UsageError: golden with a budget that is no number of slots.
    """
    if cell.budget is None:
        return None
    if cell.evaluated_method.method == GOLDEN:
        return golden_policy(model, ids, cell.budget, cell.evaluated_method.rules(settings))
    return cell.evaluated_method.policy(cell.budget, settings)


def text_row(cell: Cell, model: str, found: Perplexity, full: Perplexity) -> Row:
    """Returns a row of `eval --task perplexity`: the family is the text; ratios are to the full cache."""
    figures = (found.value, found.value / full.value, found.num_tokens)
    bytes_held = {"kv_bytes_peak": found.peak, "kv_bytes_end": found.end, "kv_bytes_full": found.full}
    row = start_row(cell, 1) | bytes_held | {"loss_ratio": found.loss / full.loss} | source(cell, model)
    return row | dict(zip(TEXT_KEYS, figures, strict=True))
