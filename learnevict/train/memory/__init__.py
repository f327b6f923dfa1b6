"""Estimates of the memory and the operations of a training run."""
