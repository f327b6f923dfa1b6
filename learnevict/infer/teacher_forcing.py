"""Given texts in one pass: read into a cache, or replayed along the trace of an eviction history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from learnevict.errors import TraceError
from learnevict.infer.attach import Attachment
from learnevict.infer.attention import Run, replay_attention, running
from learnevict.infer.cache import EvictingCache
from learnevict.infer.model.supported import evicting_layers
from learnevict.signals import NEVER, Attention, Trace


@dataclass(frozen=True)
class Received:
    """What one layer's attention was given: query [B, Hq, T, d], key [B, H, T, d], value [B, H, T, dv], hidden [B, T, E]."""

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor | None
    attention: Attention

    def at(self, columns: slice | Tensor) -> Received:
        """Returns the same of some columns, those of all rows or int64 [B, n]."""

        def take(values: Tensor, dim: int) -> Tensor:
            values = values.movedim(dim, 1)
            if isinstance(columns, slice):
                return values[:, columns].movedim(1, dim)
            index = columns.view(*columns.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
            return values.gather(1, index).movedim(1, dim)

        heads = [take(part, 2) for part in (self.query, self.key, self.value)]
        hidden = None if self.hidden is None else take(self.hidden, 1)
        return Received(heads[0], heads[1], heads[2], hidden, self.attention)


Observer = Callable[[int, Received], None]
"""Called once per evicting layer of a replayed forward, with the layer's index and what its attention received."""


@dataclass(frozen=True)
class Replay(Run):
    """A forward along a trace: expiry int32 [B, H, T] by layer index (None: nothing is evicted), and bool [B, T] real tokens
    (None: all)."""

    expiry: dict[int, Tensor | None]
    valid: Tensor | None
    observe: Observer | None = None

    def takes(self, layer: int) -> bool:
        return layer in self.expiry

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention
    ) -> Tensor:
        if self.observe is not None:
            self.observe(layer, Received(query, key, value, hidden, attention))
        return replay_attention(query, key, value, self.expiry[layer], self.valid, attention)


def prefill(
    model: PreTrainedModel,
    cache: EvictingCache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    last: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Reads a text into a cache in one forward and returns logits [B, T, V], or [B, last, V].

    Args:
        input_ids: int64 [B, T], what comes next; padded on the left.
        attention_mask: [B, columns read + T], 0 = padding; None if there is none.
        last: columns whose logits are wanted, counted from the end; a vocabulary's width is saved for each of the others.
        **kwargs: handed to the model's forward.
    """
    if attention_mask is not None and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
    if last is not None:
        kwargs["logits_to_keep"] = last
    given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
    return model(past_key_values=cache, **given).logits


def read_once(
    model: PreTrainedModel, cache: EvictingCache, input_ids: Tensor, attention_mask: Tensor, last: int | None = None
) -> Tensor:
    """Reads whole texts, padded on the left, as `prefill` does, into a fresh cache whose conversation does not go on.

    Returns logits of the `last` columns (None: of all), [B, last, V].

    Events of rows that are padded differently fall at different columns, and each would cut all rows. So rows are moved to the
    left by less than a period until events coincide; the cache then knows the columns they were moved to.
    """
    if not cache.clock.deferred:
        return prefill(model, cache, input_ids, attention_mask, last=last)
    length, period = input_ids.shape[1], cache.clock.schedule.period
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    shift = attention_mask.long().argmax(-1, keepdim=True) % period
    source = column + shift
    inside, source = source < length, source.clamp_max(length - 1)
    ids, mask = input_ids.gather(1, source), attention_mask.gather(1, source) * inside
    columns = length if last is None else min(last + period, length)  # rows moved by less than a period
    logits = prefill(model, cache, ids, mask, last=columns)
    back = (column[length - (last or length) :] - shift - (length - columns)).clamp_min(0)
    return logits.gather(1, back.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


def replay(
    model: PreTrainedModel,
    input_ids: Tensor,
    trace: Trace,
    attention_mask: Tensor | None = None,
    *,
    observe: Observer | None = None,
    **kwargs: Any,
) -> Any:
    """Returns what the model would have answered at every position had its cache been evicted as the trace says.

    Args:
        input_ids: int64 [B, T]; attention_mask [B, T], 0 = padding.
        trace: expiry int32 [L, B, H, T]; layers that stay stock are ignored.
        observe: called by every evicting layer with its queries, keys, values and inputs.
        **kwargs: handed to the model's forward.

    Returns:
        The output of one forward without cache; equal to the step-by-step run that recorded the trace.
    """
    text = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=text).layers
    shape = (len(layers), *input_ids.shape)
    found = (trace.expiry.shape[0], trace.expiry.shape[1], trace.expiry.shape[3])
    if found != shape:
        raise TraceError(
            f"the trace covers (layers, rows, tokens) = {found}, but model and input have {shape}; record it on this input"
        )
    expiry, never = trace.expiry.to(input_ids.device), (trace.expiry == NEVER).flatten(1).all(-1).tolist()
    valid = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    if attention_mask is not None and "position_ids" not in kwargs:
        kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    evicted = {index: None if never[index] else expiry[index] for index in evicting_layers(layers)}
    run = Replay(evicted, valid, observe)
    with running(run), Attachment(model, None):
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
