"""The oracle: what the future wants of each token, and the eviction history that serves it.

    labels = [oracle.future_attention(query, key, block=128) for query, key in layers]     # [B, H, T, M] each
    trace = oracle.golden(labels, budget=512, block=128, guard=Guard())                    # expiry [L, B, H, T]

Every paper reduces attention in another order; `Reducers` spells the order out and `PRESETS` names the known ones.
"""

from learnevict.infer.teacher_forcing import Received
from learnevict.oracle.collect import full_trace, golden_labels, golden_trace, gradient_utility
from learnevict.oracle.demand import layer_demand
from learnevict.oracle.labels import LayerInputs, future_attention, per_head_output_weight
from learnevict.oracle.reconstruct import Repeating, reconstruct, repeat_prompt
from learnevict.oracle.reducers import (
    GOLDEN,
    H2O,
    INDEX_MEM,
    JUDGE_Q,
    KVP,
    KVZAP,
    KVZIP,
    KVZIP_PLUS,
    LOCRET,
    LOOKAHEAD_KV,
    PRESETS,
    Reducers,
    horizon,
    pool_groups,
    target,
)
from learnevict.oracle.traces import Share, golden

__all__ = [
    "future_attention", "golden", "golden_labels", "golden_trace", "full_trace", "reconstruct", "repeat_prompt",
    "gradient_utility", "layer_demand", "horizon", "pool_groups", "target", "per_head_output_weight",
    "Reducers", "LayerInputs", "Received", "Repeating", "Share", "PRESETS",
    "GOLDEN", "KVP", "KVZIP", "KVZIP_PLUS", "KVZAP", "JUDGE_Q", "LOOKAHEAD_KV", "LOCRET", "INDEX_MEM", "H2O",
]  # fmt: skip
