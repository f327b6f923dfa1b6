"""Replay an eviction history in one causal pass: token i of a head is visible to query t iff i <= t < expiry[i]."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from learnevict.errors import TraceError
from learnevict.infer.attach import REPLAY, Attachment, Observer, Replay
from learnevict.infer.support import evicting_layers
from learnevict.signals import Trace


def replay(
    model: PreTrainedModel,
    input_ids: Tensor,
    trace: Trace,
    attention_mask: Tensor | None = None,
    *,
    observe: Observer | None = None,
    **kwargs: Any,
) -> Any:
    """What the model would have answered at every position had its cache been evicted as the trace says.

    Args:
        model: the model.
        input_ids: int64 [B, T].
        trace: expiry int32 [L, B, H, T]; layers that stay stock are ignored.
        attention_mask: [B, T], 0 = padding.
        observe: called by every evicting layer with its queries, keys, values and inputs.
        **kwargs: handed to the model's forward.

    Returns:
        The model's output for one forward without cache; `.logits` is [B, T, V]. Equal to the step-by-step run that
        recorded the trace.

    Raises:
        TraceError: the trace belongs to another model or input.
    """
    text = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=text).layers
    shape = (len(layers), *input_ids.shape)
    found = (trace.expiry.shape[0], trace.expiry.shape[1], trace.expiry.shape[3])
    if found != shape:
        raise TraceError(
            f"the trace covers (layers, rows, tokens) = {found}, but model and input have {shape}; record it on this input"
        )
    expiry = trace.expiry.to(input_ids.device)
    valid = None if attention_mask is None else attention_mask.bool()
    if attention_mask is not None and "position_ids" not in kwargs:
        kwargs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    token = REPLAY.set(Replay({index: expiry[index] for index in evicting_layers(layers)}, valid, observe))
    try:
        with Attachment(model, None):
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
    finally:
        REPLAY.reset(token)
