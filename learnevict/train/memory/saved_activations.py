"""What gates keep for their backward pass, in bytes: measured on a few tokens of one layer, for it grows with these evenly.

A gate of one layer is made and asked about random texts by the code that trains it, so any method can be measured. Nothing of
the base is needed but its shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from learnevict.config import Layout
from learnevict.oracle import Received
from learnevict.parts.learned import Learner, SlotScorer
from learnevict.policy import Gate
from learnevict.signals import Attention
from learnevict.train.trainers.layer_batch import LayerBatch, UnpaddedPositions

FEW, MORE = 32, 96


def bytes_per_token(build: Callable[[Layout], Gate], layout: Layout) -> float:
    """Kept for every token of a text, or for every slot of all heads where slots are ranked, in one layer.

    Args:
        build: makes the gate.
        layout: of the base.
    """
    gate = build(replace(layout, num_layers=1))

    def ask(tokens: int) -> Any:
        if isinstance(gate, SlotScorer):
            return gate.score_features(0, torch.zeros(1, layout.num_heads, tokens, gate.num_features))
        return _studied(gate, layout, tokens)

    return (kept(gate, lambda: ask(MORE)) - kept(gate, lambda: ask(FEW))) / (MORE - FEW)


def _studied(gate: Gate, layout: Layout, tokens: int) -> Any:
    """What a trainer asks the gate about a text."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    positions = UnpaddedPositions.of(ids, torch.ones_like(ids, dtype=torch.bool))
    query = torch.zeros(1, layout.num_query_heads, tokens, layout.head_dim)
    key = torch.zeros(1, layout.num_heads, tokens, layout.head_dim)
    value = torch.zeros(1, layout.num_heads, tokens, layout.value_dim)
    turning = torch.ones(layout.head_dim // 2)
    attention = Attention(layout.head_dim**-0.5, frequencies=turning)
    received = Received(query, key, value, torch.zeros(1, tokens, layout.hidden_size), attention)
    batch = LayerBatch.of(0, positions, received)
    written = batch.written(gate.columns)
    if not (isinstance(gate, Learner) and gate.at_cuts):
        return gate.write(written)
    state = batch.state(gate.write(written), gate.columns)
    seen = torch.full((1,), tokens)
    return gate.predictions(batch.event(seen, tokens, seen.int(), state, gate.window))


def kept(gate: Gate, run: Callable[[], Any]) -> int:
    """Bytes that are saved for the backward pass, beside the gate's own weights; memory that is shared counts once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*gate.parameters(), *gate.buffers()]}
    found: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        answer = run()
    total = sum(found.values())
    del answer  # until here nothing that was counted may be freed, or its address would be given out again
    return total
