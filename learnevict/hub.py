"""Gates as artefacts: config.json + model.safetensors, loadable by name, tied to the base model they were trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from learnevict import methods
from learnevict.config import Base, Budget, Layout
from learnevict.errors import GateError
from learnevict.infer.identity import check_base, layout_of, weight_hash
from learnevict.infer.load import damage
from learnevict.policy import Gate, Policy

Answer = TypeVar("Answer")
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

    def forward(self, task: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        """task(gate, ...): what trainers call, so that DDP and ZeRO see the parameters used."""
        return self.gate(task, *args, **kwargs)

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
        gates = cls(GatesConfig(method, layout, settings, weight_hash(base), Path(name).name))
        gates.config.settings = gates.gate.settings() or settings
        return gates

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
        except SafetensorError as error:
            raise GateError(f"cannot load gates from {str(source)!r}: {damage(str(source), error)}") from error
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
        check_base(self.base(allow_other=allow_other_base), base)

    def base(self, *, allow_other: bool = False) -> Base:
        """The model these gates belong to."""
        config = self.config
        return Base(Layout(**config.layout), config.base_hash, config.base_name, allow_other)

    def policy(self, budget: int | str | Budget, *, allow_other_base: bool = False, **options: Any) -> Policy:
        """The policy that these gates score for; options as in the method's `policy`.

        `attach` compares the model with the one the gates were trained on, unless `allow_other_base`.
        """
        policy = methods.load(self.config.method).policy(budget, gate=self.gate.eval(), **options)
        return replace(policy, base=self.base(allow_other=allow_other_base))

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.config.method


AutoConfig.register(GatesConfig.model_type, GatesConfig, exist_ok=True)
AutoModel.register(GatesConfig, Gates, exist_ok=True)
