"""The config.json of gates."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from learnevict.hub.download import MODEL_TYPE

NOT_FOR_GATES = (
    "attn_implementation", "experts_implementation", "quantization_config", "fusion_config", "auto_map",
    "transformers_weights",
)  # fmt: skip
"""What a config.json may say to transformers about code to run and files to load; that of gates may not."""


class GatesConfig(PreTrainedConfig):
    """What a gate is and which base model it belongs to.

    Args:
        method: a name of learnevict.methods, or the import path of a module that is imported already.
        layout: fields of learnevict.config.Layout.
        settings: what the method's `build` needs besides the layout.
        base_hash: fingerprint of the base model's weights (`weight_hash`).
        base_name: where the base came from; only shown.
        training: record of the run that made it.
        base_revision: commit of the base on the Hub, empty if it did not come from there; only shown.
    """

    model_type = MODEL_TYPE

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
        self.base_revision = kwargs.pop("base_revision", "")
        self.training = training or {}
        for name in NOT_FOR_GATES:
            kwargs.pop(name, None)
        self.hidden_size = self.layout.get("hidden_size", 0)  # DeepSpeed's "auto" buckets read this name
        super().__init__(**kwargs)
