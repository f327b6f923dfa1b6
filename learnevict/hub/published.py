"""Gates from weights that the authors of a method published, in the formats of their own code.

FORMATS says how each method's authors name their tensors and which of ours they become. Published are safetensors (KVzap:
nvidia/KVzap-*) and pickles (Fast KVzip: Jang-Hyun/Fast-KVzip/*/*.pt; TRIM-KV and DBTrimKV: ngocbh/*/trimkv_weights.pth). A
pickle is read with torch's `weights_only`, which makes tensors and plain data but runs nothing, and only if the user allows it.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.errors import GateError, TrainedOtherwiseWarning
from learnevict.hub.gates import Gates, name_of
from learnevict.parts.soft_gates import ACTIVATIONS

PICKLES = (".pt", ".pth", ".bin")
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
ARRAYS: list[Any] = [
    np.ndarray, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType,
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"), (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
]  # fmt: skip
"""What a pickle may hold beside tensors: arrays of numbers, as Fast KVzip keeps its losses in."""


@dataclass(frozen=True)
class PublishedFormat:
    """How the authors of a method name the tensors of one kind of its gates.

    Attributes:
        method: a name of learnevict.methods.
        pattern: what each name in the file matches; its groups are the layer and the name within it.
        names: our tensors and theirs, within a layer.
        finish: takes our tensors, stacked over layers, and the activation of the base model, and returns the settings of the
            gate and its tensors.
    """

    method: str
    pattern: str
    names: dict[str, str]
    finish: Callable[[dict[str, Tensor], str], tuple[dict[str, Any], dict[str, Tensor]]]


def _kvzap(state: dict[str, Tensor], _: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {"kind": "mlp", "hidden": state["bias_in"].shape[-1]} if "bias_in" in state else {"kind": "linear"}, state


def _fast_kvzip(state: dict[str, Tensor], _: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state |= {name: state[name].squeeze(2) for name in ("sinks", "bias")}  # [L, H, 1, ...]
    return {"rank": state["norm_query"].shape[-1], "num_sinks": state["sinks"].shape[2]}, state


def _trimkv(state: dict[str, Tensor], activation: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if activation not in ACTIVATIONS:
        raise GateError(
            f"activation {activation!r} of the base model is unknown here; known are {', '.join(ACTIVATIONS)}"
        )
    return {"hidden": state["bias_in"].shape[-1], "activation": activation}, state


def _dbtrimkv(state: dict[str, Tensor], activation: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    output = {name: state[name][:1] for name in ("weight_out", "bias_out")}
    shared = all(bool((state[name] == one).all()) for name, one in output.items())
    settings, state = _trimkv(state | output if shared else state, activation)
    return settings | {"shared_output": shared}, state


_KVZAP = r"(?:layers|module_list)\.(\d+)\.((?:[02]\.)?(?:weight|bias))"
_RETENTION = r"(?:.*\.)?layers\.(\d+)\.self_attn\.retention_gate\.(linear[123]\.(?:weight|bias)|bias)"
_FIRST = {"weight_in": "linear1.weight", "bias_in": "linear1.bias"}
FORMATS = (
    PublishedFormat("kvzap", _KVZAP, {"weight": "weight", "bias": "bias"}, _kvzap),
    PublishedFormat(
        "kvzap",
        _KVZAP,
        {"weight_in": "0.weight", "bias_in": "0.bias", "weight": "2.weight", "bias": "2.bias"},
        _kvzap,
    ),
    PublishedFormat(
        "fast_kvzip",
        r"(\d+)\.([qk]_proj\.weight|q_proj\.bias|[qk]_norm\.weight|k_base|b)",
        {
            "weight_query": "q_proj.weight", "bias_query": "q_proj.bias", "weight_key": "k_proj.weight",
            "norm_query": "q_norm.weight", "norm_key": "k_norm.weight", "sinks": "k_base", "bias": "b",
        },
        _fast_kvzip,
    ),
    PublishedFormat("trimkv", _RETENTION, _FIRST | {"weight_out": "linear2.weight", "bias_out": "bias"}, _trimkv),
    PublishedFormat(
        "dbtrimkv",
        _RETENTION,
        _FIRST
        | {"weight_mid": "linear2.weight", "bias_mid": "linear2.bias", "weight_out": "linear3.weight", "bias_out": "bias"},
        _dbtrimkv,
    ),
)  # fmt: skip


def import_gates(source: str | Path, base: PreTrainedModel, *, allow_pickle: bool = False) -> Gates:
    """Makes gates for a base model from published weights; values are taken over exactly, in float32.

    Args:
        source: a file of weights, or a folder with one, and with the authors' config.json if there is one; a
            TrainedOtherwiseWarning if that names another base model.
        base: the model that the weights were trained on.
        allow_pickle: read .pt, .pth and .bin.

    Raises:
        GateError: no weights, a pickle that was not allowed or holds other things, no method's tensors, or another model's.
    """
    file = weight_file(Path(source).expanduser())
    weights, notes = read_weights(file, allow_pickle=allow_pickle), file.with_name("config.json")
    try:
        config = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    except ValueError as error:
        raise GateError(f"{str(notes)!r} is no JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise GateError(f"{str(notes)!r} is no JSON object; download it again")
    trained_on = str(config.get("base_model") or "")
    if trained_on and trained_on.rpartition("/")[2] != name_of(base).rpartition("/")[2]:
        warnings.warn(
            f"{str(file)!r} was trained on {trained_on!r}, and is imported for {name_of(base)!r}",
            TrainedOtherwiseWarning,
            stacklevel=2,
        )
    kind, layers = recognised(weights, file)
    text = base.config.get_text_config(decoder=True)
    activation = config.get("text_config", config).get("hidden_act") or getattr(text, "hidden_act", "")
    settings, state = kind.finish({own: stacked(layers, theirs) for own, theirs in kind.names.items()}, activation)
    gates = Gates.make(kind.method, base, **settings)
    own = gates.gate.state_dict()
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            raise GateError(
                f"{str(file)!r} was made for another model: {name} would be {list(tensor.shape)}, but this model needs "
                f"{list(own[name].shape)}; give --model the one it was trained on"
            )
    gates.gate.load_state_dict(state)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    gates.config.training = {"program": "learnevict import", "weights": file.name, "sha256": digest}
    return gates


def weight_file(source: Path) -> Path:
    """Returns the file itself, or the only one of weights in a folder; else a GateError."""
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
    """Returns tensors by name; those of a list under "module" get the number of the layer in front."""
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
    except Exception as error:  # an unknown file may break its reader anywhere
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


def recognised(weights: Mapping[str, Tensor], file: Path) -> tuple[PublishedFormat, list[dict[str, Tensor]]]:
    """Returns the format of a file, and its tensors by name for every layer; a GateError for none, or missing tensors."""
    methods = sorted({kind.method for kind in FORMATS})
    for pattern in dict.fromkeys(kind.pattern for kind in FORMATS):
        found = [match for tensor in weights if (match := re.fullmatch(pattern, tensor))]
        if not found or len(found) < len(weights):
            continue
        layers: dict[int, dict[str, Tensor]] = {}
        for match, tensor in zip(found, weights.values(), strict=True):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor.float()
        names = {frozenset(layer) for layer in layers.values()}
        if len(names) > 1 or sorted(layers) != list(range(len(layers))):
            raise GateError(f"{str(file)!r} lacks tensors of some of its layers; download it again")
        known = [kind for kind in FORMATS if kind.pattern == pattern]
        for kind in known:
            if names == {frozenset(kind.names.values())}:
                return kind, [layers[number] for number in range(len(layers))]
        wanted = " or ".join(f"{kind.method} ({', '.join(kind.names.values())})" for kind in known)
        raise GateError(
            f"{str(file)!r} lacks tensors: its layers have {', '.join(sorted(layers[0]))}, but should be {wanted}; download it "
            "again"
        )
    raise GateError(
        f"{str(file)!r} holds the published weights of no method known here ({', '.join(methods)}); its first tensors are "
        f"{', '.join(sorted(weights)[:3]) or 'none'}"
    )


def stacked(layers: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """Returns a tensor of all layers [L, ...]; matrices of torch's Linear [out, in] are turned to [in, out]."""
    parts = [layer[name] for layer in layers]
    if len({part.shape for part in parts}) > 1:
        raise GateError(f"{name} has another shape in every layer: {', '.join(str(list(p.shape)) for p in parts[:3])}")
    return torch.stack([part.T.contiguous() if part.dim() == 2 else part for part in parts])
