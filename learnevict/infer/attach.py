"""Hooks that let a model read and write an EvictingCache; everything is undone on exit.

Four pieces, none of them on the model's classes: an attention function and a mask function registered with transformers
under the name "learnevict", hooks on the decoder that open and close each forward (infer.forward), a hook on every attention
module that hands it its cache layer (or, in a replay, its expiries), and a generate() of this one model that looks at the
prompt first.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from learnevict.errors import CacheError, UnusedCacheWarning, UsageError
from learnevict.infer import forward
from learnevict.infer.attention import plain_attention, replay_attention
from learnevict.infer.cache import EvictingCache
from learnevict.infer.layer import EvictingLayer
from learnevict.infer.model.fingerprint import check_base, device_for
from learnevict.infer.model.modules import (
    Rotation,
    attention_modules,
    attention_settings,
    decoder_of,
    front_of,
    rotation_of,
)
from learnevict.infer.model.supported import check_governor, evicting_layers
from learnevict.infer.probe import QUESTION, Question
from learnevict.infer.soft import SOFT, Soft, soft_gate
from learnevict.infer.store.recording import ordinary_tensors
from learnevict.policy import Governor
from learnevict.signals import Attention

NAME = "learnevict"


class Observer(Protocol):
    """Called once per evicting layer of a replayed forward, with what its attention function received."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention
    ) -> None: ...


@dataclass(frozen=True)
class Replay:
    """What a replayed forward sees: expiry int32 [B, H, T] by layer index, and bool [B, T] real tokens (None: all)."""

    expiry: dict[int, Tensor]
    valid: Tensor | None
    observe: Observer | None = None


@dataclass(frozen=True)
class Step:
    """What one attention module is given for one forward."""

    layer: EvictingLayer | None
    hidden: Tensor | None
    expiry: Tensor | None = None
    valid: Tensor | None = None
    observe: Observer | None = None
    frequencies: Tensor | None = None
    soft: Soft | None = None
    question: Question | None = None


@dataclass
class Hooks:
    """The hooks of one model, shared by nested attachments and removed with the last; what they replaced."""

    handles: list[Any]
    previous: Any
    generate: Any
    count: int = 1


REPLAY: ContextVar[Replay | None] = ContextVar("learnevict_replay", default=None)
_lock = threading.Lock()
_hooked: weakref.WeakKeyDictionary[PreTrainedModel, Hooks] = weakref.WeakKeyDictionary()


class Attachment:
    """Keeps a model's hooks alive; a context manager that yields its cache, or how it is softened.

    Args:
        model: the model.
        cache: yielded on entry; None if only hooks were asked for.
        soft: yielded instead; inside, forwards without cache are weighed by its gate.
    """

    def __init__(self, model: PreTrainedModel, cache: EvictingCache | None, soft: Soft | None = None) -> None:
        self.model, self.cache, self.soft = model, cache, soft
        self.tokens: list[Token[Soft | None]] = []
        hook(model)
        self.active = True

    def detach(self) -> None:
        """Remove the hooks, unless another attachment still needs them."""
        if self.active:
            self.active = False
            unhook(self.model)

    def __enter__(self) -> Any:
        if self.soft is None:
            return self.cache
        self.tokens.append(SOFT.set(self.soft))
        return self.soft

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.tokens:
            SOFT.reset(self.tokens.pop())
        self.detach()
        if kind is None and self.cache is not None and not self.cache.used:
            text = "the cache of attach(model, policy) has read nothing, so nothing was evicted: pass past_key_values=cache"
            warnings.warn(f"{text} to the model or its generate()", UnusedCacheWarning, stacklevel=2)


def attach(
    model: PreTrainedModel,
    policy: Governor | None = None,
    *,
    record: bool = False,
    prompt_length: list[int] | None = None,
    soft: bool = False,
) -> Attachment:
    """Let `model` use evicting caches.

    Args:
        model: any causal language model of transformers that dispatches through its attention interface.
        policy: governs the cache that `with attach(model, policy) as cache:` yields. Without one only hooks are set, and
            `EvictingCache(model.config, policy)` makes caches.
        record: the cache keeps its expiry trace.
        prompt_length: see EvictingCache.
        soft: the policy's gate weighs attention instead of evicting, as soft gates are trained: inside `with`, call the model
            on whole texts without a cache. Yields a learnevict.infer.soft.Soft, whose `notes` are the gate's.

    Returns:
        An Attachment: a context manager yielding the cache; `detach()` ends it outside `with`.

    Raises:
        UsageError: soft without a policy whose scorer is a SoftGate, or with options of a cache.
        ModelError: the model does not dispatch attention through transformers' interface.
        BudgetError: the policy's budget does not fit this model.
        GateError: the policy's gates were trained for another model.
    """
    if soft and (policy is None or record or prompt_length is not None):
        raise UsageError("attach(soft=True) takes a model and a policy; record and prompt_length belong to a cache")
    cache = None
    if policy is not None:
        check_governor(policy)
        if (base := getattr(policy, "base", None)) is not None:
            check_base(base, model)
        policy.scorer.to(device_for(policy.scorer, model))
        if soft:
            stock = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
            return Attachment(model, None, Soft(soft_gate(policy.scorer), frozenset(evicting_layers(stock))))
        cache = EvictingCache(model.config, policy, record=record, prompt_length=prompt_length)
    return Attachment(model, cache)


