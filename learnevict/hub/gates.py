"""Gates as artefacts: config.json + model.safetensors, loadable by name, tied to the base model they were trained on.

They come from other people, so they are data and nothing else: a config names a method but imports none (methods.known), and
chooses no code and no other file of weights; weights are read from safetensors only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from learnevict import methods
from learnevict.config import AnyBudget, Base, Layout
from learnevict.errors import GateError, LearnevictError, UsageError
from learnevict.files import is_ours, writing
from learnevict.hub.download import CONFIG, MODEL_TYPE, WEIGHTS, fetch
from learnevict.hub.repo import Address
from learnevict.infer.load import whole_weights
from learnevict.infer.model.catalogue import HUB_ID, folder_of_gates
from learnevict.infer.model.supported import check_base, layout_of, weight_hash
from learnevict.infer.model.weights import check_finite, damage
from learnevict.policy import Gate, Policy

Answer = TypeVar("Answer")
PACKAGE = Path(__file__).parent.parent
TESTBED = "testbed"
NOT_FOR_FETCHING = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder")
"""Options of transformers' download, which gates do not take."""


NOT_FOR_GATES = (
    "attn_implementation", "experts_implementation", "quantization_config", "fusion_config", "auto_map",
    "transformers_weights",
)  # fmt: skip
"""What a config.json may say to transformers about code to run and files to load; that of gates may not."""


