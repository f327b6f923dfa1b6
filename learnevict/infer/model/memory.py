"""Estimates how many bytes a model, its full cache and an evicting cache take, from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from learnevict.config import Budget
from learnevict.errors import BudgetError, UsageError
from learnevict.infer.model.supported import evicting_layers, state_shape
from learnevict.policy import Guard, Schedule


@dataclass(frozen=True)
class CacheMemory:
    """The bytes of a model and its caches on the device, all rows of the batch together.

    Attributes:
        parameters: number of weights; `weights`: their bytes.
        full: keys and values of a full cache at the end of the context.
        evicted: keys and values of an evicting cache at its largest: budget + slack slots per head.
        budget: in slots per (layer, kv head).
        evicting: how many layers a policy governs, of `layers`.
    """

    parameters: int
    weights: int
    full: int
    evicted: int
    budget: int
    evicting: int
    layers: int


def estimate(
    config: PreTrainedConfig,
    budget: Budget,
    *,
    tokens: int,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    schedule: Schedule | None = None,
    guard: Guard | None = None,
) -> CacheMemory:
    """Estimates the bytes of weights and caches, without loading a weight.

    Args:
        tokens: length of the context, prompt and answer, in `batch` rows.
        dtype: of weights and cache; default the one the configuration names.
        schedule: its slack is held on top of the budget.
        guard: what a share may not shrink below.
    """
    if tokens < 1 or batch < 1:
        raise UsageError(f"context and batch must be at least 1, not {tokens} and {batch}")
    schedule, guard = schedule or Schedule(), guard or Guard()
    text = config.get_text_config(decoder=True)
    kind = dtype or getattr(text, "dtype", None) or torch.float32
    layers = DynamicCache(config=text).layers
    evicting = set(evicting_layers(layers))
    heads, width = state_shape(text)
    per_token = 2 * heads * width * torch.empty(0, dtype=kind).element_size()
    floor = guard.reserved(schedule.period) + 1
    if budget.unit == "tokens" and budget.amount < floor:
        raise BudgetError(
            f"budget {budget} is too small: {guard.sinks} sinks, {guard.recent} recent and a fresh block of "
            f"{schedule.period} tokens; the smallest that works is {floor} (or use a smaller slack)"
        )
    slots = budget.tokens(tokens, floor, max(len(evicting), 1) * per_token, len(evicting), schedule.slack)
    stock = [min(tokens, max(getattr(layer, "sliding_window", None) or tokens + 1, 2) - 1) for layer in layers]
    full = sum(stock) * per_token * batch
    held = [min(tokens, slots + schedule.slack) if index in evicting else size for index, size in enumerate(stock)]
    parameters = num_parameters(config)
    return CacheMemory(
        parameters,
        parameters * torch.empty(0, dtype=kind).element_size(),
        full,
        sum(held) * per_token * batch,
        slots,
        len(evicting),
        len(layers),
    )


def num_parameters(config: PreTrainedConfig) -> int:
    """Returns the number of weights of the model, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())
