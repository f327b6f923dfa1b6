"""Pure-torch references of every kernel; the specification that kernels are tested against. And who computes what."""

from learnevict.ops.decode import slot_attention, slot_attention_reference, unfit
from learnevict.ops.kernels import KernelChoice, Kernels, using_kernels
from learnevict.ops.select import keep_top, ranks

__all__ = [
    "KernelChoice", "Kernels", "keep_top", "ranks", "slot_attention", "slot_attention_reference", "unfit", "using_kernels",
]  # fmt: skip
