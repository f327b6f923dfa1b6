"""KVzip's target (arXiv 2505.23416): the attention that the repetition of a context's chunk pays to the chunk.

    columns    [ context, padded on the left | prompt, chunk 1 | prompt, chunk 2 | ... ]

The softmax of a part runs over {sinks, the chunk's keys, the part's keys}. By its positions every part stands right after the
context, so all are read in one replayed pass, under a trace that ends each part's tokens where the next begins. Where some
layers stay stock, whose windows count columns, every part is read in a pass of its own.

Departures from KVzip's code: every row has chunks of its own, so padding changes nothing; the first tokens of a row stand for
its system prompt; a text no longer than a chunk is repeated whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from learnevict.errors import UsageError
from learnevict.infer.model.supported import evicting_layers
from learnevict.infer.teacher_forcing import Received, replay
from learnevict.oracle.collect import full_trace, layer_labels
from learnevict.oracle.reducers import KVZIP, Reducers
from learnevict.signals import NEVER, Trace

Visitor = Callable[[int, Received, Tensor], None]
"""Called with a layer's index, what its attention received of the context, and the labels of the context."""


REPEAT = "\n\nRepeat the previous context exactly."
"""What a model that follows instructions is told before it reads a text again."""


def repeat_prompt(tokenizer: Any, words: str = "auto") -> tuple[int, ...]:
    """Returns the token ids before a repetition: of `words`; "auto" is REPEAT for a model with a chat template, else none."""
    if words == "auto":
        words = REPEAT if tokenizer.chat_template else "none"
    return () if words == "none" else tuple(tokenizer(words, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Repeating:
    """How a context is repeated.

    Attributes:
        chunk: tokens per part (2048 in KVzip).
        sinks: first tokens of a row, seen by every part.
        prompt: token ids before each repeated chunk; none for a model that cannot follow instructions.
        tail: last tokens of the chunk before, put between prompt and chunk (8 in KVzip's code).
    """

    chunk: int = 2048
    sinks: int = 4
    prompt: tuple[int, ...] = ()
    tail: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.sinks < 0 or not 0 <= self.tail <= self.chunk:
            raise UsageError(
                f"chunk={self.chunk}, sinks={self.sinks}, tail={self.tail}: chunks have at least 1 token, sinks at least 0, "
                "and a tail is no longer than a chunk"
            )


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Tensor | None = None,
    *,
    how: Repeating | None = None,
    reduce: Reducers = KVZIP,
    visit: Visitor | None = None,
) -> list[Tensor | None]:
    """Returns how much each context token is needed to repeat its chunk, per layer [B, heads, T]; None for stock layers.

    Args:
        model: the base model.
        input_ids: the contexts.
        attention_mask: [B, T], 0 = padding; padding gets `reduce.empty`.
        how: chunks and prompt; default Repeating().
        reduce: KVZIP, KVZIP_PLUS or KVZAP, or a variant of them.
        visit: called once per evicting layer.

    Raises:
        ModelError: contributions are asked for, but a layer's output projection is not found.
    """
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    kinds = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    labels: list[Tensor | None] = [None] * len(kinds)
    parts = _parts(input_ids, valid, how or Repeating())
    passes = [parts] if len(evicting_layers(kinds)) == len(kinds) else [[part] for part in parts]
    for group in passes:
        text = _Text(input_ids, valid, group)

        def observe(layer: int, received: Received, text: _Text = text, last: bool = group is passes[-1]) -> None:
            found = labels[layer] = text.labels(model, reduce, layer, received, labels[layer])
            if visit is not None and last:
                visit(layer, received.at(slice(input_ids.shape[1])), found)

        replay(
            model, text.ids, text.trace(model), text.valid.long(), observe=observe,
            position_ids=text.positions, logits_to_keep=1,
        )  # fmt: skip
    return labels


@dataclass(frozen=True)
class _Part:
    """One chunk and its repetition: context columns that are labelled and that are seen, bool [B, T]; what is read again."""

    chunk: Bool[Tensor, "B T"]
    seen: Bool[Tensor, "B T"]
    ids: Int[Tensor, "B P"]
    valid: Bool[Tensor, "B P"]


def _parts(ids: Tensor, valid: Tensor, how: Repeating) -> list[_Part]:
    position, length = valid.cumsum(-1) - 1, valid.sum(-1, keepdim=True)
    columns = _true_first(valid)
    prompt = torch.tensor(how.prompt, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    parts: list[_Part] = []
    for start in range(0, int(length.max()), how.chunk):
        again = torch.arange(max(start - how.tail, 0), min(start + how.chunk, int(length.max())), device=ids.device)
        chunk = valid & (position >= start) & (position < start + how.chunk)
        there = chunk.any(-1, keepdim=True)
        repeated = torch.cat([prompt, ids.gather(1, columns[:, again])], -1)
        real = torch.cat([there.expand_as(prompt), (again < length) & there], -1)
        parts.append(_Part(chunk, chunk | (valid & (position < how.sinks)), repeated, real))
    return parts


def _true_first(mask: Tensor) -> Tensor:
    """Returns the columns of each row, those where the mask is True before the others."""
    return (~mask).to(torch.int8).argsort(dim=-1, stable=True)


class _Text:
    """A context and some parts, side by side: ids int64, valid bool and positions int64 [B, T + sum of P]."""

    def __init__(self, ids: Tensor, valid: Tensor, parts: list[_Part]) -> None:
        self.width, self.parts = ids.shape[1], parts
        self.ids = torch.cat([ids, *(part.ids for part in parts)], -1)
        self.valid = torch.cat([valid, *(part.valid for part in parts)], -1)
        after = [valid.sum(-1, keepdim=True) + part.valid.cumsum(-1) - 1 for part in parts]
        self.positions = torch.cat([valid.cumsum(-1) - 1, *after], -1).clamp_min(0)
        self.ends = torch.tensor([self.width, *(part.ids.shape[1] for part in parts)]).cumsum(0).tolist()

    def trace(self, model: PreTrainedModel) -> Trace:
        """Returns the trace in which tokens of a part are gone where the next one begins."""
        expiry = torch.full((self.ids.shape[1],), NEVER, dtype=torch.int32, device=self.ids.device)
        for start, stop in zip(self.ends[:-2], self.ends[1:-1], strict=True):
            expiry[start:stop] = stop
        return Trace(expiry.expand(full_trace(model, self.ids).expiry.shape), source="repetition")

    def labels(
        self, model: PreTrainedModel, reduce: Reducers, layer: int, received: Received, known: Tensor | None
    ) -> Tensor:
        """Returns labels [B, heads, T] of the context, those of other chunks as `known`."""
        for part, start, stop in zip(self.parts, self.ends[:-1], self.ends[1:], strict=True):
            queries = torch.zeros_like(self.valid)
            queries[:, start:stop] = part.valid
            keys = queries.clone()
            keys[:, : self.width] = part.seen
            # only what takes part: a long context has many chunks
            columns = _true_first(keys)[:, : int(keys.sum(-1).max())]
            here, counted = keys.gather(1, columns), queries.gather(1, columns)
            found = layer_labels(
                model, layer, received.at(columns), block=columns.shape[1], valid=here, reduce=reduce,
                keys=here, queries=counted,
            ).squeeze(-1)  # fmt: skip
            empty = found.new_full((*found.shape[:2], self.ids.shape[1]), reduce.empty)
            placed = empty.scatter(2, columns.unsqueeze(1).expand_as(found), found)[:, :, : self.width]
            known = torch.where(part.chunk.unsqueeze(1), placed, empty[:, :, : self.width] if known is None else known)
        assert known is not None
        return known