class GatesConfig(PreTrainedConfig):
    """What a gate is and which base model it belongs to: the config.json of gates.

    Args:
        method: a name of learnevict.methods, or the import path of a module that is imported already.
        layout: fields of learnevict.config.Layout.
        settings: what the method's `build` needs besides the layout.
        base_hash: fingerprint of the base model's weights (`weight_hash`).
        base_name, base_revision: where the base came from; only shown.
        training: record of the run that made it.
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


class Gates(PreTrainedModel):
    """The trained part of a learned method, and nothing of the base model."""

    config_class = GatesConfig
    base_model_prefix = "gates"

    def __init__(self, config: GatesConfig) -> None:
        super().__init__(config)
        self.gate: Gate = methods.known(config.method).build(Layout(**config.layout), **config.settings)
        self.post_init()

    def forward(self, task: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        """Returns task(gate, ...); trainers call it, so that DDP and ZeRO see the parameters used."""
        return self.gate(task, *args, **kwargs)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Gates initialise themselves."""

    @classmethod
    def make(cls, method: str, base: PreTrainedModel, **settings: Any) -> Gates:
        """Returns fresh gates of a method for a base model; a GateError if the method has none."""
        if "build" not in vars(methods.load(method)):
            raise GateError(f"method {method!r} has no gate to train; learned methods have `build`")
        config = GatesConfig(
            method, asdict(layout_of(base.config)), settings, weight_hash(base), name_of(base),
            base_revision=getattr(base.config, "_commit_hash", None) or "",
        )  # fmt: skip
        gates = cls(config)
        gates.config.settings = gates.gate.settings() or settings
        return gates

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any
    ) -> Any:
        """Reads gates as any model of transformers (AutoModel ends here too), but from model.safetensors and nothing else.

        A Hub id is fetched as in `load`, which has the same errors.

        Raises:
            UsageError: use_safetensors=False, or a Hub id with an option of transformers' own download.
        """
        source = pretrained_model_name_or_path
        if options.pop("use_safetensors", None) is False:
            raise UsageError("gates are read from safetensors only: pickles can run code; drop use_safetensors=False")
        if source is not None and not Path(source).is_dir():
            if given := [name for name in NOT_FOR_FETCHING if options.get(name)]:
                raise UsageError(
                    f"gates are fetched without {', '.join(given)}; drop it, and set HF_HUB_CACHE or HF_HUB_OFFLINE instead"
                )
            source = str(folder_of(source, options.pop("revision", None), options.pop("token", None)))
        if source is not None and not (Path(source) / (options.get("subfolder") or "") / WEIGHTS).is_file():
            raise GateError(
                f"{str(source)!r} does not hold gates: there is no {WEIGHTS} in it, and nothing else is read, for pickles "
                "can run code; save gates with save_pretrained"
            )
        wants_info = options.pop("output_loading_info", False)
        options |= {"use_safetensors": True, "output_loading_info": True}
        loaded: Any = super().from_pretrained(source, *arguments, **options)
        gates, found = loaded
        wrong = [f"{kind}: {', '.join(sorted(map(str, names))[:3])}" for kind, names in found.items() if names]
        if wrong:
            raise GateError(
                f"the weights in {str(source)!r} are not those of a {gates.method} gate ({'; '.join(wrong)}); save "
                "them with save_pretrained, or download them again"
            )
        check_finite(gates.state_dict(), f"the gates in {str(source)!r}", "train them again, or download them again")
        return loaded if wants_info else gates

    @classmethod
    def load(
        cls,
        source: str | Path,
        base: PreTrainedModel | None = None,
        *,
        revision: str | None = None,
        allow_other_base: bool = False,
    ) -> Gates:
        """Returns gates from a folder or the Hub, checked against the base model they are going to serve.

        Args:
            source: a folder, the name of gates that ship with the package, "user/repo" or "user/repo@revision".
            base: the model; None: whichever, `attach` checks it.
            revision: branch, tag or commit on the Hub.
            allow_other_base: accept gates trained on other weights of the same shape.

        Raises:
            GateError: no gates there, incomplete or not finite ones, made for another base model, or of a method of their
                owner's that is not imported.
            HubError: no such repository or revision, no access, or no network.
            UsageError: a revision of a folder.
        """
        folder = folder_of(source, revision)
        try:
            with whole_weights():
                gates: Gates = cls.from_pretrained(str(folder))
        except LearnevictError:
            raise
        except SafetensorError as error:
            raise GateError(f"cannot load gates from {str(source)!r}: {damage(str(folder), error)}") from error
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise GateError(f"{str(source)!r} does not hold gates: {str(error).splitlines()[0]}") from error
        if base is not None:
            gates.check(base, allow_other_base=allow_other_base)
        return gates

    def check(self, base: PreTrainedModel, *, allow_other_base: bool = False) -> None:
        """Raises a GateError if the base model has another shape, or other weights (unless allowed)."""
        check_base(self.base(allow_other=allow_other_base), base)

    def base(self, *, allow_other: bool = False) -> Base:
        """Returns the model these gates belong to."""
        config = self.config
        return Base(Layout(**config.layout), config.base_hash, config.base_name, allow_other)

    def policy(self, budget: AnyBudget, *, allow_other_base: bool = False, **options: Any) -> Policy:
        """Returns the policy that these gates score for; options as in the method's `policy`.

        `attach` compares the model with the one the gates were trained on, unless `allow_other_base`.
        """
        policy = methods.known(self.config.method).policy(budget, gate=self.gate.eval(), **options)
        return replace(policy, base=self.base(allow_other=allow_other_base))

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: Any, *, push_to_hub: bool = False, **options: Any
    ) -> None:
        """Writes config.json and model.safetensors, each whole or not at all; a GateError for NaN, or over another model."""
        state = options.get("state_dict") or self.state_dict()
        check_finite(state, "these gates", "train with a lower --learning_rate")
        if push_to_hub:
            raise UsageError(
                "save_pretrained does not share gates; call push_to_hub, or `learnevict push` on the folder"
            )
        folder = Path(save_directory)
        config, weights = folder / CONFIG, folder / WEIGHTS
        if not is_ours(config, MODEL_TYPE.encode()) if config.exists() else weights.exists():
            raise GateError(f"{str(folder)!r} holds another model, which gates would replace; choose another folder")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder, prefix=".saving-") as fresh:
                super().save_pretrained(fresh, **options)
                for path in sorted(Path(fresh).iterdir()):
                    os.replace(path, folder / path.name)

    def push_to_hub(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        repo_id: str,
        *,
        rows: Sequence[Mapping[str, Any]] = (),
        commit_message: str | None = None,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Shares these gates as `learnevict push` does from a folder, and returns the commit's address."""
        from learnevict.hub.share import push_folder

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            pushed = push_folder(
                folder, repo_id, private=private, revision=revision, message=commit_message, rows=rows, token=token
            )
        return pushed.url

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.config.method


def folder_of(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Returns the folder of gates; those of the Hub are fetched first. Errors as in `locate` and `fetch`."""
    place = locate(source, revision)
    return place if isinstance(place, Path) else fetch(place, token).folder


def locate(source: str | Path, revision: str | None = None) -> Path | Address:
    """Returns where gates are, a folder or an address on the Hub; what looks like a path never becomes a download."""
    text = str(source)
    folder = folder_of_gates(text)
    if folder is None:
        return Address.parse(text, revision)
    if revision is not None:
        raise UsageError(f"{text!r} is a folder and has no revision {revision!r}; drop it, or give a Hub id")
    return folder


def name_of(base: PreTrainedModel) -> str:
    """Returns what to call a base model: its Hub id, testbed, the name of its folder, or its type; never a path."""
    name = str(getattr(base, "name_or_path", "") or base.config.model_type)
    folder = Path(name)
    if folder.is_dir():
        return TESTBED if folder.resolve() == (PACKAGE / TESTBED / "data").resolve() else folder.resolve().name
    return name if HUB_ID.fullmatch(name) else folder.name


AutoConfig.register(GatesConfig.model_type, GatesConfig, exist_ok=True)
AutoModel.register(GatesConfig, Gates, exist_ok=True)
