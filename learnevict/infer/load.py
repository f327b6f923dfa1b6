"""Models by name: a local folder, or a Hub id because the user asked for one. A model's own code is never run."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from learnevict.errors import LearnevictError, ModelError, UsageError
from learnevict.infer.model.catalogue import folder_of_model
from learnevict.infer.model.weights import check_values, check_weights, damage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ANSWER = 60.0
"""Seconds in which the Hub has to answer a question; files have the time of their size on top."""
Answer = TypeVar("Answer")
INDEX = "model.safetensors.index.json"
PICKLED = (
    "cannot load model {0!r}: {1} is not safetensors, and pickles can run code; convert it with save_pretrained, or pass "
    "--allow-pickle (allow_pickle=True) if you trust it"
)


def load(
    name: str, *, device: str = "auto", dtype: str = "auto", allow_pickle: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Returns a causal language model in eval mode and its tokenizer.

    Args:
        name: a folder that `save_pretrained` wrote, or a Hub id (downloaded, or taken from the local cache).
        device: auto, cpu, cuda, cuda:1, mps, ...
        dtype: auto (as stored), fp32, bf16 or fp16.
        allow_pickle: read weights that are pickles (.bin) too; otherwise safetensors only.

    Raises:
        ModelError: nothing there that transformers can load without the author's code, pickles that were not allowed, or
            weights that are not those of the model in config.json, or not finite.
        UsageError: no such device or dtype on this machine.
    """
    where, kind = pick_device(device), pick_dtype(dtype)
    source, local = locate(name)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        if not allow_pickle:
            refuse_pickles(name, source, local, config)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        with whole_weights():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=kind, local_files_only=local, trust_remote_code=False, output_loading_info=True,
                use_safetensors=None if allow_pickle else True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except SafetensorError as error:
        raise ModelError(f"cannot load model {name!r}: {damage(source, error)}") from error
    except LearnevictError:
        raise
    except Exception as error:  # a stranger's files may break transformers anywhere
        raise ModelError(_explain(name, error)) from error
    model, found = loaded
    check_weights(name, model, found)
    check_values(name, model)
    return model.to(where).eval(), tokenizer


def refuse_pickles(name: str, source: str, local: bool, config: PreTrainedConfig) -> None:
    """Raises a ModelError for pickles that a config, an index or an adapter names: transformers would read those anyway."""

    def find(file: str) -> str | None:
        return cached_file(source, file, local_files_only=local, _raise_exceptions_for_missing_entries=False)

    files: list[str] = []
    index = getattr(config, "transformers_weights", None) or INDEX
    if index.endswith(".json") and (found := find(index)) is not None:
        files += sorted(set(json.loads(Path(found).read_text(encoding="utf-8")).get("weight_map", {}).values()))
    if find("adapter_config.json") is not None and find("adapter_model.safetensors") is None:
        files.append("adapter_model.bin")
    if pickled := next((file for file in files if not file.endswith(".safetensors")), None):
        raise ModelError(PICKLED.format(name, pickled))


@contextmanager
def whole_weights() -> Generator[None]:
    """Lets `from_pretrained` load whole weights in every process inside, also under ZeRO-3.

    transformers would deal them out. The base is not trained, and gates are dealt out by DeepSpeed when training begins.
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
    """Returns the configuration alone; a ModelError as from `load`."""
    source, local = locate(name)
    try:
        return AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_explain(name, error)) from error


def load_tokenizer(name: str) -> Any:
    """Returns the tokenizer alone; a ModelError as from `load`."""
    source, local = locate(name)
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_explain(name, error)) from error


def locate(name: str) -> tuple[str, bool]:
    """Returns where to load from, and whether only from this machine.

    It is a folder, that of a model that `learnevict model get` brought, or a Hub id after one question to the Hub.

    Raises:
        ModelError: neither; what looks like a path never becomes a download.
    """
    folder = folder_of_model(name)
    if folder is not None:
        return str(folder), True
    return name, not on_hub(name)


def on_hub(name: str) -> bool:
    """Returns whether the Hub answers for this id; False if only the local cache can. Asked once, without a download's retries.

    Raises:
        ModelError: the Hub knows no such model, or neither Hub nor cache can be asked.
    """
    try:
        answer_of(HfApi().model_info, name, timeout=10)
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


def answer_of(call: Callable[..., Answer], *arguments: object, within: float = ANSWER, **options: object) -> Answer:
    """Returns what a call returns within so many seconds, else a TimeoutError: those of HTTP count from byte to byte."""
    done: Future[Answer] = Future()

    def work() -> None:
        try:
            done.set_result(call(*arguments, **options))
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
            done.set_exception(error)

    Thread(target=work, daemon=True).start()  # no executor, which would be waited for when the program ends
    if not wait([done], within).done:
        raise TimeoutError(f"no whole answer within {within:.0f} s")
    return done.result()


def pick_device(name: str) -> torch.device:
    """Returns the device of this name; auto is the first accelerator, else the CPU. A UsageError if it is not here."""
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
    """Returns the torch dtype of this name; auto stays "auto"."""
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES.get(name, name)


def _explain(name: str, error: Exception) -> str:
    """Returns one line: what transformers said, and what to do about it."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error):
        return (
            f"model {name!r} needs code of its own, which learnevict does not run; use a model that transformers knows"
        )
    if "named model.safetensors" in said:
        return PICKLED.format(name, "its weights file, if there is one,")
    if "Weights only load failed" in said:  # torch goes on to advise what would run code
        return (
            f"cannot load model {name!r}: its pickle is damaged or holds more than tensors; convert it to safetensors"
        )
    if "gated" in str(error).lower():
        return f"model {name!r} is gated: ask for access on its page, then log in with `hf auth login`"
    return f"cannot load model {name!r}: {said}"


def quiet(*, bars: bool) -> None:
    """Lets transformers write errors only, and progress bars on request."""
    transformers_logging.set_verbosity_error()
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
