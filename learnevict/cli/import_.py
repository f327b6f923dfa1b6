"""learnevict import: gates from weights that the authors of a method published."""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

import learnevict.cli.options as o
from learnevict.cli.output import say, tell
from learnevict.errors import UsageError


def run(
    weights: Annotated[
        str, typer.Argument(metavar="WEIGHTS", help="A file of published weights, or a folder that holds one.")
    ],
    model: o.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder: new or empty.", rich_help_panel=o.OUTPUT)],
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read weights that are pickles (.pt, .pth, .bin), of gates and model. Only if you trust who made them.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=o.MACHINE)] = "cpu",
    dtype: o.Dtype = o.Precision.auto,
) -> None:
    """Make gates from weights that the authors of KVzap, Fast KVzip, TRIM-KV or DBTrimKV published.

    Examples:

        hf download nvidia/KVzap-mlp-Qwen3-8B --local-dir KVzap-mlp-Qwen3-8B

        learnevict import KVzap-mlp-Qwen3-8B --model Qwen/Qwen3-8B --out gates

        learnevict import q4_dim16_sink16.pt --model Qwen/Qwen3-8B --out gates --allow-pickle

    `infer --ckpt gates` then opens them. The method is known by the names of the tensors, whose values are taken over exactly.
    --model is the model that they were trained on: its shape is checked, and its weights are what the gates belong to from
    then on. Pickles are read once, tensors only, and the result is safetensors.
    """
    from learnevict.cli.opened_model import open_model
    from learnevict.hub import write_card
    from learnevict.hub.published import import_gates

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{str(out)!r} exists already, and nothing is replaced; choose another --out")
    opened = open_model(o.ModelOptions(model, device, dtype, allow_pickle))
    gates = import_gates(weights, opened.model, allow_pickle=allow_pickle)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".import-") as draft:
        folder = Path(draft) / "gates"
        gates.save_pretrained(folder)
        write_card(folder, f"user/{re.sub(r'[^A-Za-z0-9_.-]+', '-', out.resolve().name).strip('-.') or 'gates'}")
        os.replace(folder, out)
    say(f"{gates.method}, {gates.num_parameters():,} parameters, for {gates.config.base_name}")
    tell(str(out))
