"""Pure-torch references of every kernel; the specification that kernels are tested against."""

from learnevict.ops.select import keep_top, ranks

__all__ = ["keep_top", "ranks"]
