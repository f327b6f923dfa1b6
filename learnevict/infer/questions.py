"""What a scorer may ask a cache at an event: tokens of its choice run against the slots and are forgotten, as a probe's are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from learnevict.errors import CacheError, ModelError
from learnevict.infer.cache import EvictingCache
from learnevict.infer.layer import EvictingLayer
from learnevict.infer.probe import States, attend_with_probe, run_tokens
from learnevict.infer.rows.conversation import EMBEDDED, PADDING
from learnevict.infer.store.tiers import Pool
from learnevict.policy.scorer import Receive
from learnevict.signals import Attention, Signals, queries_at_a_time


class Reader:
    """A cache whose layers wait with an event after a forward; see policy.Questions.

    Args:
        cache: what has been read.
        decoder: runs the tokens.
        model: has the head that tells what follows; None, or without one: that cannot be asked.
        hidden: what the decoder returned for the forward that is ending, [B, S, E].
    """

    def __init__(self, cache: EvictingCache, decoder: nn.Module, model: Any, hidden: Tensor) -> None:
        self.cache, self.decoder, self.hidden = cache, decoder, hidden
        self.head = None if model is None else model.get_output_embeddings()
        due = [layer for layer in cache.layers if isinstance(layer, EvictingLayer) and layer.due]
        self.layers: Mapping[int, Signals] = {layer.place.index: layer.due[-1].signals for layer in due}
        crowded = [event.crowded() for layer in due for event in layer.due]
        self.rows = [any(rows) for rows in zip(*crowded, strict=True)]

    @property
    def unasked(self) -> list[range]:
        clock = self.cache.clock
        return [
            range(asked, seen) if due else range(0)
            for due, asked, seen in zip(self.rows, clock.asked, clock.seen, strict=True)
        ]

    def ask(self) -> None:
        """Lets the policy's scorer ask, if something is to be evicted, and writes down what it learns."""
        if not any(self.rows):
            return
        clock = self.cache.clock
        for index, columns in self.cache.policy.scorer.ask(self).items():
            storage = self.cache.layers[index].storage
            for name, fresh in columns.items():
                storage.pool.state.columns[name] = fresh.to(storage.pool.state.columns[name].dtype)
        clock.asked = [seen if due else old for due, old, seen in zip(self.rows, clock.asked, clock.seen, strict=True)]

    def text(self, start: list[int], size: int) -> Tensor:
        """See Questions; raises CacheError where embeddings were read."""
        ids, clock = self.cache.conversation.ids, self.cache.clock
        assert ids is not None
        ids = ids[:, : clock.length + clock.pending]
        wanted = torch.tensor(start).view(-1, 1) + torch.arange(size)
        count = (ids != PADDING).cumsum(-1)
        columns = torch.searchsorted(count, wanted.to(ids.device, non_blocking=True) + 1).clamp_max(ids.shape[1] - 1)
        found = ids.gather(1, columns).long()
        try:
            torch.ops.aten._assert_async.msg((found != EMBEDDED).all(), "a text of embeddings cannot be read again")
        except RuntimeError as error:
            raise CacheError(
                f"{self.cache.policy.name} reads the text again, but part of it came in as inputs_embeds; pass input_ids"
            ) from error
        return found.clamp_min(0)

    def run(self, tokens: Tensor, receive: Receive, visible: Mapping[int, Tensor] | None = None) -> Tensor:
        """See Questions."""

        def answer(layer: int, store: Pool, states: States, attention: Attention) -> Tensor:
            receive(layer, *states[:2])
            return attend_in_parts(store, states, attention, None if visible is None else visible.get(layer))

        hidden = run_tokens(self.decoder, self.cache, answer, input_ids=tokens)
        return self._likeliest(hidden[:, -1]) if self.head is not None else tokens[:, -1]

    def next_tokens(self) -> Tensor:
        """See Questions; raises ModelError for a decoder without a head."""
        if self.head is None:
            raise ModelError(
                f"{self.cache.policy.name} writes a few tokens ahead, but the decoder was attached without its language "
                "modelling head; attach the whole model (AutoModelForCausalLM)"
            )
        now = next(iter(self.layers.values())).rows.now - self.cache.clock.length
        last = now.clamp_min(0).long().view(-1, 1, 1).expand(-1, 1, self.hidden.shape[-1])
        return self._likeliest(self.hidden.gather(1, last.to(self.hidden.device)).squeeze(1))

    def _likeliest(self, hidden: Tensor) -> Tensor:
        """Caps and scales of logits leave their order as it is."""
        assert self.head is not None
        return self.head(hidden).argmax(-1)


def attend_in_parts(store: Pool, states: States, attention: Attention, visible: Tensor | None) -> Tensor:
    """Returns the output of `attend_with_probe`, [B, Hq, P, dv], so few queries at a time that no tensor exceeds the keys."""
    query, key, value = states
    size = queries_at_a_time(store, query)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    for start in range(0, query.shape[2], size):
        stop = min(start + size, query.shape[2])
        some = query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
        out[:, :, start:stop] = attend_with_probe(store, some, attention, visible, start)[0]
    return out
