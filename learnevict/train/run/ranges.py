"""Which numbers make sense for a flag, so that a mistake is told before any work and not after it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from learnevict.errors import UsageError

MOST = 2**32 - 1
"""Of any number: the largest seed that numpy takes."""
MOST_OF = {
    "threads": 1024, "dataloader_num_workers": 1024, "ddp_timeout": 10**6, "adam_beta1": 1 - 1e-9, "adam_beta2": 1 - 1e-9,
    "label_smoothing_factor": 1, "top_p": 1, "dropout": 1 - 1e-9, "promote_at": 1,
}  # fmt: skip
LITTLE = 1e-30
GATE = {
    **dict.fromkeys(("hidden", "window", "rank", "num_tokens", "state", "period"), 1),
    **dict.fromkeys(("num_sinks", "noise", "dropout", "alpha"), 0),
}
"""The least of what gates are made with; other names are anybody's."""
TRAINING = {
    **dict.fromkeys(("max_steps", "local_rank"), -1),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "temperature"), LITTLE),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit",
         "eval_accumulation_steps", "torch_empty_cache_steps", "ddp_timeout", "ddp_bucket_cap_mb", "num_generations",
         "num_generations_eval", "num_iterations", "steps_per_generation", "generation_batch_size"),
        1,
    ),
}  # fmt: skip
"""The least of training arguments; 0 for all others."""
REPORTERS = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}
"""Packages that training arguments do not miss before training begins."""


def check_numbers(settings: Any, least: Mapping[str, float] | None = None, otherwise: float | None = None) -> None:
    """Refuses numbers that are NaN, infinite, too small or beyond all reason.

    Args:
        settings: a dataclass, or a mapping; values of other kinds than numbers are passed over.
        least: the smallest of some of them.
        otherwise: the smallest of the others; None: 1 for what counts 1 or more by default, 0 for what counts from 0, and
            more than 0 for other numbers that are so by default.

    Raises:
        UsageError: naming the flag.
    """
    for name, default, value in _settings(settings):
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                usual = otherwise if otherwise is not None else _least(default)
                _check(name, number, {} if least is None else least, usual)


def _settings(settings: Any) -> Iterator[tuple[str, Any, Any]]:
    """Names, defaults and values."""
    if isinstance(settings, Mapping):
        yield from ((name, None, value) for name, value in settings.items())
    else:
        yield from ((one.name, one.default, getattr(settings, one.name)) for one in fields(settings) if one.init)


def _least(default: Any) -> float:
    if default is MISSING or not isinstance(default, int | float) or default <= 0:
        return 0
    return 1 if isinstance(default, int) else LITTLE


def _check(name: str, number: float, least: Mapping[str, float], usual: float) -> None:
    low, high = least.get(name, usual), MOST_OF.get(name, MOST)
    if not low <= number <= high:  # as of NaN
        said = "a number above 0" if low == LITTLE else f"{max(low, -MOST):.10g} or more"
        raise UsageError(f"--{name} {number}: give {said}, and at most {high:.10g}")


def check_training(training: TrainingArguments) -> None:
    """Refuses training arguments with which training would end in an error, or in something else than was asked for.

    Raises:
        UsageError: naming the flag.
    """
    check_numbers(training, TRAINING, otherwise=0)
    if training.max_steps == 0:
        raise UsageError("--max_steps 0: give 1 or more, or -1 to count epochs")
    if not str(training.output_dir or ""):
        raise UsageError("--output_dir is empty; name a folder")
    for name, value in vars(training).items():
        if name.endswith("_kwargs") and value is not None and not isinstance(value, dict):
            raise UsageError(f'--{name} {value!r} is no object of JSON; write {{"name": value}}')
    wanted = [training.report_to] if isinstance(training.report_to, str) else training.report_to or []
    if unknown := [name for name in wanted if name not in (*INTEGRATION_TO_CALLBACK, "all", "none")]:
        raise UsageError(
            f"--report_to {' '.join(unknown)}: nobody reports there; choose from none, {', '.join(REPORTERS)}"
        )
    missing = [name for name in wanted if name in REPORTERS and importlib.util.find_spec(REPORTERS[name]) is None]
    if missing:
        raise UsageError(f"--report_to {' '.join(missing)}: not installed; pip install {' '.join(missing)}, or drop it")
