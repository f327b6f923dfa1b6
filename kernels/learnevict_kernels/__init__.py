"""Triton kernels behind the `learnevict::` operators; imported by `learnevict.ops.kernels` alone."""

from learnevict_kernels.decode import register

__all__ = ["register"]
