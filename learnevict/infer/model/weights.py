"""Whether weights are those of the model or gate that they are read into: none missing, none left over, all of them numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.errors import GateError, ModelError, UnusedWeightsWarning


def check_weights(name: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Compares the tensors of a checkpoint with those of the model, by what `output_loading_info=True` returns.

    Raises:
        ModelError: tensors are missing (transformers makes random ones), of another shape, or left over in modules that the
            model has; those of other parts, such as a head for another task, are named in an UnusedWeightsWarning.
    """
    wrong = {
        "missing": set(found["missing_keys"]),
        "of another shape": {f"{key} {tuple(have)}, not {tuple(want)}" for key, have, want in found["mismatched_keys"]},
    }
    parts = {_shape_of(key) for key in model.state_dict()} | {_shape_of(key) for key, _ in model.named_modules() if key}
    unused = set(found["unexpected_keys"])
    named = {key: (key, f"{model.base_model_prefix}.{key}") for key in unused}
    wrong["left over"] = {
        key
        for key in unused
        if any(_shape_of(part) in parts for one in named[key] for part in (one, one.rpartition(".")[0]))
    }
    said = [f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])})" for kind, keys in wrong.items() if keys]
    if said:
        raise ModelError(
            f"the weights of {name!r} are not those of the {type(model).__name__} in its config.json: {'; '.join(said)}; "
            "copy or download both again"
        )
    if unused:
        warnings.warn(
            f"{len(unused)} tensors of {name!r} belong to parts that {type(model).__name__} lacks and are not used: "
            f"{', '.join(sorted(unused)[:3])}",
            UnusedWeightsWarning,
            stacklevel=3,
        )


def check_values(name: str, model: PreTrainedModel) -> None:
    """Raises a ModelError that names the weights with NaN or infinity: what a broken or interrupted training has left.

    Every weight is read once, which takes far less than loading it: 20 ms for 135M weights, 1 s for 8B, on one core.
    """
    wrong = [key for key, weight in model.named_parameters() if not is_finite(weight)]
    if wrong:
        raise ModelError(
            f"{len(wrong)} weights of {name!r}, read as {str(model.dtype).removeprefix('torch.')}, hold NaN or infinity "
            f"({', '.join(wrong[:3])}{', ...' * (len(wrong) > 3)}), so every answer would be noise; copy or download it again, "
            "take an earlier checkpoint, or give a wider --dtype if that is float16"
        )


def is_finite(tensor: Tensor) -> bool:
    """Returns whether a tensor holds no NaN and no infinity; without the mask that isfinite() would make, 30 times as fast.

    Of integers and of float8 nothing is said but yes.
    """
    if not tensor.is_floating_point() or tensor.element_size() == 1 or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def _shape_of(key: str) -> str:
    """Returns a tensor's or module's name with N for the numbers of layers and experts."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", key)


def check_finite(weights: Mapping[str, Tensor], whose: str, remedy: str) -> None:
    """Raises a GateError that names the first tensor with NaN or infinity."""
    for name, tensor in weights.items():
        if not is_finite(tensor):
            raise GateError(f"{name} of {whose} holds NaN or infinity; {remedy}")


def damage(source: str, error: Exception) -> str:
    """Returns which file of weights is damaged, and what to do about it; `source` is a folder or a Hub id."""
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:  # noqa: PERF203
            return f"{str(path)!r} is damaged or cut short ({error}); copy or download it again"
    return (
        f"a weight file of {source!r} is damaged or cut short ({error}); remove it from the cache (`hf cache rm "
        f"model/{source}`) and download it again"
    )
