"""Base models and documents by name: the bundled model and its samples, or any other model and source."""

from __future__ import annotations

from itertools import count, cycle, islice
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from learnevict import testbed
from learnevict.data.documents import read_documents
from learnevict.data.label_store import Document
from learnevict.data.sources import Source
from learnevict.errors import UsageError
from learnevict.infer.load import load, load_config, load_tokenizer

TESTBED = "testbed"


def load_base(name: str, device: str = "auto", *, allow_pickle: bool = False) -> tuple[PreTrainedModel, Any]:
    """Loads the bundled model ("testbed", float32), a local folder or a Hub id, and its tokenizer."""
    if name != TESTBED:
        return load(name, device=device, allow_pickle=allow_pickle)
    model, tokenizer = testbed.load()
    return (model if device == "auto" else model.to(device)), tokenizer  # pyright: ignore[reportArgumentType]


def describe_base(name: str) -> tuple[PreTrainedConfig, torch.dtype | None]:
    """Returns the configuration of a base and its precision (None: as stored); no weight is read."""
    return (load_config(str(testbed.path())), torch.float32) if name == TESTBED else (load_config(name), None)


def open_tokenizer(name: str) -> Any:
    """Returns the tokenizer of a base alone."""
    return testbed.build_tokenizer() if name == TESTBED else load_tokenizer(name)


def longest_text(source: str, max_length: int) -> int:
    """Returns the tokens of the longest text to expect: of "testbed", from a few samples; of others, `max_length`."""
    if source != TESTBED:
        return max_length
    samples = (testbed.generate(name, seed, split="train") for name in testbed.FAMILIES for seed in range(8))
    return min(max(len(f"{one.prompt} {one.response}".split()) for one in samples), max_length)


def read_source(
    source: str | Source,
    tokenizer: Any,
    limit: int,
    *,
    first_seed: int = 0,
    families: tuple[str, ...] = testbed.FAMILIES,
    split: str = "train",
) -> list[Document]:
    """Returns up to `limit` documents: of "testbed", families in turn and seeds from `first_seed`, or of what the user named.

    Args:
        source: "testbed", a file, folder or dataset, as data.sources.Source has it.
        tokenizer: of the base model.
        limit: documents at most.
        first_seed, families, split: of the testbed; a family named twice gives twice as many texts, each of them once.
    """
    where = source if isinstance(source, Source) else Source(source)
    if where.name != TESTBED:
        return read_documents(where, tokenizer, limit)[0]
    if where.packed:
        raise UsageError("samples of the testbed are read one by one, as its model has learned them; drop --packed")
    seeds = {name: count(first_seed) for name in families}
    return [
        _sample(tokenizer, name, next(seeds[name]), split, where.max_length) for name in islice(cycle(families), limit)
    ]


def read_for_learning(
    source: Source, tokenizer: Any, limit: int, held_out: int, families: tuple[str, ...] = testbed.FAMILIES
) -> tuple[list[Document], list[Document]]:
    """Returns documents for training and others for validation: the source's first, or the testbed's validation samples."""
    if source.name != TESTBED:
        return read_documents(source, tokenizer, limit, skip=held_out)
    others = read_source(source, tokenizer, held_out, families=families, split="validation")
    return read_source(source, tokenizer, limit, families=families), others


def _sample(tokenizer: Any, family: str, seed: int, split: str, max_length: int) -> Document:
    sample = testbed.generate(family, seed, split=split)
    ids = tokenizer(f"{sample.prompt} {sample.response}", add_special_tokens=False)["input_ids"][:max_length]
    return Document(ids, min(len(sample.prompt.split()), max_length), family, seed)
