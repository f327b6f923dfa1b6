"""What makes a base model the one a gate was trained for: the shape of its cache, and its weights."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from learnevict.config import Base, Layout
from learnevict.errors import GateError


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
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Layout(
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_query_heads=text.num_attention_heads,
        head_dim=width,
        value_dim=width,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
    )


def weight_hash(model: PreTrainedModel) -> str:
    """Fingerprint of a model's weights: sha256 over names, shapes and up to 256 evenly spaced values of every tensor.

    Values are taken in bfloat16, so that a model loaded in another precision keeps its fingerprint.
    """
    digest, samples = hashlib.sha256(), []
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        samples.append(flat[:: max(1, flat.numel() // 256)][:256].to(torch.bfloat16))
    values = torch.cat(samples).cpu() if samples else torch.empty(0, dtype=torch.bfloat16)
    digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