def hook(model: PreTrainedModel) -> None:
    """Set the hooks, or count one more user of those that are there."""
    with _lock:
        if model in _hooked:
            _hooked[model].count += 1
            return
        AttentionInterface.register(NAME, attention_function)
        AttentionMaskInterface.register(NAME, mask_function)
        modules, decoder, front = attention_modules(model), decoder_of(model), front_of(model)
        previous = attention_settings(model.config)
        model.set_attn_implementation(NAME)
        opening = partial(_open_forward, inspect.signature(front.forward), decoder, weakref.ref(model))
        handles = [
            front.register_forward_pre_hook(opening, with_kwargs=True),
            front.register_forward_hook(partial(forward.close_forward, decoder), with_kwargs=True, always_call=True),
            *(
                module.register_forward_pre_hook(partial(_hand_over, rotation_of(decoder, module)), with_kwargs=True)
                for module in modules.values()
            ),
        ]
        _hooked[model] = Hooks(handles, previous, vars(model).get("generate"))
        if callable(generate := getattr(model, "generate", None)):
            vars(model)["generate"] = update_wrapper(partial(forward.checked_generate, generate), generate)


def unhook(model: PreTrainedModel) -> None:
    """One user fewer; the last one removes the hooks."""
    with _lock:
        hooks = _hooked[model]
        hooks.count -= 1
        if hooks.count:
            return
        for handle in hooks.handles:
            handle.remove()
        if model.config._attn_implementation == NAME:  # else it was set while attached
            model.set_attn_implementation(hooks.previous)
        vars(model).pop("generate", None)
        if hooks.generate is not None:
            vars(model)["generate"] = hooks.generate
        del _hooked[model]


def _open_forward(
    signature: inspect.Signature, decoder: nn.Module, model: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    given = signature.bind_partial(*args, **kwargs).arguments
    given = {**given.pop("kwargs", {}), **given}
    cache = forward.cache_among(given, model())
    if cache is not None or any(one.get() is not None for one in (SOFT, REPLAY, QUESTION)):
        forward.check_attention(decoder, NAME)
    if (soft := SOFT.get()) is not None and REPLAY.get() is None:
        soft.begin(given)
    last = None if cache is None else forward.open_forward(module, decoder, cache, given)
    return None if last is None else ((), last)


def _hand_over(rotation: Rotation | None, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    cache, replay = forward.SERVING.get(), REPLAY.get()
    index: Any = module.layer_idx
    frequencies = None if rotation is None else rotation.frequencies(kwargs)
    if (question := QUESTION.get()) is not None:
        return args, {**kwargs, NAME: Step(None, hidden, frequencies=frequencies, question=question)}
    if replay is not None and index in replay.expiry:
        return args, {
            **kwargs,
            NAME: Step(None, hidden, replay.expiry[index], replay.valid, replay.observe, frequencies),
        }
    if (soft := SOFT.get()) is not None and replay is None and index in soft.layers:
        return args, {**kwargs, NAME: Step(None, hidden, frequencies=frequencies, soft=soft)}
    if cache is not None and isinstance(layer := cache.layers[index], EvictingLayer):
        layer.expecting = True
        return args, {**kwargs, NAME: Step(layer, hidden, frequencies=frequencies)}
    return None


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    learnevict: Step | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers: event loop, replay, or plain attention for stock layers.

    Args:
        query: [B, Hq, S, d]; key [B, H, N, d]; value [B, H, N, dv]; post-RoPE.
        attention_mask: from `mask_function`.

    Returns:
        [B, S, Hq, dv] and None (probabilities are not returned).
    """
    if kwargs.get("cache") is not None:
        raise CacheError(
            "continuous batching (PagedAttentionCache) shares blocks between heads, so heads cannot evict apart"
        )
    frequencies = None if learnevict is None else learnevict.frequencies
    attention = Attention(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux, frequencies)
    if learnevict is None:
        out = plain_attention(query, key, value, attention_mask, attention)
    elif learnevict.question is not None:
        index: Any = module.layer_idx
        out = learnevict.question.attend(index, (query, key, value), attention, kwargs.get("sliding_window"))
    elif learnevict.layer is not None:
        with ordinary_tensors():
            out = learnevict.layer.attend(query, key, value, learnevict.hidden, attention)
    elif learnevict.soft is not None:
        out = learnevict.soft.attend(module.layer_idx, query, key, value, learnevict.hidden, attention)  # pyright: ignore[reportArgumentType]
    else:
        assert learnevict.expiry is not None
        if learnevict.observe is not None:
            learnevict.observe(module.layer_idx, query, key, value, learnevict.hidden, attention)  # pyright: ignore[reportArgumentType]
        out = replay_attention(query, key, value, learnevict.expiry, learnevict.valid, attention)
    return out.transpose(1, 2).contiguous(), None


def mask_function(*args: Any, **kwargs: Any) -> Tensor | None:
    """Masks for stock layers; none for layers whose visibility comes from slot positions or a trace."""
    decided = forward.SERVING.get() is not None or REPLAY.get() is not None or SOFT.get() is not None
    if QUESTION.get() is not None or (decided and kwargs.get("local_size") is None):
        return None
    return eager_mask(*args, **kwargs)
