"""learnevict oracle: golden labels of texts, kept for training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

import learnevict.cli.options as o
from learnevict.cli.output import progress, say, tell

TEXTS = "What to label"


def run(
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the labels; what is in it is kept.", rich_help_panel=o.OUTPUT)
    ] = Path("runs/labels"),
    data: Annotated[
        str,
        typer.Option(
            help="testbed, a .txt, .jsonl or .parquet file, a folder of them, or a dataset of the Hub (downloaded "
            "because you ask for it).",
            rich_help_panel=TEXTS,
        ),
    ] = "testbed",
    data_config: Annotated[str | None, typer.Option(help="Of a dataset.", rich_help_panel=TEXTS)] = None,
    data_split: Annotated[str, typer.Option(help="Of a dataset.", rich_help_panel=TEXTS)] = "train",
    column: Annotated[
        str | None,
        typer.Option(
            help="Where the text or the chat is. [dim]text, messages, or prompt and completion[/dim]",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    families: Annotated[
        str, typer.Option(help="Of the testbed, comma-separated. [dim]all[/dim]", rich_help_panel=TEXTS)
    ] = "",
    documents: Annotated[int, typer.Option(min=1, help="Texts at most.", rich_help_panel=TEXTS)] = 2000,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text at most.", rich_help_panel=TEXTS)] = 4096,
    packed: Annotated[
        bool,
        typer.Option("--packed", help="Join texts and cut them into pieces of that length.", rich_help_panel=TEXTS),
    ] = False,
    block: Annotated[
        int,
        typer.Option(
            min=1,
            help="Queries per label block: the event period of the policies to be trained.",
            rich_help_panel=TEXTS,
        ),
    ] = 16,
    model: o.ModelOptions,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.", rich_help_panel=o.MACHINE)] = 16,
    per_shard: Annotated[int, typer.Option(min=1, help="Texts in a file.", rich_help_panel=o.OUTPUT)] = 200,
    as_json: o.AsJson = False,
) -> None:
    """Label texts with golden attention: how much each block of later tokens attends to each token.

    Examples:

        learnevict oracle --out runs/labels

        learnevict oracle --model Qwen/Qwen3-0.6B --data texts.jsonl --block 128 --out runs/labels

    The labels are what `learnevict train METHOD --labels` learns from: Parquet files that datasets can load. Interrupted,
    the same command goes on. Over several processes: torchrun --nproc-per-node 2 recipes/oracle.py.
    """
    from learnevict.cli.opened_model import open_model
    from learnevict.data.labelling import Labelling, fill_store
    from learnevict.data.opening import families_of, read_source
    from learnevict.data.sources import Source

    opened = open_model(model)
    source = Source(data, data_config, data_split, column, max_length, packed)
    found = read_source(source, opened.tokenizer, documents, families=families_of(families))
    labelling = Labelling(Path(data).name, block, batch_size, per_shard, opened.tokenizer.pad_token_id or 0)
    say(f"{len(found)} texts, {sum(len(one.input_ids) for one in found)} tokens")

    def watch(shards: Sequence[int]) -> Iterator[int]:
        with progress(len(shards)) as advance:
            for shard in shards:
                yield shard
                advance("shards", 1)

    done = fill_store(out, opened.model, found, labelling, config={"model": model.model, "source": source}, watch=watch)
    say(str(done))
    if as_json:
        tell(json.dumps({**vars(done), "folder": str(out)}))
    else:
        tell(f"labels in {out}")
