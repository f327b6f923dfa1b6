"""learnevict oracle and profile: golden labels of texts, kept for training; and where a budget is spent best."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import typer

import learnevict.cli.options as o
from learnevict.cli.output import progress, say, tell
from learnevict.cli.tasks import listed
from learnevict.data.sources import Source, check_there
from learnevict.errors import UsageError
from learnevict.testbed import families_of

TEXTS = "What to label"


OPTIONS: dict[str, Any] = {
    "run.out": o.option(o.OUTPUT, "Folder of the labels; what is in it is kept.", "--out", "-o"),
    "data": o.option(TEXTS, "testbed, a .txt, .jsonl or .parquet file, a folder of them, or a dataset of the Hub "
        "(downloaded because you ask for it)."),
    "data_config": o.option(TEXTS, "Of a dataset."),
    "data_split": o.option(TEXTS, "Of a dataset."),
    "column": o.option(TEXTS, "Where the text or the chat is. [dim]text, messages, or prompt and completion[/dim]"),
    "families": o.option(TEXTS, "Of the testbed, comma-separated. [dim]all[/dim]"),
    "documents": o.option(TEXTS, "Texts at most.", min=1),
    "max_length": o.option(TEXTS, "Tokens of a text at most.", min=1),
    "packed": o.option(TEXTS, "Join texts and cut them into pieces of that length.", "--packed"),
    "block": o.option(TEXTS, "Queries per label block: the event period of the policies to be trained.", min=1),
    "run.target": o.option(TEXTS, "future (attention of a text's later blocks) or reconstruction (of its repetition, "
        "KVzip; for chat models)."),
    "labels": o.option(TEXTS, "golden, of the future; kvzip or kvzip+, of a reconstruction. [dim]golden, kvzip[/dim]"),
    "states": o.option(o.OUTPUT, "Keep hidden states in float16 too, so that kvzap and fast_kvzip learn without "
        "running the model again.", "--states"),
    "batch_size": o.option(o.MACHINE, "Texts at a time.", min=1),
    "per_shard": o.option(o.OUTPUT, "Texts in a file.", min=1),
    "text": typer.Argument(help="UTF-8 file of prose, cut into texts of --length tokens, or .jsonl of chats."),
    "profile.out": o.option(o.OUTPUT, "File of the shares.", "--out", "-o"),
    "texts": o.option(TEXTS, "How many texts.", min=1),
    "length": o.option(TEXTS, "Tokens of a text.", min=64),
    "budgets": o.option(TEXTS, "Shares of a text that are kept; their profiles are averaged."),
    "heads": o.option(
        TEXTS,
        "Only the heads that need most slots get any beside those that always stay, all alike, this many: with a budget of "
        "1/8, a tenth of all heads can keep whatever they read. [dim]every head its share[/dim]",
        min=1,
    ),
    "profile.target": o.option(TEXTS, "What makes a token worth keeping: repetition (what the model attends to when "
        "it repeats the text) or future (attention of the text's second half to its first). [dim]repetition if the "
        "model has a chat template[/dim]"),
}  # fmt: skip


class Wanted(str, Enum):
    """What makes a token worth its slot."""

    auto = "auto"
    repetition = "repetition"
    future = "future"


def run(
    *,
    out: Path = Path("runs/labels"),
    data: str = "testbed",
    data_config: str | None = None,
    data_split: str = "train",
    column: str | None = None,
    families: str = "",
    documents: int = 2000,
    max_length: int = 4096,
    packed: bool = False,
    block: int = 16,
    target: str = "future",
    labels: str = "",
    states: bool = False,
    model: o.ModelOptions,
    batch_size: int = 16,
    per_shard: int = 200,
    as_json: bool = False,
) -> None:
    """Label texts with the attention that each of their tokens gets from later tokens, or from a repetition of the text.

    Examples:

        learnevict oracle --out runs/labels

        learnevict oracle --model Qwen/Qwen3-0.6B --data texts.jsonl --block 128 --out runs/labels

        learnevict oracle --model smollm2 --data facts.jsonl --target reconstruction --states --out runs/labels

    The labels are what `learnevict train METHOD --labels` learns from: Parquet files that datasets can load. Interrupted,
    the same command goes on. Over several processes: torchrun --nproc-per-node 2 recipes/oracle.py.
    """
    named = families_of(families)
    if data != "testbed":
        check_there(data)
    from learnevict.cli.opened_model import open_model
    from learnevict.data.labelling import Labelling, fill_store
    from learnevict.data.opening import read_source

    opened = open_model(model)
    source = Source(data, data_config, data_split, column, max_length, packed)
    found = read_source(source, opened.tokenizer, documents, families=named)
    labelling = Labelling.of_target(
        target, labels, opened.tokenizer,
        data=Path(data).name, block=block, batch_size=batch_size, per_shard=per_shard, states=states,
    )  # fmt: skip
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


def profile(
    text: Path,
    *,
    out: Path = Path("allocation.json"),
    texts: int = 8,
    length: int = 1000,
    budgets: str = "1/4,1/8",
    heads: int | None = None,
    target: Wanted = Wanted.auto,
    model: o.ModelOptions,
    overwrite: bool = False,
) -> None:
    """Find which layers and heads need slots most, for any method: a file that --allocation takes.

    Examples:

        learnevict profile book.txt --model smollm2 --out smollm2.json

        learnevict eval --tasks needle --text other.txt --model smollm2 --methods snapkv --allocation smollm2.json

        learnevict profile chats.jsonl --model smollm2-reasoning --out reasoning.json

    Golden labels of a few texts, pooled over the model, say how many of the best slots each head would hold. Of chats with a
    response they are the response's attention to what comes before it.
    """
    shares = _parsed(budgets)
    check_there(str(text))
    from learnevict.cli.opened_model import open_model
    from learnevict.data.opening import read_source
    from learnevict.hub import weight_hash
    from learnevict.parts.shares import shares_of

    opened = open_model(model)
    chats = text.suffix.lower() == ".jsonl"
    source = Source(str(text), max_length=length, packed=not chats)
    found = read_source(source, opened.tokenizer, texts)
    answered = chats and all(0 < one.prompt_length < len(one.input_ids) for one in found)
    can_repeat = bool(opened.tokenizer.chat_template)
    repeats = target is Wanted.repetition or (target is Wanted.auto and can_repeat and not answered)
    labels: list[list[Any]] = []
    with progress(len(found)) as advance:
        for one in found:
            past = one.prompt_length if answered else len(one.input_ids) // 2
            labels.append(_wanted(opened.model, opened.tokenizer, list(one.input_ids), None if repeats else past))
            advance("texts", 1)
    made = {
        "model": opened.name, "weights": weight_hash(opened.model), "target": "repetition" if repeats else "future",
        "texts": len(found), "length": length, "shares": budgets, "text": text.name,
    }  # fmt: skip
    spent = shares_of(labels, shares, **made)
    spent = spent if heads is None else spent.whole_heads(heads)
    spent.save(out, overwrite=overwrite)
    layers = sorted(
        ((sum(heads), index) for index, heads in zip(spent.indices, spent.layers, strict=True)), reverse=True
    )
    say("most slots go to layers " + ", ".join(f"{index} ({share:.0%})" for share, index in layers[:5]))
    tell(f"allocation in {out}")


def _parsed(budgets: str) -> tuple[float, ...]:
    """Returns shares such as 1/4 and 0.125 as numbers; a UsageError for others."""
    try:
        shares = tuple(float(Fraction(word)) for word in listed(budgets))
    except (ValueError, ZeroDivisionError):
        shares = ()
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UsageError(f"--budgets are shares of a text, above 0 and at most 1, such as 1/4,1/8, not {budgets!r}")
    return shares


def _wanted(model: Any, tokenizer: Any, ids: list[int], past: int | None) -> list[Any]:
    """Returns how much each of the first `past` tokens is needed by later ones (None: each token by a repetition of the text),
    per layer [1, H, T]; None for stock layers."""
    import torch

    from learnevict.infer.model.modules import device_of
    from learnevict.oracle import Repeating, golden_labels, horizon, reconstruct, repeat_prompt

    batch = torch.tensor([ids], device=device_of(model))
    if past is None:
        return reconstruct(model, batch, how=Repeating(prompt=repeat_prompt(tokenizer, "auto")))
    block = max(len(ids) // 64, 1)
    found = golden_labels(model, batch, block=block)[0]
    event = past // block
    return [None if layer is None else horizon(layer)[:, :, : event * block, event] for layer in found]
