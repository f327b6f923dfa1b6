"""What can be served, and for which model a gate was made: cache layers, rotary embeddings, shape and weights."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from learnevict.config import Base, Layout
from learnevict.errors import GateError, LearnevictWarning, ModelError
from learnevict.infer.model.modules import attention_modules, device_of
from learnevict.policy import Allocator, Scorer

STOCK_KINDS = {"DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer"}


def evicting_layers(stock: list) -> list[int]:
    """Indices of the layers that a policy may govern: full attention. Sliding-window and linear layers stay stock."""
    unknown = {type(layer).__name__ for layer in stock} - STOCK_KINDS
    if unknown:
        raise ModelError(
            f"this model has cache layers of kind {sorted(unknown)}, which learnevict does not serve (full, sliding-window and "
            "linear attention only); use the model's stock cache"
        )
    return [index for index, layer in enumerate(stock) if type(layer) is DynamicLayer]


def state_shape(text: Any, layer: int | None = None) -> tuple[int, int]:
    """Returns key-value heads and head size of one layer, by default the first with full attention (Gemma 4: wider)."""
    if layer is None:
        kinds = getattr(text, "layer_types", None) or []
        layer = kinds.index("full_attention") if "full_attention" in kinds else 0
    views = getattr(text, "per_layer_config", None)
    own = text if views is None else views[layer]
    heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
    return heads, getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads


def check_text(given: Mapping[str, Any]) -> None:
    """Raises ModelError for what a multimodal model reads beside text: tokens of an image attend to each other both ways."""
    kinds = ("pixel_values", "image", "video", "audio", "input_features")
    said = [given, given.get("mm_encoder_outputs") or {}]  # generate() gives it, empty
    if found := sorted(
        name for part in said for name, value in part.items() if value is not None and name.startswith(kinds)
    ):
        raise ModelError(
            f"an EvictingCache serves the text of multimodal models only, and {', '.join(found)} came in; use the model's "
            "stock cache for images and sounds"
        )


def check_rope(config: Any) -> None:
    """Raises ModelError for models that throw their cache away in the middle of a text: longrope, as in Phi-3-128k."""
    limit = getattr(config, "original_max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit is not None and rope.get("rope_type") == "longrope":
        raise ModelError(
            f"this model changes its rotary embedding after {limit} tokens (longrope), and generate() then drops the cache; an "
            "evicted text cannot be read again: use a model without longrope, or its stock cache"
        )


def check_base(base: Base, model: PreTrainedModel) -> None:
    """Raises GateError if a gate was trained for a model of other shape, or (unless allowed) of other weights."""
    have, want = asdict(base.layout), asdict(layout_of(model.config))
    wrong = [f"{key} {have[key]} (the model has {want[key]})" for key in want if have[key] != want[key]]
    if wrong:
        raise GateError(f"these gates were made for another model: {', '.join(wrong)}; train gates for this one")
    if base.weights and not base.allow_other and base.weights != weight_hash(model):
        raise GateError(
            f"these gates were trained on other weights of the same shape ({base.name}); pass --allow-other-base "
            "(allow_other_base=True) if that is intended"
        )


def check_allocation(allocator: Allocator, model: PreTrainedModel) -> None:
    """Warns if the shares of layers and heads were measured on other weights; of another shape the shares refuse themselves."""
    if (weights := allocator.made.get("weights")) and weights != weight_hash(model):
        warnings.warn(
            f"this allocation was measured on other weights ({allocator.made.get('model', 'it does not say which')}), which "
            "may need their slots elsewhere; measure it on this model: learnevict profile",
            LearnevictWarning,
            stacklevel=3,
        )


def layout_of(config: PreTrainedConfig) -> Layout:
    """Returns the cache shape of a model, from its config."""
    text = config.get_text_config(decoder=True)
    heads, width = state_shape(text)
    return Layout(
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_query_heads=text.num_attention_heads,
        head_dim=width,
        value_dim=width,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
    )


def device_for(scorer: Scorer, model: PreTrainedModel) -> torch.device:
    """Returns where the parameters of a scorer belong: where the model's attention computes."""
    devices = sorted({str(device_of(module)) for module in attention_modules(model).values()})
    if len(devices) > 1 and type(scorer).to is not Scorer.to:
        raise GateError(
            f"the layers of this model compute on {' and '.join(devices)}, and gates rank all of them on one device; load the "
            "model on one, offload what does not fit (accelerate.cpu_offload), or use a method without gates"
        )
    return torch.device(devices[0])


def weight_hash(model: PreTrainedModel) -> str:
    """Returns a fingerprint of weights: sha256 over names, shapes and up to 256 evenly spaced values of every tensor.

    Values are taken in bfloat16, so that a model loaded in another precision keeps its fingerprint. Offloaded weights are
    brought in module by module.
    """
    digest, samples = hashlib.sha256(), []
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        samples.append(_sample(model, name, tensor))
    values = torch.cat(samples) if samples else torch.empty(0, dtype=torch.bfloat16)
    digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _sample(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Returns up to 256 evenly spaced values of a tensor of the state dict, bfloat16 [n] on the CPU."""
    if tensor.is_meta:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module):
            found = getattr(module, leaf)
            if found.is_meta:
                raise GateError(
                    f"the weights of this model have not been loaded ({name} is a meta tensor); load it with from_pretrained"
                )
            return _sample(model, name, found)
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // 256)][:256].to(torch.bfloat16).cpu()
