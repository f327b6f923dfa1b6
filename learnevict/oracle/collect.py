"""Labels and golden traces of whole inputs: one full-cache pass, one layer at a time, nothing kept but the labels."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.infer.model.supported import state_shape
from learnevict.infer.teacher_forcing import replay
from learnevict.oracle.labels import future_attention
from learnevict.oracle.reducers import GOLDEN, Reducers
from learnevict.oracle.traces import golden
from learnevict.policy import Guard
from learnevict.signals import NEVER, Attention, Trace


def full_trace(model: PreTrainedModel, input_ids: Tensor) -> Trace:
    """Returns the trace of a cache from which nothing is ever evicted."""
    config = model.config.get_text_config(decoder=True)
    heads = state_shape(config)[0]
    shape = (config.num_hidden_layers, input_ids.shape[0], heads, input_ids.shape[1])
    # one number behind a view: a full trace of a long document costs nothing
    return Trace(
        torch.full((1, 1, 1, 1), NEVER, dtype=torch.int32, device=input_ids.device).expand(shape), source="full"
    )


@torch.no_grad()
def golden_labels(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    block: int = 128,
    reduce: Reducers = GOLDEN,
) -> tuple[list[Tensor | None], Tensor]:
    """Returns labels of every evicting layer from one full-cache pass.

    Args:
        model: the base model.
        input_ids: int64 [B, T], prompt and answer.
        attention_mask: [B, T], 0 = padding.
        block: queries per label block; the event period of the policy they are meant for.
        reduce: how attention becomes labels.

    Returns:
        labels, a list over layers of [B, H, T, M] (None for layers that stay stock), and the full-cache logits [B, T, V].
    """
    labels: list[Tensor | None] = [None] * model.config.get_text_config(decoder=True).num_hidden_layers
    valid = None if attention_mask is None else attention_mask.bool()

    def observe(
        layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention
    ) -> None:
        labels[layer] = future_attention(
            query,
            key,
            block=block,
            valid=valid,
            reduce=reduce,
            scaling=attention.scaling,
            softcap=attention.softcap,
            sinks=attention.sinks,
        )

    logits = replay(model, input_ids, full_trace(model, input_ids), attention_mask, observe=observe).logits
    return labels, logits


def golden_trace(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    budget: int,
    block: int,
    guard: Guard,
    prompt_length: Tensor | None = None,
) -> Trace:
    """Returns the golden eviction trace of a text the model has seen in full.

    Args:
        model: the base model.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 0 = padding.
        budget: slots per (layer, kv head) after an event.
        block: event period.
        guard: slots never evicted.
        prompt_length: int [B], needed when the guard protects prompts.

    Raises:
        BudgetError: budget smaller than guards + block.
    """
    labels, _ = golden_labels(model, input_ids, attention_mask, block=block)
    valid = None if attention_mask is None else attention_mask.bool()
    return golden(labels, budget=budget, block=block, guard=guard, valid=valid, prompt_length=prompt_length)
