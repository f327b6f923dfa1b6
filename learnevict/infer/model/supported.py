"""What can be served: kinds of cache layers, rotary embeddings, and texts."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer

from learnevict.errors import ModelError

STOCK_KINDS = {"DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer"}


def evicting_layers(stock: list) -> list[int]:
    """Indices of the layers that a policy may govern: full attention. Sliding-window and linear layers stay stock.

    Raises:
        ModelError: another kind, such as layers that share keys with another layer or index them.
    """
    unknown = {type(layer).__name__ for layer in stock} - STOCK_KINDS
    if unknown:
        raise ModelError(
            f"this model has cache layers of kind {sorted(unknown)}, which learnevict does not serve (full, sliding-window and "
            "linear attention only); use the model's stock cache"
        )
    return [index for index, layer in enumerate(stock) if type(layer) is DynamicLayer]


def state_shape(text: Any, layer: int | None = None) -> tuple[int, int]:
    """Key-value heads and head size of one layer, by default the first with full attention (Gemma 4: wider than the rest).

    Args:
        text: configuration of the text's decoder.
        layer: its index.
    """
    if layer is None:
        kinds = getattr(text, "layer_types", None) or []
        layer = kinds.index("full_attention") if "full_attention" in kinds else 0
    views = getattr(text, "per_layer_config", None)
    own = text if views is None else views[layer]
    heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
    return heads, getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads


def check_text(given: dict[str, Any]) -> None:
    """Refuse what a multimodal model reads beside text: tokens of one image attend to each other in both directions.

    Args:
        given: arguments of a forward.

    Raises:
        ModelError: pixels, sounds, or what encoders made of them.
    """
    kinds = ("pixel_values", "image", "video", "audio", "input_features")
    said = {
        **given,
        **(given.get("mm_encoder_outputs") or {}),
        "mm_encoder_outputs": None,
    }  # generate() gives it, empty
    if found := sorted(name for name, value in said.items() if value is not None and name.startswith(kinds)):
        raise ModelError(
            f"an EvictingCache serves the text of multimodal models only, and {', '.join(found)} came in; use the model's "
            "stock cache for images and sounds"
        )


def check_rope(config: Any) -> None:
    """Refuse models that throw their cache away in the middle of a text.

    Raises:
        ModelError: longrope with two sets of factors, as in Phi-3-128k.
    """
    limit = getattr(config, "original_max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit is not None and rope.get("rope_type") == "longrope":
        raise ModelError(
            f"this model changes its rotary embedding after {limit} tokens (longrope), and generate() then drops the cache; an "
            "evicted text cannot be read again: use a model without longrope, or its stock cache"
        )
