"""Losses between the scores of a gate and the labels of the oracle, or between soft-gated and full outputs."""
