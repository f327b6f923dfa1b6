"""Rotary embeddings undone or moved on: a position turns dimensions f and f + r of a query or key, a pair (x, y)."""

from __future__ import annotations

from torch import Tensor

from learnevict.errors import ModelError
from learnevict.signals import Signals


def frequencies_of(signals: Signals, method: str) -> Tensor:
    """Returns the radians per position of each pair, float32 [r].

    Raises:
        ModelError: the model's rotary embedding is not known.
    """
    if signals.attention.frequencies is None:
        raise ModelError(
            f"{method} undoes rotary embeddings, but this model's were not recognised (halves of the head dimension rotated by "
            "`rotary_emb.inv_freq`); use another method"
        )
    return signals.attention.frequencies.float()


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns states [..., d] with every pair turned to (x cos - y sin, x sin + y cos), float32; cos and sin are [..., r]."""
    half = cos.shape[-1]
    x, y = states[..., :half].float(), states[..., half : 2 * half].float()
    out = states.float().clone()
    out[..., :half], out[..., half : 2 * half] = x * cos - y * sin, x * sin + y * cos
    return out
