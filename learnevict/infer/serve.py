"""One forward of a decoder into an EvictingCache: checked, read in pieces where events have to wait, and joined again.

Policies that rank all layers together, or run a probe, decide when all layers have run. A forward that reaches beyond
such an event is cut there, and every piece runs through the decoder by itself; the caller sees one forward.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from learnevict.errors import CacheError, LearnevictWarning, UsageError
from learnevict.infer.attention import RUN, Arguments, Run, running
from learnevict.infer.cache import EvictingCache
from learnevict.infer.clock import Clock
from learnevict.infer.eviction_after_forward import hold_events
from learnevict.infer.layer import EvictingLayer
from learnevict.infer.model.supported import check_text, layout_of
from learnevict.infer.rows.ends import Ends, heard_criteria
from learnevict.infer.store.recording import ordinary_tensors
from learnevict.signals import Attention

OWN_CACHE = ("cache_implementation", "cache_config")
"""Settings of generate() for a cache that it makes itself."""


def checked_generate(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls generate() with a prompt that goes on from what its cache has read, and tells the cache how rows end."""
    if not isinstance(kwargs.get("past_key_values"), EvictingCache):
        return generate(*args, **kwargs)
    given = by_name(inspect.signature(generate), args, kwargs)
    model, mask, talk = (
        getattr(generate, "__self__", None),
        given.get("attention_mask"),
        given["past_key_values"].conversation,
    )
    found = (given.get(name) for name in ("inputs", "input_ids"))
    tokens = next((one for one in found if isinstance(one, Tensor) and not one.is_floating_point()), None)
    states = given.get("inputs_embeds")
    if tokens is not None:
        talk.check_prompt(tokens, mask)
    if isinstance(states, Tensor) and isinstance(model, PreTrainedModel):
        talk.check_embeddings(states, model.get_input_embeddings())
    configs = (given.get("generation_config"), getattr(model, "generation_config", None))
    leave_cache(given, configs)
    ends, criteria = Ends.of_generate(given, *configs), None
    if ends.ends or any(hasattr(one, "eos_token_id") for one in given.get("stopping_criteria") or ()):
        criteria = heard_criteria(given, configs, talk.finished)  # else generate() pads no row, whoever ends it
    if criteria:
        given["stopping_criteria"] = criteria
    width = next((one.shape[1] for one in (mask, tokens, states) if isinstance(one, Tensor)), 0)
    talk.ends, talk.hears, talk.turn_end = (
        ends,
        bool(criteria),
        max(width, talk.clock.length + 1),
    )
    try:
        return generate(**given)
    finally:
        talk.ends, talk.hears, talk.turn_end = None, False, 0


def leave_cache(given: Arguments, configs: tuple[Any, ...]) -> None:
    """Takes back, with a warning, what arguments of generate() or its configs say of a cache that it would make itself."""
    said = {name: next((one for config in configs if (one := getattr(config, name, None))), None) for name in OWN_CACHE}
    asked = {name: value for name in OWN_CACHE if (value := given.get(name, said[name]))}
    if not asked:
        return
    given_up = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    warnings.warn(
        f"{given_up} is not used: generate() was given an EvictingCache; drop it, or set it to None in the model's "
        "generation_config",
        LearnevictWarning,
        stacklevel=3,
    )
    given.update(dict.fromkeys(asked))


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Returns the arguments of a call by their names, those that the function takes as **kwargs among them."""
    given = signature.bind_partial(*args, **kwargs).arguments
    rest = next((name for name, one in signature.parameters.items() if one.kind is one.VAR_KEYWORD), "")
    return {**given.pop(rest, {}), **given}


class Serve(Run):
    """A forward into an EvictingCache; `front` is the module that runs, the decoder or what wraps it."""

    def __init__(self, cache: EvictingCache, front: nn.Module, decoder: nn.Module, model: Any) -> None:
        self.cache, self.front, self.decoder = cache, front, decoder
        self.model = model
        self.read: list[Any] = []
        cache.used = True

    def begin(self, given: Arguments) -> Arguments | None:
        """Reads all pieces of a forward but the last; returns the arguments of that one, if there are several."""
        cache = self.cache
        check_arguments(self.decoder, cache, given)
        source, tokens, mask, places = inputs(given)
        batch, size = source.shape[:2]
        ends = Ends.of(getattr(self.model, "generation_config", None)) if batch > 1 else Ends()
        with ordinary_tensors():
            cache.admit(source, tokens, mask, places, ends)
        last = given
        if cache.clock.deferred and size > 1:
            flags = None if mask is None else mask[:, -size:].bool().tolist()
            *first, last = parts(given, cuts(cache.clock, flags, batch, size), batch, cache.clock.length)
            for part in first:
                self._begin(*inputs(part))
                with running(self):
                    self.read.append(self.front.forward(**part))
                    self._end(self.read[-1])
            source, tokens, mask, places = inputs(last)
        self._begin(source, tokens, mask, places)
        RUN.set(self)
        return last if self.read else None

    def end(self, output: Any) -> Any:
        """Holds the events of a forward that has run; returns what all of its pieces did, if there are several."""
        RUN.set(None)
        if output is None:
            return None
        self._end(output)
        self.cache.conversation.open = 0
        return joined([*self.read, output]) if self.read else None

    def _begin(self, *given: Any) -> None:
        with ordinary_tensors():
            self.cache.begin(*given)

    def _end(self, output: Any) -> None:
        self.cache.check_served()
        with ordinary_tensors():
            hold_events(self.cache, self.decoder, self.model, output[0])
            self.cache.end()

    def takes(self, layer: int) -> bool:
        found = self.cache.layers[layer]
        if isinstance(found, EvictingLayer):
            found.expecting = True
            return True
        return False

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention
    ) -> Tensor:
        held: Any = self.cache.layers[layer]
        if not torch.is_inference_mode_enabled():
            return held.attend(query, key, value, hidden, attention)
        with ordinary_tensors():
            return held.attend(query, key, value, hidden, attention)


def inputs(given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Returns of a decoder's arguments: ids or embeddings, whichever were given; ids; mask; position ids."""
    tokens = given.get("input_ids")
    source = tokens if tokens is not None else given["inputs_embeds"]
    return source, tokens, given.get("attention_mask"), given.get("position_ids")


