"""Refining judges by reinforcement: eviction as a decision process on TRL's GRPOTrainer.

draw       the sampling law and its exact log-probability
explorer   the governor that draws, and takes down every draw
episode    groups of traces of one text, sampled in one forward
rewards    what a trace costs the language model, token by token; what free answers earn
credit     who is to blame for it
rollout    one batch of experience for it
trainer    GRPO over all of that
"""
