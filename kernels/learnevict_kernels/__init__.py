"""Triton kernels behind the `learnevict::` custom ops; imported by `learnevict.ops.use_kernels()` alone."""
