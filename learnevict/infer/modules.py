"""Finding the parts of a model that hooks go to: its decoder, its attention modules, its rotary embedding."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from learnevict.errors import ModelError


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The model's self-attention modules by layer index.

    Raises:
        ModelError: none can be found, or the model does not support attention backends.
    """
    found: dict[int, nn.Module] = {}
    for module in decoder_of(model).modules():
        index = getattr(module, "layer_idx", None)
        dispatches = "ALL_ATTENTION_FUNCTIONS" in modelling_names(module)
        if type(module).__name__.endswith("Attention") and isinstance(index, int) and dispatches:
            found[index] = module
    if not found:
        raise ModelError(
            f"{type(model).__name__} does not dispatch attention through transformers' AttentionInterface, so learnevict "
            "cannot serve it; Llama, Qwen2, Qwen3, Mistral, Gemma2, Gemma3, Phi3 and GPT-OSS are tested"
        )
    return found


def modelling_names(module: nn.Module) -> dict[str, Any]:
    """Names of the modelling file that a module's class, or the one it derives from, is written in."""
    files = [vars(sys.modules[kind.__module__]) for kind in type(module).__mro__]
    return next((names for names in files if "ALL_ATTENTION_FUNCTIONS" in names), {})


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module whose forward receives the 2D attention mask."""
    decoder = model.get_decoder()
    return model if decoder is None else decoder


def rotary_of(decoder: nn.Module, module: nn.Module) -> tuple[nn.Module, str] | None:
    """The decoder's rotary embedding and its buffer of frequencies, if `module` rotates halves of the head dimension.

    None if it rotates neighbouring dimensions or nothing. The buffer is named, not held: dynamic RoPE replaces it.
    """
    names = modelling_names(module)
    if "rotate_half" in names:
        halves = names["rotate_half"](torch.arange(4)).tolist() == [-2, -3, 0, 1]
    else:
        halves = "_apply_rotary_emb" in names  # GPT-OSS
    rotary = getattr(decoder, "rotary_emb", None) if halves else None
    own = f"{getattr(module, 'layer_type', None)}_inv_freq"  # Gemma3: one per kind of layer
    name = next((name for name in (own, "inv_freq") if hasattr(rotary, name)), None)
    return None if rotary is None or name is None else (rotary, name)
