"""Eager attention of a stock model in which a mask says, head by head and token by token, what may be seen.

It shares nothing with learnevict: full [T, T] masks, repeated heads, the sink as one more column of the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "laws_naive"
FORGOTTEN: dict[int, Tensor] = {}


def masked_attention(module, query, key, value, attention_mask, *, scaling, softcap=None, s_aux=None, **kwargs):
    """Query head j uses key head j // G; `FORGOTTEN[layer]` is bool [B or 1, H, >= T, >= T], True where a token is gone."""
    group = query.shape[1] // key.shape[1]
    logits = query.double() @ key.double().repeat_interleave(group, 1).transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = attention_mask < 0
    if module.layer_idx in FORGOTTEN:
        gone = FORGOTTEN[module.layer_idx][:, :, : query.shape[2], : key.shape[2]]
        hidden = hidden | gone.repeat_interleave(group, 1)
    # A padded query sees nothing: uniform weights, as eager attention has them; nobody reads its answer.
    logits = logits.masked_fill(hidden, torch.finfo(torch.float32).min)
    if s_aux is not None:
        sink = s_aux.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    answer = weights @ value.double().repeat_interleave(group, 1)
    return answer.transpose(1, 2).to(query.dtype).contiguous(), weights


@contextmanager
def masking(model: PreTrainedModel, forgotten: dict[int, Tensor]) -> Iterator[None]:
    """Inside, the model's attention does not see what is `forgotten`."""
    AttentionInterface.register(NAME, masked_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    FORGOTTEN.update(forgotten)
    try:
        yield
    finally:
        FORGOTTEN.clear()
        model.set_attn_implementation(previous)


def position_ids(mask: Tensor) -> Tensor:
    """Returns positions as generate() counts them: 0 for the first real token, int64 [B, T]."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def forgetting(expiry: Tensor) -> dict[int, Tensor]:
    """Returns, by layer, bool [B, H, T, T]: token i (last) is hidden from query t >= expiry[layer, b, h, i]."""
    query = torch.arange(expiry.shape[-1], device=expiry.device).view(1, 1, -1, 1)
    return {layer: query >= until.unsqueeze(2) for layer, until in enumerate(expiry)}


def masked_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, expiry: Tensor | None) -> Tensor:
    """Returns logits [B, T, V] of one full pass in which token i is hidden from query t >= expiry[layer, b, h, i]."""
    with masking(model, {} if expiry is None else forgetting(expiry)), torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits


def stock(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Returns logits [B, T, V] of the untouched eager model."""
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
