"""What a text's repetition attends to: targets over one set of queries.

`reconstruct` (KVzip, arXiv 2505.23416): the model reads the context, then chunk by chunk a prompt to repeat and the chunk
again. A context token is worth the attention of the part that repeats its chunk, softmax over exactly {sinks, the chunk's keys,
the part's keys}.

    columns    [ context, padded on the left | prompt, chunk 1 | prompt, chunk 2 | ... ]

Every part stands right after the context, by its positions, and sees the context and itself. So all parts are read in one
replayed pass, under a trace that ends each part's tokens where the next part begins. Where some layers stay stock, whose
windows count columns, every part is read in a pass of its own.

Departures from KVzip's code: every row has chunks of its own, so padding changes nothing; the first tokens of a row stand for
its system prompt; a text no longer than a chunk is repeated whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from learnevict.errors import ModelError, UsageError
from learnevict.infer.model.modules import attention_modules
from learnevict.infer.model.supported import evicting_layers
from learnevict.infer.teacher_forcing import Observer, replay
from learnevict.oracle.collect import full_trace
from learnevict.oracle.labels import LayerInputs, future_attention, per_head_output_weight
from learnevict.oracle.reducers import KVZIP, Reducers
from learnevict.signals import NEVER, Attention, Trace


@dataclass(frozen=True)
class Received:
    """What one layer's attention was given: query [B, Hq, T, d], key [B, H, T, d], value [B, H, T, dv], hidden [B, T, E]."""

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor | None
    attention: Attention

    def at(self, columns: Int[Tensor, "B n"]) -> Received:
        """Returns the same of some columns of each row."""
        heads = [_at(part, columns, 2) for part in (self.query, self.key, self.value)]
        hidden = None if self.hidden is None else _at(self.hidden, columns, 1)
        return Received(heads[0], heads[1], heads[2], hidden, self.attention)

    def first(self, num: int) -> Received:
        """Returns the same of the first columns."""
        hidden = None if self.hidden is None else self.hidden[:, :num]
        return Received(self.query[:, :, :num], self.key[:, :, :num], self.value[:, :, :num], hidden, self.attention)


Visitor = Callable[[int, Received, Tensor], None]
"""Called with a layer's index, what its attention was given of the context, and the labels of the context."""


def receiving(see: Callable[[int, Received], None]) -> Observer:
    """Returns an observer of replayed forwards that hands on what each layer receives in one piece."""

    def observe(
        layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention
    ) -> None:
        see(layer, Received(query, key, value, hidden, attention))

    return observe


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
    """Returns how much each context token is needed to repeat its chunk.

    Args:
        model: the base model.
        input_ids: the contexts.
        attention_mask: [B, T], 0 = padding.
        how: chunks and prompt; default Repeating().
        reduce: KVZIP, KVZIP_PLUS or KVZAP (whose values are weighed by |W_O v| / |h|), or a variant of them.
        visit: called once per evicting layer with what its attention received of the context, and the labels.

    Returns:
        per layer [B, heads, T] (None for layers that stay stock); padding holds `reduce.empty`.

    Raises:
        ModelError: contributions are asked for, but a layer's output projection is not found.
        UsageError: reducers over several blocks.
    """
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    kinds = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    labels: list[Tensor | None] = [None] * len(kinds)
    parts = _parts(input_ids, valid, how or Repeating())
    passes = [parts] if len(evicting_layers(kinds)) == len(kinds) else [[part] for part in parts]
    for group in passes:
        text = _Text(input_ids, valid, group)
        last = group is passes[-1]

        def see(layer: int, received: Received, text: _Text = text, last: bool = last) -> None:
            found = labels[layer] = text.labels(model, reduce, layer, received, labels[layer])
            if visit is not None and last:
                visit(layer, received.first(input_ids.shape[1]), found)

        replay(
            model, text.ids, text.trace(model), text.valid.long(), observe=receiving(see),
            position_ids=text.positions, logits_to_keep=1,
        )  # fmt: skip
    return labels


