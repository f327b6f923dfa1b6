"""learnevict oracle: golden labels of texts, kept for training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import learnevict.cli.options as o
from learnevict.cli.output import progress, say, tell

TEXTS = "What to label"


def run(
    *,
    out: Annotated[Path, o.option(o.OUTPUT, "Folder of the labels; what is in it is kept.", "--out", "-o")] = Path(
        "runs/labels"
    ),
    data: Annotated[
        str,
        o.option(
            TEXTS,
            "testbed, a .txt, .jsonl or .parquet file, a folder of them, or a dataset of the Hub (downloaded because you ask "
            "for it).",
        ),
    ] = "testbed",
    data_config: Annotated[str | None, o.option(TEXTS, "Of a dataset.")] = None,
    data_split: Annotated[str, o.option(TEXTS, "Of a dataset.")] = "train",
    column: Annotated[
        str | None,
        o.option(TEXTS, "Where the text or the chat is. [dim]text, messages, or prompt and completion[/dim]"),
    ] = None,
    families: Annotated[str, o.option(TEXTS, "Of the testbed, comma-separated. [dim]all[/dim]")] = "",
    documents: Annotated[int, o.option(TEXTS, "Texts at most.", min=1)] = 2000,
    max_length: Annotated[int, o.option(TEXTS, "Tokens of a text at most.", min=1)] = 4096,
    packed: Annotated[bool, o.option(TEXTS, "Join texts and cut them into pieces of that length.", "--packed")] = False,
    block: Annotated[
        int, o.option(TEXTS, "Queries per label block: the event period of the policies to be trained.", min=1)
    ] = 16,
    model: o.ModelOptions,
    batch_size: Annotated[int, o.option(o.MACHINE, "Texts at a time.", min=1)] = 16,
    per_shard: Annotated[int, o.option(o.OUTPUT, "Texts in a file.", min=1)] = 200,
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
