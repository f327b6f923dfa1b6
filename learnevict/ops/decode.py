"""One decode step over slots: attention of one query per head, empty slots masked by a bias."""

# no `from __future__ import annotations`: torch reads the signature of a custom op at run time

import importlib
import os
import warnings

import torch
from torch import Tensor

from learnevict.errors import KernelUnusedWarning, ModelError

LARGEST_GROUP = 16
"""Query heads per kv head that the kernel has rows for."""

_enabled = False
_said: set[str] = set()


def slot_attention_reference(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Returns softmax(query . keys * scaling + bias) . values, in plain torch; the specification of the kernel.

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
    """Runs the operator that kernels implement; without one it is the reference."""
    return slot_attention_reference(query, keys, values, bias, scaling)


@slot_attention_op.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    return query.new_empty(*query.shape[:3], values.shape[-1])


def slot_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """See slot_attention_reference; through the operator once `use_kernels` has been called.

    Raises:
        ModelError: bfloat16 on a CPU with kernels on: Triton's interpreter takes it for integers.
    """
    if not _enabled:
        return slot_attention_reference(query, keys, values, bias, scaling)
    if query.shape[2] > LARGEST_GROUP:
        runs_in_torch(f"a kv head serves more than {LARGEST_GROUP} query heads")
        return slot_attention_reference(query, keys, values, bias, scaling)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        raise ModelError("Triton's interpreter cannot multiply bfloat16; use float32 on a CPU")
    return slot_attention_op(query, keys, values, bias, scaling)


def runs_in_torch(reason: str) -> None:
    """Warns, once per reason, of a step that kernels were asked for but cannot do."""
    if _enabled and reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"decode steps run in plain torch although kernels are on: {reason}", KernelUnusedWarning, stacklevel=3
        )


def use_kernels() -> None:
    """Routes decode steps on CUDA tensors through the Triton kernels (with TRITON_INTERPRET=1: CPU tensors, for tests).

    Steps of scorers that watch every step (h2o), of ragged heads (adakv), and of layers with softcap or attention sinks
    stay in plain torch; a KernelUnusedWarning says so once.

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
