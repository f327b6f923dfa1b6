"""Hooks that let a model read and write an EvictingCache; everything is undone on exit.

They are: an attention and a mask function registered with transformers under the name "learnevict", hooks that open and close
each forward and hand attention modules to the active run, and a generate() of this model that looks at the prompt first.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from learnevict.errors import CacheError, UnusedCacheWarning, UsageError
from learnevict.infer.attention import RUN, Step, plain_attention, running
from learnevict.infer.cache import EvictingCache
from learnevict.infer.model.modules import (
    Rotation,
    attention_modules,
    attention_settings,
    decoder_of,
    front_of,
    rotation_of,
)
from learnevict.infer.model.supported import check_allocation, check_base, device_for, evicting_layers
from learnevict.infer.serve import Serve, by_name, checked_generate
from learnevict.infer.soft import Soft, soft_gate
from learnevict.ops import KernelChoice
from learnevict.policy import AnyPolicy, governor
from learnevict.signals import Attention

NAME = "learnevict"


@dataclass
class Hooks:
    """The hooks of one model, shared by nested attachments and removed with the last; what they replaced."""

    handles: list[Any]
    previous: Any
    generate: Any
    count: int = 1


_lock = threading.Lock()
_hooked: weakref.WeakKeyDictionary[PreTrainedModel, Hooks] = weakref.WeakKeyDictionary()


class Attachment:
    """Keeps a model's hooks alive; a context manager that yields its cache, or the Soft that weighs forwards inside."""

    def __init__(self, model: PreTrainedModel, cache: EvictingCache | None, soft: Soft | None = None) -> None:
        self.model, self.cache, self.soft = model, cache, soft
        self.entered: list[AbstractContextManager[None]] = []
        hook(model)
        self.active = True

    def detach(self) -> None:
        """Takes the hooks off; warns if the cache has read nothing."""
        if not self.active:
            return
        self.active = False
        unhook(self.model)
        if self.cache is not None and not self.cache.used:
            text = "the cache of attach(model, policy) has read nothing, so nothing was evicted: pass past_key_values=cache"
            warnings.warn(f"{text} to the model or its generate()", UnusedCacheWarning, stacklevel=3)

    def __enter__(self) -> Any:
        if self.soft is None:
            return self.cache
        self.entered.append(running(self.soft))
        self.entered[-1].__enter__()
        return self.soft

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.entered:
            self.entered.pop().__exit__(None, None, None)
        if kind is not None and self.cache is not None:
            self.cache.used = True  # or would have been, but for the error
        self.detach()


def attach(
    model: PreTrainedModel,
    policy: AnyPolicy | None = None,
    *,
    record: bool = False,
    prompt_length: list[int] | None = None,
    soft: bool = False,
    kernels: KernelChoice | None = None,
) -> Attachment:
    """Lets `model`, any that dispatches through transformers' attention interface, use evicting caches.

    Args:
        policy: governs the cache that `with attach(model, policy) as cache:` yields. Without one only hooks are set, and
            `EvictingCache(model.config, policy)` makes caches.
        record, prompt_length: see EvictingCache.
        soft: the policy's gate weighs attention instead of evicting, as soft gates are trained: inside `with`, call the model
            on whole texts without a cache. Yields a learnevict.infer.soft.Soft, whose `state` is what the gate wrote.
        kernels: decode by Triton kernels: "on", "off", or "auto" (on CUDA devices where Triton is installed); None: what
            learnevict.ops.using_kernels says, by default "auto". A KernelUnusedWarning tells which layers they cannot serve.

    Returns:
        A context manager; `detach()` ends it outside `with`.

    Raises:
        UsageError: soft without a policy whose scorer is a SoftGate, or with options of a cache.
        ModelError: the model does not dispatch attention through transformers' interface, or kernels="on" where none can run.
        BudgetError: the policy's budget does not fit this model.
        GateError: the policy's gates were trained for another model.
    """
    if soft and (policy is None or record or prompt_length is not None):
        raise UsageError("attach(soft=True) takes a model and a policy; record and prompt_length belong to a cache")
    cache = None
    if policy is not None:
        policy = governor(policy)
        if policy.base is not None:
            check_base(policy.base, model)
        check_allocation(policy.allocator, model)
        policy.scorer.to(device_for(policy.scorer, model))
        if soft:
            stock = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
            return Attachment(model, None, Soft(soft_gate(policy.scorer), frozenset(evicting_layers(stock))))
        cache = EvictingCache(model.config, policy, record=record, prompt_length=prompt_length, kernels=kernels)
        cache.kernels.check({parameter.device for parameter in model.parameters()})
    return Attachment(model, cache)


def hook(model: PreTrainedModel) -> None:
    """Sets the hooks, or counts one more user of those that are there."""
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
            front.register_forward_hook(_close_forward, with_kwargs=True, always_call=True),
            *(
                module.register_forward_pre_hook(partial(_hand_over, rotation_of(decoder, module)), with_kwargs=True)
                for module in modules.values()
            ),
        ]
        _hooked[model] = Hooks(handles, previous, vars(model).get("generate"))
        if callable(generate := getattr(model, "generate", None)):
            vars(model)["generate"] = update_wrapper(partial(checked_generate, generate), generate)


def unhook(model: PreTrainedModel) -> None:
    """Counts one user fewer; the last one removes the hooks."""
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
    signature: inspect.Signature, decoder: Any, model: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    given = by_name(signature, args, kwargs) if args else kwargs
    if isinstance(RUN.get(), Serve):  # left by a forward that was interrupted
        RUN.set(None)
    cache = next((value for value in given.values() if isinstance(value, EvictingCache)), None)
    run = RUN.get()
    if run is None and cache is not None:
        run = Serve(cache, module, decoder, model())
    if run is None:
        return None
    if (found := decoder.config._attn_implementation) != NAME:
        raise UsageError(
            f"set_attn_implementation({found!r}) was called after attach(), which took learnevict's attention away; call it "
            "before attach(), or not at all"
        )
    changed = run.begin(given)
    return None if changed is None else ((), changed)


def _close_forward(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    run = RUN.get()
    return None if run is None else run.end(output)


def _hand_over(rotation: Rotation | None, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    run = RUN.get()
    if run is None or not run.takes(module.layer_idx):  # pyright: ignore[reportArgumentType]
        return None
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    frequencies = None if rotation is None else rotation.frequencies(kwargs)
    return args, {**kwargs, NAME: Step(run, hidden, frequencies)}


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
    """Returns attention [B, S, Hq, dv], and no probabilities; registered with transformers."""
    if kwargs.get("cache") is not None:
        raise CacheError(
            "continuous batching (PagedAttentionCache) shares blocks between heads, so heads cannot evict apart"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if learnevict is None:
        out = plain_attention(query, key, value, attention_mask, Attention(scale, softcap, s_aux))
    else:
        attention = Attention(scale, softcap, s_aux, learnevict.frequencies, kwargs.get("sliding_window"))
        index: Any = module.layer_idx
        out = learnevict.run.attend(index, query, key, value, learnevict.hidden, attention)
    return out.transpose(1, 2).contiguous(), None


def mask_function(*args: Any, **kwargs: Any) -> Tensor | None:
    """Masks for stock layers; none for layers whose visibility comes from slot positions or a trace."""
    run = RUN.get()
    if run is not None and run.masks(kwargs.get("local_size")):
        return None
    return eager_mask(*args, **kwargs)
