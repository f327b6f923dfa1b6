"""Reading texts for policies whose events wait for the end of a forward: forwards are cut where events fall."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from learnevict.infer.cache import EvictingCache
from learnevict.infer.clock import Clock


def prefill(
    model: PreTrainedModel,
    cache: EvictingCache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    last_only: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Read a text into a cache in as many forwards as its policy needs: one, unless events wait for a forward's end.

    Forwards are then cut at the next events of all rows. A text read by a fresh cache counts as the prompt, unless the
    cache was given prompt_length.

    Args:
        model: attached.
        cache: where the conversation stands.
        input_ids: int64 [B, T], what comes next; padded on the left.
        attention_mask: [B, columns read + T], 0 = padding; None if there is none.
        last_only: logits of the last column only, which saves T - 1 times the vocabulary.
        **kwargs: handed to every forward of the model; `position_ids` [B, T] are cut like the text.

    Returns:
        Logits [B, T, V], or [B, 1, V].

    Raises:
        CacheError: the mask does not fit, or the batch is another one; see EvictingCache.begin.
    """
    start, (batch, size) = cache.get_seq_length(), input_ids.shape
    places = kwargs.pop("position_ids", None)
    if places is None and attention_mask is not None:
        places = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -size:]
    flags = None if attention_mask is None else attention_mask[:, -size:].bool().tolist()
    stops = cuts(cache.clock, flags, batch, size)
    if len(stops) > 1 and not start and cache.clock.prompt_length is None:
        cache.clock.prompt_length = [size] * batch if flags is None else [sum(row) for row in flags]
    logits: list[Tensor] = []
    for before, stop in zip([0, *stops], stops, strict=False):
        part = {"position_ids": places[:, before:stop]} if places is not None else {}
        keep = {"logits_to_keep": 1} if last_only else {}
        mask = None if attention_mask is None else attention_mask[:, : start + stop]
        model_input = {"input_ids": input_ids[:, before:stop], "attention_mask": mask, **part, **keep, **kwargs}
        out: Any = model(past_key_values=cache, **model_input)
        logits = [out.logits] if last_only else [*logits, out.logits]
    return torch.cat(logits, 1)


def read_once(model: PreTrainedModel, cache: EvictingCache, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """As `prefill`, for whole texts after which the conversation does not go on: logits [B, T, V].

    Events of rows that are padded differently fall at different columns, and each would cut all rows. So rows are moved to
    the left by less than a period until events coincide; the cache then knows the columns they were moved to.

    Args:
        cache: fresh.
        input_ids: int64 [B, T], padded on the left; attention_mask [B, T], 0 = padding.
    """
    if not cache.clock.deferred:
        return prefill(model, cache, input_ids, attention_mask)
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    shift = attention_mask.long().argmax(-1, keepdim=True) % cache.clock.schedule.period
    source = column + shift
    inside, source = source < len(column), source.clamp_max(len(column) - 1)
    ids, mask = input_ids.gather(1, source), attention_mask.gather(1, source) * inside
    logits = prefill(model, cache, ids, mask)
    back = (column - shift).clamp_min(0)
    return logits.gather(1, back.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


def cuts(clock: Clock, flags: list[list[bool]] | None, batch: int, size: int) -> list[int]:
    """Columns after which forwards over `size` columns must end, ascending, the last one included.

    Args:
        clock: of the cache that will read them.
        flags: real tokens of every row; None if all are.
    """
    stops = {size}
    for row in range(batch if clock.deferred else 0):
        columns = range(size) if flags is None else [column for column, real in enumerate(flags[row]) if real]
        before = clock.seen[row] if clock.seen else 0
        event = clock.next_event(row, before)
        while event - before <= len(columns):
            stops.add(columns[event - before - 1] + 1)
            event = clock.next_event(row, event)
    return sorted(stops)


@torch.no_grad()
def read_ahead(model: PreTrainedModel, cache: Cache, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Before `model.generate`: read what of a prompt may not be read in one forward, all but its last token."""
    if isinstance(cache, EvictingCache) and cache.clock.deferred and input_ids.shape[1] > 1:
        prefill(model, cache, input_ids[:, :-1], attention_mask[:, :-1], last_only=True)
