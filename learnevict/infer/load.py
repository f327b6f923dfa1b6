"""Models by name: a local folder, or a Hub id because the user asked for one. Code that comes with a model is never run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from learnevict.errors import ModelError, UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


def load(name: str, *, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """A causal language model in eval mode and its tokenizer.

    Args:
        name: a folder that `save_pretrained` wrote, or a Hub id (downloaded, or taken from the local cache).
        device: auto, cpu, cuda, cuda:1, mps, ...
        dtype: auto (as stored), fp32, bf16 or fp16.

    Raises:
        ModelError: nothing there, or nothing that transformers can load without running code of the model's author.
        UsageError: no such device or dtype on this machine.
    """
    where, kind = pick_device(device), pick_dtype(dtype)
    source = locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_explain(name, error)) from error
    return model.to(where).eval(), tokenizer


def load_config(name: str) -> PreTrainedConfig:
    """The configuration alone, without weights.

    Raises:
        ModelError: as `load`.
    """
    source = locate(name)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_explain(name, error)) from error


def locate(name: str) -> str:
    """The folder as a path, or the name itself if it can only be a Hub id.

    Raises:
        ModelError: neither; what looks like a path never becomes a download.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ModelError(f"no model in {name!r}: expected a folder with config.json, weights and tokenizer files")
        return str(folder)
    if HUB_ID.fullmatch(name) is None or name.startswith(".") or len(folder.parts) > 1 and folder.parent.exists():
        raise ModelError(f"no folder {name!r}; give a local model folder, a Hub id such as Qwen/Qwen3-0.6B, or testbed")
    return name


def pick_device(name: str) -> torch.device:
    """The device of this name; auto is the first accelerator, else the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is unknown; use auto, cpu, cuda, cuda:1 or mps") from error
    present = device.type == "cpu" or (accelerator is not None and accelerator.type == device.type)
    if not present or (device.index or 0) >= max(torch.accelerator.device_count(), 1):
        found = "only the CPU" if accelerator is None else f"cpu and {torch.accelerator.device_count()} {accelerator.type}"
        raise UsageError(f"device {name!r} is not here: torch sees {found}; use --device auto")
    return device


def pick_dtype(name: str) -> torch.dtype | str:
    """The torch dtype of this name; auto stays "auto".

    Raises:
        UsageError: unknown name.
    """
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES.get(name, name)


def _explain(name: str, error: Exception) -> str:
    """One line: what transformers said, and what to do about it."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error):
        return f"model {name!r} needs code of its own, which learnevict does not run; use a model that transformers knows"
    if Path(name).expanduser().exists():
        return f"cannot load the model in {name!r}: {said}"
    return (
        f"cannot load {name!r}: there is no such folder here, and as a Hub id: {said} (a private or gated model needs "
        "`hf auth login`; without a network give a local folder)"
    )


def quiet(*, bars: bool) -> None:
    """Only errors from transformers; progress bars on request. For programs whose own lines should be readable."""
    transformers_logging.set_verbosity_error()
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