def check_arguments(decoder: nn.Module, cache: EvictingCache, given: Mapping[str, Any]) -> None:
    """Raises ModelError, UsageError or CacheError for arguments that an EvictingCache cannot answer."""
    check_text(given)
    config: Any = decoder.config
    if cache.text_config is not config and (have := shape_of(cache.text_config)) != (want := shape_of(config)):
        wrong = ", ".join(
            f"{name} {have[name]} (the model has {want[name]})" for name in want if have[name] != want[name]
        )
        raise CacheError(
            f"this cache was made for another model: {wrong}; make one with EvictingCache(model.config, policy)"
        )
    if given.get("use_cache") is False:
        raise UsageError(
            "use_cache=False came with an EvictingCache, so every step would read the whole text into it again; pass "
            "use_cache=True to generate(), or set it in the model's generation_config"
        )
    if given.get("output_attentions") or getattr(config, "output_attentions", False):
        raise UsageError("an EvictingCache returns no attention probabilities; drop output_attentions=True")
    checkpointed = (getattr(module, "gradient_checkpointing", False) for module in decoder.modules())
    if decoder.training and any(checkpointed):
        raise UsageError(
            "gradient checkpointing is on and the model is in train(), and transformers then withholds the cache from its "
            "layers; call model.eval() before reading into an EvictingCache"
        )
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise CacheError(
            "an EvictingCache needs a 2D attention mask [batch, tokens]; 4D and per-type masks are not supported"
        )


def shape_of(config: Any) -> dict[str, Any]:
    """Returns what a cache of a model depends on."""
    layout = asdict(layout_of(config))
    del layout["vocab_size"]
    return {**layout, "layer_types": getattr(config, "layer_types", None)}


def cuts(clock: Clock, flags: list[list[bool]] | None, batch: int, size: int) -> list[int]:
    """Returns the columns after which pieces of a forward must end, the last included; `flags`: real tokens, None: all."""
    stops = {size}
    for row in range(batch):
        columns = range(size) if flags is None else [column for column, real in enumerate(flags[row]) if real]
        before = clock.seen[row] if clock.seen else 0
        event = clock.next_event(row, before)
        while event - before <= len(columns):
            stops.add(columns[event - before - 1] + 1)
            event = clock.next_event(row, event)
    return sorted(stops)


def parts(given: Arguments, stops: list[int], batch: int, length: int) -> Iterator[Arguments]:
    """Yields the arguments of a decoder's forward behind `length` columns, cut along its tokens where pieces end (`stops`)."""
    size = stops[-1]

    def cut(name: str, value: Any, start: int, stop: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name == "attention_mask":  # of these columns, or of all that were read as well
            return value[:, : length + stop] if value.shape[1] == length + size else value[:, start:stop]
        if name in ("position_ids", "cache_position"):  # [tokens], [batch, tokens], or [kinds, batch, tokens]
            return value[..., start:stop]
        return value[:, start:stop] if value.shape[:2] == (batch, size) else value

    if len(stops) == 1:
        yield given
        return
    for start, stop in zip([0, *stops], stops, strict=False):
        yield {name: cut(name, value, start, stop) for name, value in given.items()}


def joined(outputs: list[Any]) -> Any:
    """Returns what one forward would have returned, from what its pieces did."""
    if isinstance(outputs[-1], ModelOutput):
        names = outputs[-1].keys()
        return type(outputs[-1])(**{name: _joined(name, [out[name] for out in outputs]) for name in names})
    return tuple(_joined(f"value {index}", list(found)) for index, found in enumerate(zip(*outputs, strict=True)))


def _joined(name: str, found: list[Any]) -> Any:
    if found[-1] is None or isinstance(found[-1], EvictingCache):
        return found[-1]
    if isinstance(found[-1], tuple):
        return tuple(_joined(name, list(layer)) for layer in zip(*found, strict=True))
    if isinstance(found[-1], Tensor) and found[-1].ndim == 3:  # [batch, tokens, E]
        return torch.cat(found, 1)
    raise UsageError(
        f"this forward is read in pieces, because its policy decides when all layers have run, and {name} cannot be joined; "
        "do not ask for it"
    )
