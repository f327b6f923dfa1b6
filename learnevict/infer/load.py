"""Models by name: a local folder, or a Hub id because the user asked for one. A model's own code is never run."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
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
    source, local = locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        with whole_weights():
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=kind, local_files_only=local, trust_remote_code=False
            )
    except SafetensorError as error:
        raise ModelError(f"cannot load model {name!r}: {damage(source, error)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_explain(name, error)) from error
    return model.to(where).eval(), tokenizer


@contextmanager
def whole_weights() -> Generator[None]:
    """What `from_pretrained` loads inside is whole in every process.

    Under ZeRO-3, transformers would deal each weight out to the processes. That suits what DeepSpeed trains and wraps; the base
    is neither, and gates are dealt out by DeepSpeed itself when training begins.
    """
    asked = deepspeed_integration._hf_deepspeed_config_weak_ref  # transformers has no public name for it
    config = None if asked is None else asked()
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed_integration.set_hf_deepspeed_config(config)


def load_config(name: str) -> PreTrainedConfig:
    """The configuration alone, without weights.

    Raises:
        ModelError: as `load`.
    """
    source, local = locate(name)
    try:
        return AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_explain(name, error)) from error


def locate(name: str) -> tuple[str, bool]:
    """Where to load from, and whether only from this machine: a folder, or a Hub id after one question to the Hub.

    Raises:
        ModelError: neither; what looks like a path never becomes a download.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ModelError(f"no model in {name!r}: expected a folder with config.json, weights and tokenizer files")
        return str(folder), True
    if HUB_ID.fullmatch(name) is None or name.startswith(".") or (len(folder.parts) > 1 and folder.parent.exists()):
        raise ModelError(f"no folder {name!r}; give a local model folder, a Hub id such as Qwen/Qwen3-0.6B, or testbed")
    return name, not on_hub(name)


def on_hub(name: str) -> bool:
    """Whether the Hub answers for this id; False if only the local cache can.

    Asked once and without the retries of a download, which would keep a person without a network waiting for minutes.

    Raises:
        ModelError: the Hub knows no such model, or neither Hub nor cache can be asked.
    """
    try:
        HfApi().model_info(name, timeout=10)
    except GatedRepoError:
        return True
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {name!r} here and no such model on the Hub, or it is private; check the name, or log "
            "in with `hf auth login`"
        ) from error
    except Exception as error:  # every HTTP library has its own tree of errors
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        raise ModelError(
            f"there is no folder {name!r} here, and the Hub cannot be reached ({type(error).__name__}); give a local "
            "folder or check the network"
        ) from error
    return True


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
        found = (
            "only the CPU" if accelerator is None else f"cpu and {torch.accelerator.device_count()} {accelerator.type}"
        )
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
        return (
            f"model {name!r} needs code of its own, which learnevict does not run; use a model that transformers knows"
        )
    if "gated" in str(error).lower():
        return f"model {name!r} is gated: ask for access on its page, then log in with `hf auth login`"
    return f"cannot load model {name!r}: {said}"


def damage(source: str, error: Exception) -> str:
    """Which file of weights is damaged, and what to do about it; `source` is a folder or a Hub id."""
    broken = next((path for path in sorted(Path(source).glob("*.safetensors")) if not _opens(path)), None)
    if broken is not None:
        return f"{str(broken)!r} is damaged or cut short ({error}); copy or download it again"
    return (
        f"a weight file of {source!r} is damaged or cut short ({error}); remove it from the cache (`hf cache rm "
        f"model/{source}`) and download it again"
    )


def _opens(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def quiet(*, bars: bool) -> None:
    """Only errors from transformers; progress bars on request. For programs whose own lines should be readable."""
    transformers_logging.set_verbosity_error()
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
