"""The worth of keys by gradient, against finite differences and the closed form of the softmax's derivative in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from learnevict.oracle import gradient_utility
from tests.closeness import close
from tests.laws import zoo
from tests.laws.naive import position_ids
from tests.laws.run import batch

PADS, LENGTH = (0, 5), 14
NAME = "biased"
BIAS: dict[int, Tensor] = {}
MET: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
pytestmark = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")


def biased_attention(module, query, key, value, attention_mask, *, scaling, softcap=None, **kwargs):
    """Eager attention with BIAS[layer] [B, H, T] on the logits; takes down probabilities, values and outputs."""
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if module.layer_idx in BIAS:
        logits = logits + BIAS[module.layer_idx].repeat_interleave(group, 1).unsqueeze(2)
    weights = logits.masked_fill(attention_mask < 0, torch.finfo(torch.float64).min).softmax(-1)
    values = value.repeat_interleave(group, 1)
    out = weights @ values
    if out.requires_grad:
        out.retain_grad()
    MET[module.layer_idx] = (weights, values, out)
    return out.transpose(1, 2).contiguous(), weights


def loss(model, ids: Tensor, mask: Tensor, scored: Tensor) -> Tensor:
    """Nats of the scored tokens, in float64."""
    places = position_ids(mask)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    chosen = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    real = mask[:, 1:].bool() & mask[:, :-1].bool() & scored[:, 1:]
    return -(chosen * real).sum()


@pytest.fixture(params=["qwen3", "gemma2"])
def models(request):
    """The same model in float32, as it is served, and in float64, with eager attention that takes a bias."""
    AttentionInterface.register(NAME, biased_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    exact = zoo.fresh(request.param).double()
    exact.set_attn_implementation(NAME)
    yield zoo.build(request.param), exact
    BIAS.clear()
    MET.clear()


def test_utility_is_the_derivative_by_a_bias_on_the_key(models):
    """Finite differences of single keys, by a large step, since norms round to float32; and the closed form of all keys."""
    model, exact = models
    ids, mask = batch(zoo.tokens(model, 2, LENGTH), PADS)
    scored = torch.arange(LENGTH).expand(2, -1) > 8
    found = gradient_utility(model, ids, mask, scored=scored)
    assert (found[0] is None) == ("Gemma" in type(model).__name__)
    layer = len(found) - 1
    part = found[layer]
    assert part is not None and bool((part < 0).any()) and bool((part > 0).any())
    for row, head, key in [(0, 0, 0), (0, 1, 6), (1, 0, 7), (1, 1, 12), (1, 0, 2)]:
        ends = []
        for sign in (1, -1):
            bias = torch.zeros(2, 2, LENGTH, dtype=torch.float64)
            bias[row, head, key] = sign * 0.02
            BIAS[layer] = bias
            with torch.no_grad():
                ends.append(float(loss(exact, ids, mask, scored)))
        assert float(part[row, head, key]) == pytest.approx((ends[1] - ends[0]) / 0.04, rel=5e-3, abs=5e-4)
    BIAS.clear()
    exact.get_input_embeddings().requires_grad_(True)
    loss(exact, ids, mask, scored).backward()
    for index, known in enumerate(found):
        if known is None:
            continue
        weights, values, out = MET[index]
        pull = torch.einsum("bhtd,bhid->bhti", out.grad, values) - (out.grad * out).sum(-1, keepdim=True)
        want = -(weights * pull).sum(2).unflatten(1, (2, 2)).sum(2).detach().float()
        want = want * mask[:, None]
        close(known, want)


def test_rows_and_weights_are_left_alone():
    """A padded row is worth what it is worth alone; the base gets no gradient, and may be asked inside no_grad."""
    model = zoo.fresh("llama").requires_grad_(True)
    ids, mask = batch(zoo.tokens(model, 2, LENGTH), PADS)
    with torch.no_grad():
        found = gradient_utility(model, ids, mask)
    alone = gradient_utility(model, ids[1:, PADS[1] :])
    for one, other in zip(found, alone, strict=True):
        close(one[1:, :, PADS[1] :], other)
        assert not one[1, :, : PADS[1]].any() and not one.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert math.isfinite(float(sum(part.sum() for part in found)))