def target_inputs(model: PreTrainedModel, reduce: Reducers, layer: int, received: Received) -> LayerInputs:
    """Returns what `future_attention` must know of a layer beside queries, keys and masks.

    Raises:
        ModelError: contributions are asked for, but the layer's output projection or inputs are not there.
    """
    attention = received.attention
    inputs: LayerInputs = {"scaling": attention.scaling, "softcap": attention.softcap, "sinks": attention.sinks}
    if reduce.value != "contribution":
        return inputs
    weight = getattr(getattr(attention_modules(model)[layer], "o_proj", None), "weight", None)
    if weight is None or received.hidden is None:
        raise ModelError(
            f"layer {layer} of {type(model).__name__} has no `o_proj` with a weight, or hides its inputs, so |W_O v| / |h| is "
            "unknown; use a target without contributions (KVZIP)"
        )
    inputs["value"] = received.value
    inputs["output_weight"] = per_head_output_weight(weight, received.query.shape[1])
    inputs["hidden_norm"] = received.hidden.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return inputs


def _labels(
    model: PreTrainedModel, reduce: Reducers, layer: int, received: Received, support: Tensor, queries: Tensor
) -> Tensor:
    """Returns one label per key, [B, heads, T]; `support`: tokens over which the softmax runs; `queries`: those that count."""
    inputs = target_inputs(model, reduce, layer, received)
    inputs["keys"], inputs["queries"] = support, queries
    query, key = received.query, received.key
    return future_attention(query, key, block=query.shape[2], valid=support, reduce=reduce, **inputs).squeeze(-1)


def _at(values: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Returns columns int64 [B, n] of [B, ..., T, ...], T being dimension `dim`."""
    shape = [1] * values.ndim
    shape[0], shape[dim] = columns.shape
    target = list(values.shape)
    target[dim] = columns.shape[1]
    return values.gather(dim, columns.view(shape).expand(target))


@dataclass(frozen=True)
class _Part:
    """One chunk and its repetition: context columns that are labelled and that are seen, bool [B, T]; what is read again."""

    chunk: Bool[Tensor, "B T"]
    seen: Bool[Tensor, "B T"]
    ids: Int[Tensor, "B P"]
    valid: Bool[Tensor, "B P"]


def _parts(ids: Tensor, valid: Tensor, how: Repeating) -> list[_Part]:
    rank, length = valid.cumsum(-1) - 1, valid.sum(-1, keepdim=True)
    columns = (~valid).to(torch.int8).argsort(dim=-1, stable=True)
    prompt = torch.tensor(how.prompt, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    parts: list[_Part] = []
    for start in range(0, int(length.max()), how.chunk):
        first = max(start - how.tail, 0)
        again = torch.arange(first, min(start + how.chunk, int(length.max())), device=ids.device)
        there = again < length
        chunk = valid & (rank >= start) & (rank < start + how.chunk)
        repeated = torch.cat([prompt, ids.gather(1, columns[:, again])], -1)
        real = torch.cat([chunk.any(-1, keepdim=True).expand_as(prompt), there & chunk.any(-1, keepdim=True)], -1)
        parts.append(_Part(chunk, chunk | (valid & (rank < how.sinks)), repeated, real))
    return parts


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
        full = full_trace(model, self.ids)
        expiry = torch.full((self.ids.shape[1],), NEVER, dtype=torch.int32, device=self.ids.device)
        for start, stop in zip(self.ends[:-2], self.ends[1:-1], strict=True):
            expiry[start:stop] = stop
        return Trace(expiry.expand(full.expiry.shape), source="repetition")

    def labels(
        self, model: PreTrainedModel, reduce: Reducers, layer: int, received: Received, known: Tensor | None
    ) -> Tensor:
        """Returns labels [B, heads, T] of the context, those of other chunks as `known`."""
        for part, start, stop in zip(self.parts, self.ends[:-1], self.ends[1:], strict=True):
            asking = torch.zeros_like(self.valid)
            asking[:, start:stop] = part.valid
            support = asking.clone()
            support[:, : self.width] = part.seen
            # only what takes part: a long context has many chunks
            columns = (~support).to(torch.int8).argsort(dim=-1, stable=True)[:, : int(support.sum(-1).max())]
            here, asked = support.gather(1, columns), asking.gather(1, columns)
            found = _labels(model, reduce, layer, received.at(columns), here, asked)
            empty = found.new_full((*found.shape[:2], self.ids.shape[1]), reduce.empty)
            placed = empty.scatter(2, columns.unsqueeze(1).expand_as(found), found)[:, :, : self.width]
            known = torch.where(part.chunk.unsqueeze(1), placed, empty[:, :, : self.width] if known is None else known)
        assert known is not None
        return known
