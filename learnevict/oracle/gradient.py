"""What the loss of a text would lose with a token: the first-order worth of every key, by one backward pass.

With an additive bias b_i on the logit of key i, the same for all later queries and the group, U_i = -dL/db_i at b = 0. In
terms of attention A, outputs o and values v, U_i = -sum over t of A_ti (dL/do_t . (v_i - o_t)): unlike a sum of attention it
knows how far a value is from the output it takes part in, and what the loss makes of the difference. An ablation beside the
attention oracles: no paper's target, and negative for tokens that mislead. Where a model is sure of itself, the loss has no
slope left although it would be lost without the token: on the testbed this keeps far less than golden labels do.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.config import Budget
from learnevict.infer.attach import attach
from learnevict.policy import DecayBias, Policy, Schedule, SoftGate
from learnevict.signals import Signals


class KeyBias(SoftGate):
    """A bias of 0 on every key, to differentiate by; by layer, float32 [B, H, T]."""

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
        """Returns equal scores, float32 [B, H, N]: nothing is evicted."""
        return torch.zeros(signals.position.shape, device=signals.position.device)


def gradient_utility(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Tensor | None = None,
    *,
    scored: Bool[Tensor, "B T"] | None = None,
) -> list[Tensor | None]:
    """Returns how much of the text's likelihood hangs on each key.

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
    policy = Policy(Budget(1), gate, schedule=Schedule(active=False))
    with torch.enable_grad(), attach(model, policy, soft=True):
        position = (valid.cumsum(-1) - 1).clamp_min(0)
        logits = model(
            input_ids=input_ids, attention_mask=valid.long(), position_ids=position, use_cache=False
        ).logits  # fmt: skip
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1][counted].float(), input_ids[:, 1:][counted], reduction="sum"
        )
        layers = sorted(gate.biases)
        gradients = torch.autograd.grad(loss, [gate.biases[layer] for layer in layers])
    found: list[Tensor | None] = [None] * model.config.get_text_config(decoder=True).num_hidden_layers
    for layer, gradient in zip(layers, gradients, strict=True):
        found[layer] = -gradient
    return found
