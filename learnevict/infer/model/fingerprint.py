"""What makes a base model the one a gate was trained for: the shape of its cache, and its weights."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from learnevict.config import Base, Layout
from learnevict.errors import GateError
from learnevict.infer.model.modules import attention_modules, device_of
from learnevict.infer.model.supported import state_shape
from learnevict.policy import Scorer


def check_base(base: Base, model: PreTrainedModel) -> None:
    """Compare what a gate was trained for with the model it is to serve.

    Raises:
        GateError: other shape (always), or other weights (unless allowed).
    """
    have, want = asdict(base.layout), asdict(layout_of(model.config))
    wrong = [f"{key} {have[key]} (the model has {want[key]})" for key in want if have[key] != want[key]]
    if wrong:
        raise GateError(f"these gates were made for another model: {', '.join(wrong)}; train gates for this one")
    if base.weights and not base.allow_other and base.weights != weight_hash(model):
        raise GateError(
            f"these gates were trained on other weights of the same shape ({base.name}); pass --allow-other-base "
            "(allow_other_base=True) if that is intended"
        )


def layout_of(config: PreTrainedConfig) -> Layout:
    """The cache shape of a model, from its config."""
    text = config.get_text_config(decoder=True)
    heads, width = state_shape(text)
    return Layout(
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_query_heads=text.num_attention_heads,
        head_dim=width,
        value_dim=width,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
    )


def device_for(scorer: Scorer, model: PreTrainedModel) -> torch.device:
    """Where the parameters of a scorer belong: where the model's attention computes.

    Raises:
        GateError: it has parameters, and layers of the model compute on several devices.
    """
    devices = sorted({str(device_of(module)) for module in attention_modules(model).values()})
    if len(devices) > 1 and type(scorer).to is not Scorer.to:
        raise GateError(
            f"the layers of this model compute on {' and '.join(devices)}, and gates rank all of them on one device; load the "
            "model on one, offload what does not fit (accelerate.cpu_offload), or use a method without gates"
        )
    return torch.device(devices[0])


def weight_hash(model: PreTrainedModel) -> str:
    """Fingerprint of a model's weights: sha256 over names, shapes and up to 256 evenly spaced values of every tensor.

    Values are taken in bfloat16, so that a model loaded in another precision keeps its fingerprint. Offloaded weights are
    brought in module by module.

    Raises:
        GateError: weights that have not been loaded (meta tensors).
    """
    digest, samples = hashlib.sha256(), []
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        samples.append(_sample(model, name, tensor))
    values = torch.cat(samples) if samples else torch.empty(0, dtype=torch.bfloat16)
    digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _sample(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Up to 256 evenly spaced values of a tensor of the state dict, bfloat16 [n] on the CPU, wherever its model keeps it."""
    if tensor.is_meta:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        with align_module_device(module):
            found = getattr(module, leaf)
            if found.is_meta:
                raise GateError(
                    f"the weights of this model have not been loaded ({name} is a meta tensor); load it with from_pretrained"
                )
            return _sample(model, name, found)
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // 256)][:256].to(torch.bfloat16).cpu()
