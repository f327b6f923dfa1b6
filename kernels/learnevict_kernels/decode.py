"""Split decode attention over slots: the kernel of `learnevict::slot_attention`.

Shapes: B batch, H kv heads, G query heads per kv head, N slots, D head size, S splits.
Each program reads one split of one head's slots once, for all G query heads of the group; a second kernel joins the splits.
Keys and values are read once: 2 N D bytes-per-element a head, which is all that a decode step has to move.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from learnevict.ops.decode import LARGEST_GROUP, slot_attention_op

BLOCK = 64
ROWS = LARGEST_GROUP  # query rows of a tile; groups are padded to it because tl.dot wants 16


@triton.jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, part_ptr, top_ptr, sum_ptr,
    scaling, G, N, D, DV, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, H, per_split,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """Writes the softmax over one split, not yet normalised: part [B*H, S, G, DV], top and sum [B*H, S, G]."""
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, d, dv, n = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, BLOCK)
    q = tl.load(q_ptr + head * G * D + row[:, None] * D + d[None, :], (row[:, None] < G) & (d[None, :] < D), other=0.0)
    batch, kv = (head // H).to(tl.int64), (head % H).to(tl.int64)
    k_base, v_base = k_ptr + batch * stride_kb + kv * stride_kh, v_ptr + batch * stride_vb + kv * stride_vh
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DVP], tl.float32)
    first = split * per_split
    for start in range(0, per_split, BLOCK):
        slot = first + start + n
        inside = (slot < N) & (slot < first + per_split)
        where = slot.to(tl.int64)
        k = tl.load(k_base + where[:, None] * stride_kn + d[None, :], inside[:, None] & (d[None, :] < D), other=0.0)
        v = tl.load(v_base + where[:, None] * stride_vn + dv[None, :], inside[:, None] & (dv[None, :] < DV), other=0.0)
        bias = tl.load(bias_ptr + head.to(tl.int64) * N + where, inside, other=float("-inf")).to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=tl.float32) * scaling + bias[None, :]
        new_top = tl.maximum(top, tl.max(logits, 1))
        weight = tl.exp(logits - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee", out_dtype=tl.float32)
        top = new_top
    flat = (head * splits + split) * G + row
    tl.store(part_ptr + flat[:, None] * DV + dv[None, :], out, (row[:, None] < G) & (dv[None, :] < DV))
    tl.store(top_ptr + flat, top, row < G)
    tl.store(sum_ptr + flat, total, row < G)


@triton.jit
def join_kernel(part_ptr, top_ptr, sum_ptr, out_ptr, G, S, DV, DVP: tl.constexpr):
    """Writes out [B*H, G, DV]: the splits weighted by their share of the softmax."""
    head, row = tl.program_id(0), tl.program_id(1)
    dv = tl.arange(0, DVP)
    top, total = tl.full([1], -1.0e30, tl.float32), tl.zeros([1], tl.float32)
    out = tl.zeros([DVP], tl.float32)
    for split in range(S):
        flat = (head * S + split) * G + row + tl.arange(0, 1)
        part_top, part_sum = tl.load(top_ptr + flat), tl.load(sum_ptr + flat)
        part = tl.load(part_ptr + ((head * S + split) * G + row) * DV + dv, dv < DV, other=0.0)
        new_top = tl.maximum(top, part_top)
        old, new = tl.exp(top - new_top), tl.exp(part_top - new_top)
        out, total, top = out * old + part * new, total * old + part_sum * new, new_top
    out = out / tl.maximum(total, 1.0e-30)
    tl.store(out_ptr + (head * G + row) * DV + dv, out.to(out_ptr.dtype.element_ty), dv < DV)


def slot_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Launches the kernels; see learnevict.ops.slot_attention_reference. Rows of keys and values must be contiguous."""
    batch, heads, group, width = query.shape
    num, out_width = keys.shape[2], values.shape[-1]
    assert group <= ROWS, "learnevict.ops.unfit refuses larger groups"
    assert keys.stride(-1) == 1
    assert values.stride(-1) == 1
    splits = max(1, min(-(-num // BLOCK), 256 // max(batch * heads, 1)))
    per_split = -(-num // splits)
    shape = (batch * heads, splits, group)
    part = query.new_empty(*shape, out_width, dtype=torch.float32)
    top, total = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
    split_kernel[(batch * heads, splits)](
        query.contiguous(), keys, values, bias.contiguous(), part, top, total,
        scaling, group, num, width, out_width, *keys.stride()[:3], *values.stride()[:3], heads, per_split,
        BLOCK=BLOCK, ROWS=ROWS, DP=max(16, triton.next_power_of_2(width)), DVP=max(16, triton.next_power_of_2(out_width)),
    )  # fmt: skip
    out = query.new_empty(batch, heads, group, out_width)
    join_kernel[(batch * heads, group)](
        part, top, total, out, group, splits, out_width, DVP=triton.next_power_of_2(out_width)
    )
    return out


def register(device: str) -> None:
    """Makes this the implementation of `learnevict::slot_attention` for tensors on `device`."""
    slot_attention_op.register_kernel(device)(slot_attention)
