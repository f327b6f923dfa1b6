"""Gates as artefacts: config.json + model.safetensors, loadable by name, tied to the base model they were trained on."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from learnevict import methods
from learnevict.config import Budget, Layout
from learnevict.errors import GateError
from learnevict.policy import Gate, Policy

GATES_FOLDER = Path(__file__).parent / "gates"


class GatesConfig(PreTrainedConfig):
    """What a gate is and which base model it belongs to.

    Args:
        method: a name of learnevict.methods or an import path.
        layout: fields of learnevict.config.Layout.
        settings: what the method's `build` needs besides the layout.
        base_hash: fingerprint of the base model's weights (`weight_hash`).
        base_name: where the base came from; only shown.
        training: record of the run that made it.
    """

    model_type = "learnevict-gates"

    def __init__(
        self,
        method: str = "foresightkv",
        layout: dict[str, int] | None = None,
        settings: dict[str, Any] | None = None,
        base_hash: str = "",
        base_name: str = "",
        training: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.method = method
        self.layout = layout or {}
        self.settings = settings or {}
        self.base_hash = base_hash
        self.base_name = base_name
        self.training = training or {}
        self.hidden_size = self.layout.get("hidden_size", 0)  # DeepSpeed's "auto" buckets read this name
        super().__init__(**kwargs)


class Gates(PreTrainedModel):
    """The trained part of a learned method, and nothing of the base model."""

    config_class = GatesConfig
    base_model_prefix = "gates"

    def __init__(self, config: GatesConfig) -> None:
        super().__init__(config)
        self.gate: Gate = methods.load(config.method).build(Layout(**config.layout), **config.settings)
        self.post_init()

    def forward(self, features: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Scores of recorded states: {layer: [M, H, N, in]} -> {layer: [M, H, N]}; what trainers call."""
        return {layer: self.gate.judge(layer, part) for layer, part in features.items()}

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Gates initialise themselves."""

    @classmethod
    def make(cls, method: str, base: PreTrainedModel, **settings: Any) -> Gates:
        """Fresh gates of a method for a base model.

        Raises:
            GateError: the method has no gate.
        """
        if "build" not in vars(methods.load(method)):
            raise GateError(f"method {method!r} has no gate to train; learned methods have `build`")
        layout = asdict(layout_of(base.config))
        name = str(getattr(base, "name_or_path", "") or base.config.model_type)
        return cls(GatesConfig(method, layout, settings, weight_hash(base), Path(name).name))

    @classmethod
    def load(cls, source: str | Path, base: PreTrainedModel | None = None, *, allow_other_base: bool = False) -> Gates:
        """Gates from a folder or Hub id, checked against the base model they are going to serve.

        Raises:
            GateError: nothing there, not gates, or made for another base model.
        """
        folder = Path(source)
        if (folder.exists() or str(source).startswith((".", "/"))) and not (folder / "config.json").is_file():
            raise GateError(f"no gates in {str(source)!r}: expected a folder with config.json and model.safetensors")
        try:
            gates = cls.from_pretrained(str(source))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GateError(f"{str(source)!r} does not hold gates: {str(error).splitlines()[0]}") from error
        if base is not None:
            gates.check(base, allow_other_base=allow_other_base)
        return gates

    def check(self, base: PreTrainedModel, *, allow_other_base: bool = False) -> None:
        """Compare layout and weights with the base model.

        Raises:
            GateError: other shape (always), or other weights (unless allowed).
        """
        have, want = self.config.layout, asdict(layout_of(base.config))
        wrong = [f"{key} {have.get(key)} (the model has {want[key]})" for key in want if have.get(key) != want[key]]
        if wrong:
            raise GateError(f"these gates were made for another model: {', '.join(wrong)}; train gates for this one")
        if not allow_other_base and self.config.base_hash and self.config.base_hash != weight_hash(base):
            raise GateError(
                f"these gates were trained on other weights of the same shape ({self.config.base_name}); pass "
                "--allow-other-base (allow_other_base=True) if that is intended"
            )

    def policy(self, budget: int | str | Budget, **options: Any) -> Policy:
        """The policy that these gates score for; options as in the method's `policy`."""
        return methods.load(self.config.method).policy(budget, gate=self.gate.eval(), **options)

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.config.method


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
    """Fingerprint of a model's weights: sha256 over the names, shapes and bfloat16 bytes of up to 16 of its tensors."""
    digest = hashlib.sha256()
    state = sorted(model.state_dict().items())
    stride = max(1, len(state) // 16)
    for name, tensor in state[::stride]:
        sample = tensor.detach().flatten()[:4096].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


AutoConfig.register(GatesConfig.model_type, GatesConfig, exist_ok=True)
AutoModel.register(GatesConfig, Gates, exist_ok=True)
