"""From a recipe's flags to a plan that can be estimated (learnevict.train.memory.estimate), before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainingArguments

from learnevict.hub import Gates
from learnevict.train.memory.phases import RunPlan
from learnevict.train.run.arguments import Arguments

SHARED = ("period", "budgets", "cuts", "objective", "pairs", "recompute")
"""What a mode's config and a RunPlan both know, and call the same."""


def plan_distilling(flags: Arguments, tokens: int, dtype: torch.dtype | None) -> RunPlan:
    """Of recipes/distill.py.

    Args:
        flags: of the command line.
        tokens: of a text.
        dtype: of the base; None: the one its configuration names.
    """
    common, mode = flags.common, vars(flags.mode)
    given = {name: mode[name] for name in SHARED if name in mode}
    return RunPlan(
        flags.trainable_method.mode.name,
        tokens,
        flags.training.per_device_train_batch_size,
        stored_labels=common.labels is not None,
        golden=mode.get("along") == "golden",
        settings={**flags.settings, **(settings_of(common.start_from) if common.start_from else {})},
        dtype=dtype,
        **length(flags.training, common),
        **given,
    )


def plan_refining(common: Any, refine: Any, training: Any, tokens: int, dtype: torch.dtype | None) -> RunPlan:
    """Of recipes/grpo.py: its Config, RefineConfig and GRPOConfig; otherwise as `plan_distilling`."""
    return RunPlan(
        "grpo",
        tokens,
        training.per_device_train_batch_size,
        period=refine.period,
        budgets=(refine.min_budget, refine.max_budget),
        group=training.num_generations,
        settings=settings_of(common.start_from),
        dtype=dtype,
        **length(training, common),
    )


def length(training: TrainingArguments, common: Any) -> dict[str, Any]:
    """Processes that share a batch, `--gpus` or those that were launched, and steps until the end."""
    processes = common.gpus or training.world_size
    batch = training.per_device_train_batch_size * processes * training.gradient_accumulation_steps
    epochs = math.ceil(training.num_train_epochs * common.documents / batch)
    return {"processes": processes, "steps": training.max_steps if training.max_steps > 0 else max(epochs, 1)}


def settings_of(gates: str) -> dict[str, Any]:
    """Of gates in a folder or on the Hub, as the method's `build` takes them."""
    return dict(Gates.load(gates).config.settings)
