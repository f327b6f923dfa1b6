"""Gates from weights that the authors of a method published, in the formats of their own code.

A method file knows the names of its authors' tensors (`PUBLISHED`) and what ours are made of (`convert`). Published are
safetensors (KVzap: nvidia/KVzap-*) and pickles (Fast KVzip: Jang-Hyun/Fast-KVzip/*/*.pt; TRIM-KV and DBTrimKV:
ngocbh/*/trimkv_weights.pth). A pickle is read with torch's `weights_only`, which makes tensors and plain data but runs nothing,
and only if the user allows it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from learnevict import methods
from learnevict.errors import GateError, TrainedOtherwiseWarning
from learnevict.hub.gates import Gates, name_of

PICKLES = (".pt", ".pth", ".bin")
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
ARRAYS: list[Any] = [
    np.ndarray, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType,
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"), (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
]  # fmt: skip
"""What a pickle may hold beside tensors: arrays of numbers, as Fast KVzip keeps its losses in."""


def import_gates(source: str | Path, base: PreTrainedModel, *, allow_pickle: bool = False) -> Gates:
    """Make gates for a base model from published weights; values are taken over exactly, in float32.

    Args:
        source: a file of weights, or a folder with one, and with the authors' config.json if there is one.
        base: the model that the weights were trained on.
        allow_pickle: read .pt, .pth and .bin.

    Raises:
        GateError: no weights, a pickle that was not allowed or holds other things, no method's tensors, or another model's.

    Warns:
        TrainedOtherwiseWarning: the authors' config names another base model.
    """
    file = weight_file(Path(source).expanduser())
    weights = read_weights(file, allow_pickle=allow_pickle)
    config = read_config(file.with_name("config.json"))
    trained_on = str(config.get("base_model") or "")
    if trained_on and trained_on.rpartition("/")[2] != name_of(base).rpartition("/")[2]:
        warnings.warn(
            f"{str(file)!r} was trained on {trained_on!r}, and is imported for {name_of(base)!r}",
            TrainedOtherwiseWarning,
            stacklevel=2,
        )
    name, module, layers = recognised(weights, file)
    text = base.config.get_text_config(decoder=True)
    activation = config.get("text_config", config).get("hidden_act") or getattr(text, "hidden_act", "")
    settings, state = module.convert(layers, activation)
    gates = Gates.make(name, base, **settings)
    fill(gates.gate, state, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    gates.config.training = {"program": "learnevict import", "weights": file.name, "sha256": digest}
    return gates


def weight_file(source: Path) -> Path:
    """The file itself, or the only one of weights in a folder.

    Raises:
        GateError: there is none, or there are several.
    """
    if source.is_file():
        return source
    found = sorted(path for path in source.glob("*") if path.suffix in (".safetensors", *PICKLES) and path.is_file())
    if len(found) == 1:
        return found[0]
    had = f"{len(found)} files of weights ({', '.join(path.name for path in found[:3])})" if found else "no weights"
    raise GateError(
        f"{had} in {str(source)!r}: give one .safetensors, .pt or .pth file, or a folder with one; from the Hub, download it "
        "first: hf download USER/REPO --local-dir FOLDER"
    )


def read_weights(file: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Tensors by name; those of a list under "module" get the number of the layer in front.

    Raises:
        GateError: no tensors, or a pickle that was not allowed.
    """
    safe = file.suffix == ".safetensors"
    if not safe and not allow_pickle:
        raise GateError(
            f"{str(file)!r} is a pickle, and pickles can run code; if you trust who made it, allow reading its tensors "
            "with --allow-pickle (allow_pickle=True)"
        )
    try:
        if safe:
            return load_file(file)
        with torch.serialization.safe_globals(ARRAYS):
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's file may break its reader anywhere
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise GateError(f"cannot read tensors from {str(file)!r}: {said[0]}; download it again") from error
    found = found.get("module", found) if isinstance(found, Mapping) else found
    if isinstance(found, list) and all(isinstance(layer, Mapping) for layer in found):
        found = {f"{i}.{name}": part for i, layer in enumerate(found) for name, part in layer.items()}
    if not isinstance(found, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
    ):
        raise GateError(f"{str(file)!r} holds something else than named tensors; give the file of published weights")
    return dict(found)


def read_config(path: Path) -> dict[str, Any]:
    """The authors' config.json; empty if there is none.

    Raises:
        GateError: it is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise GateError(f"{str(path)!r} is no JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise GateError(f"{str(path)!r} is no JSON object; download it again")
    return found


def recognised(weights: Mapping[str, Tensor], file: Path) -> tuple[str, ModuleType, list[dict[str, Tensor]]]:
    """The method whose authors name their tensors so: its name, its module, and tensors by name for every layer.

    Raises:
        GateError: there is none, or layers are missing.
    """
    known = {name: module for name in methods.METHODS if "PUBLISHED" in vars(module := methods.load(name))}
    for name, module in known.items():
        found = [module.PUBLISHED.fullmatch(tensor) for tensor in weights]
        if found and all(found):
            layers: dict[int, dict[str, Tensor]] = {}
            for match, tensor in zip(found, weights.values(), strict=True):
                layers.setdefault(int(match[1]), {})[match[2]] = tensor.float()
            same = {frozenset(layer) for layer in layers.values()}
            if len(same) > 1 or sorted(layers) != list(range(len(layers))):
                raise GateError(f"{str(file)!r} lacks tensors of some of its layers; download it again")
            return name, module, [layers[number] for number in range(len(layers))]
    raise GateError(
        f"{str(file)!r} holds the published weights of no method known here ({', '.join(known)}); its first tensors are "
        f"{', '.join(sorted(weights)[:3]) or 'none'}"
    )


def fill(gate: torch.nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Put converted weights into a gate.

    Raises:
        GateError: shapes that are another model's.
    """
    own = gate.state_dict()
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            raise GateError(
                f"{str(file)!r} was made for another model: {name} would be {list(tensor.shape)}, but this model needs "
                f"{list(own[name].shape)}; give --model the one it was trained on"
            )
    gate.load_state_dict(dict(state))
