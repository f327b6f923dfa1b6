"""Pure-torch references of every kernel; the specification that kernels are tested against."""

from learnevict.ops.decode import runs_in_torch, slot_attention, slot_attention_reference, use_kernels
from learnevict.ops.select import keep_top, ranks

__all__ = ["keep_top", "ranks", "runs_in_torch", "slot_attention", "slot_attention_reference", "use_kernels"]
