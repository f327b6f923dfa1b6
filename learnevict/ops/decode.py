"""One decode step over slots: attention of one query per head, empty slots masked by a bias."""

# no `from __future__ import annotations`: torch reads the signature of a custom op at run time

import importlib
import os

import torch
from torch import Tensor

from learnevict.errors import ModelError

_enabled = False


def slot_attention_reference(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Softmax(query . keys * scaling + bias) . values, in plain torch; the specification of the kernel.

    Args:
        query: [B, H, G, d], the query heads of each kv head.
        keys: [B, H, N, d]; values [B, H, N, dv].
        bias: [B, H, N], 0 where a slot is occupied and -inf where it is empty.
        scaling: multiplies the products.

    Returns:
        [B, H, G, dv]
    """
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=bias.unsqueeze(2), scale=scaling
    )


@torch.library.custom_op("learnevict::slot_attention", mutates_args=())
def slot_attention_op(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """The operator that kernels implement; without one it is the reference."""
    return slot_attention_reference(query, keys, values, bias, scaling)


@slot_attention_op.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    return query.new_empty(*query.shape[:3], values.shape[-1])


def slot_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """See slot_attention_reference; through the operator once `use_kernels` has been called."""
    run = slot_attention_op if _enabled else slot_attention_reference
    return run(query, keys, values, bias, scaling)


def use_kernels() -> None:
    """Route decode steps on CUDA tensors through the Triton kernels (with TRITON_INTERPRET=1: CPU tensors, for tests).

    Raises:
        ModelError: Triton is not installed, or there is neither a CUDA device nor the interpreter.
    """
    global _enabled
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        raise ModelError("kernels need a CUDA device; without one the plain torch path is the one to use")
    try:
        kernels = importlib.import_module("learnevict_kernels")
    except ImportError as error:
        raise ModelError("kernels need Triton: pip install 'learnevict[gpu]'") from error
    kernels.register("cpu" if interpreted else "cuda")
    _enabled = True
