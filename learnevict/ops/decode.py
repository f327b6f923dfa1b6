"""One decode step over slots: attention of one query per head, empty slots masked by a bias."""

# no `from __future__ import annotations`: torch reads the signature of a custom op at run time

import torch
from torch import Tensor

LARGEST_GROUP = 16
"""Query heads per kv head that the kernel has rows for."""

LARGEST_HEAD = 256
"""Head size that fits a tile of the kernel."""


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


def slot_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float, kernel: bool) -> Tensor:
    """See slot_attention_reference; by the kernel where there is one for it (`unfit`, `Kernels.serve`) and it is asked for."""
    run = slot_attention_op if kernel else slot_attention_reference
    return run(query, keys, values, bias, scaling)


def unfit(query: Tensor, num_heads: int) -> str | None:
    """Returns why the kernel cannot answer queries [B, Hq, 1, d] of a layer with so many kv heads; None if it can."""
    if query.shape[1] > LARGEST_GROUP * num_heads:
        return f"a kv head serves more than {LARGEST_GROUP} query heads"
    if query.shape[-1] > LARGEST_HEAD:
        return f"heads are wider than {LARGEST_HEAD}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there is no kernel for {query.dtype}"
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return "Triton's interpreter cannot multiply bfloat16"
    if query.requires_grad:
        return "the kernel has no gradient; call the model under torch.no_grad()"
    return None
