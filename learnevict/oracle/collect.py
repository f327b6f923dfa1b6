"""Labels and golden traces of whole texts, from one full-cache pass that keeps nothing but the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from learnevict.config import Budget
from learnevict.errors import ModelError
from learnevict.infer.attach import attach
from learnevict.infer.model.modules import attention_modules
from learnevict.infer.model.supported import state_shape
from learnevict.infer.teacher_forcing import Received, replay
from learnevict.oracle.labels import LayerInputs, future_attention, per_head_output_weight
from learnevict.oracle.reducers import GOLDEN, Reducers, horizon
from learnevict.oracle.traces import golden
from learnevict.policy import DecayBias, Guard, Policy, Schedule, SoftGate
from learnevict.signals import NEVER, Signals, Trace


def full_trace(model: PreTrainedModel, input_ids: Tensor) -> Trace:
    """Returns the trace of a cache from which nothing is ever evicted."""
    config = model.config.get_text_config(decoder=True)
    shape = (config.num_hidden_layers, input_ids.shape[0], state_shape(config)[0], input_ids.shape[1])
    # one number behind a view: a full trace of a long document costs nothing
    never = torch.full((1, 1, 1, 1), NEVER, dtype=torch.int32, device=input_ids.device)
    return Trace(never.expand(shape), source="full")


def layer_labels(
    model: PreTrainedModel,
    layer: int,
    received: Received,
    *,
    block: int,
    valid: Tensor | None,
    reduce: Reducers,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Returns the labels of one layer from what its attention received; arguments as of `future_attention`.

    Raises:
        ModelError: contributions are asked for, but the layer's output projection or inputs are not there.
    """
    attention = received.attention
    inputs: LayerInputs = {"scaling": attention.scaling, "softcap": attention.softcap, "sinks": attention.sinks}
    inputs |= {"queries": queries, "keys": keys}
    if reduce.value == "contribution":
        weight = getattr(getattr(attention_modules(model)[layer], "o_proj", None), "weight", None)
        if weight is None or received.hidden is None:
            raise ModelError(
                f"layer {layer} of {type(model).__name__} has no `o_proj` with a weight, or hides its inputs, so |W_O v| / |h| "
                "is unknown; use a target without contributions (KVZIP)"
            )
        inputs["value"] = received.value
        inputs["output_weight"] = per_head_output_weight(weight, received.query.shape[1])
        inputs["hidden_norm"] = received.hidden.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return future_attention(received.query, received.key, block=block, valid=valid, reduce=reduce, **inputs)


@torch.no_grad()
def golden_labels(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    block: int = 128,
    reduce: Reducers = GOLDEN,
    queries: Bool[Tensor, "B T"] | None = None,
    **kwargs: Any,
) -> tuple[list[Tensor | None], Tensor]:
    """Returns labels [B, H, T, M] of every layer (None for layers that stay stock) and the full-cache logits [B, T, V].

    Args:
        model: the base model.
        input_ids: int64 [B, T], prompt and answer.
        attention_mask: [B, T], 0 = padding.
        block: queries per label block; the event period of the policy they are meant for.
        reduce: how attention becomes labels.
        queries: which tokens' attention counts, for reducers that ask for it.
        **kwargs: handed to the model's forward.
    """
    labels: list[Tensor | None] = [None] * model.config.get_text_config(decoder=True).num_hidden_layers
    valid = None if attention_mask is None else attention_mask.bool()

    def observe(layer: int, received: Received) -> None:
        labels[layer] = layer_labels(model, layer, received, block=block, valid=valid, reduce=reduce, queries=queries)

    logits = replay(model, input_ids, full_trace(model, input_ids), attention_mask, observe=observe, **kwargs).logits
    return labels, logits


def future_of(labels: Sequence[Tensor | None]) -> Tensor:
    """Returns the largest label of blocks m, m + 1, ... in every layer, [L, B, H, T, M + 1]: zeros behind the end, and in
    layers that stay stock."""
    like = next(part for part in labels if part is not None)
    known = torch.stack([torch.zeros_like(like) if part is None else part for part in labels])
    return torch.nn.functional.pad(horizon(known), (0, 1))


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
    """Returns the golden eviction trace of a text; arguments as of `golden_labels` and `golden`.

    Raises:
        BudgetError: the budget cannot hold guards and a fresh block.
    """
    labels, _ = golden_labels(model, input_ids, attention_mask, block=block)
    valid = None if attention_mask is None else attention_mask.bool()
    return golden(labels, budget=budget, block=block, guard=guard, valid=valid, prompt_length=prompt_length)


class KeyBias(SoftGate):
    """A bias of 0 on the logit of every key, float32 [B, H, T] by layer, to differentiate by."""

    def __init__(self) -> None:
        super().__init__()
        self.biases: dict[int, Tensor] = {}

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """Returns a fresh leaf for each layer of a forward."""
        assert signals.key is not None
        bias = torch.zeros(signals.key.shape[:3], device=signals.key.device, requires_grad=True)
        self.biases[signals.layer] = bias
        return {"bias": bias}

    def decay_bias(self, state: dict[str, Tensor]) -> DecayBias:
        """Returns the bias, whatever a token's age."""
        return DecayBias(state["bias"], window=0)

    def score(self, signals: Signals) -> Tensor:
        """Returns equal scores: nothing is evicted."""
        return torch.zeros(signals.position.shape, device=signals.position.device)


def gradient_utility(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Tensor | None = None,
    *,
    scored: Bool[Tensor, "B T"] | None = None,
) -> list[Tensor | None]:
    """Returns -dL/db of every key by one backward pass: b is a bias on its logit, the same for all later queries and the group.

    With attention A, outputs o and values v that is -sum over t of A_ti (dL/do_t . (v_i - o_t)). An ablation beside the
    attention oracles, no paper's target; it is negative for tokens that mislead, and near 0 where the model is sure of itself,
    also for tokens it could not do without. On the testbed it keeps far less than golden labels do.

    Args:
        model: the base model; no gradient reaches its weights.
        input_ids: texts.
        attention_mask: [B, T], 0 = padding.
        scored: tokens whose prediction counts (a response, say); default all real ones but the first.

    Returns:
        per layer float32 [B, H, T], in nats summed over scored tokens (None for layers that stay stock); 0 for padding.
    """
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    counted = valid[:, 1:] & valid[:, :-1] & (True if scored is None else scored[:, 1:])
    gate = KeyBias()
    position = (valid.cumsum(-1) - 1).clamp_min(0)
    with torch.enable_grad(), attach(model, Policy(Budget(1), gate, schedule=Schedule(active=False)), soft=True):
        output = model(input_ids=input_ids, attention_mask=valid.long(), position_ids=position, use_cache=False)
        loss = cross_entropy(output.logits[:, :-1][counted].float(), input_ids[:, 1:][counted], reduction="sum")
        gradients = torch.autograd.grad(loss, list(gate.biases.values()))
    found: list[Tensor | None] = [None] * model.config.get_text_config(decoder=True).num_hidden_layers
    for layer, gradient in zip(gate.biases, gradients, strict=True):
        found[layer] = -gradient
    return found
