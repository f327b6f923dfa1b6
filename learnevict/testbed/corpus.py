"""What recipes ask for by name: the bundled model or any other, its training samples or a local file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from learnevict import testbed
from learnevict.infer.load import load
from learnevict.train.data import read_texts
from learnevict.train.labels import Document


def load_base(name: str, device: str = "auto") -> tuple[PreTrainedModel, Any]:
    """The bundled model ("testbed", float32), a local folder or a Hub id, with its tokenizer."""
    if name != "testbed":
        return load(name, device=device)
    model, tokenizer = testbed.load()
    return (model if device == "auto" else model.to(device)), tokenizer  # pyright: ignore[reportArgumentType]


def read_source(
    source: str,
    tokenizer: Any,
    limit: int,
    max_length: int,
    *,
    first_seed: int = 0,
    families: tuple[str, ...] = testbed.FAMILIES,
    split: str = "train",
) -> list[Document]:
    """Up to `limit` documents: of "testbed", families in turn and seeds from `first_seed`, or of a .txt / .jsonl file.

    Raises:
        DataError: the file cannot be read or holds no text.
    """
    if source != "testbed":
        return read_texts(Path(source), tokenizer, limit, max_length)
    documents = []
    for index in range(limit):
        family, seed = families[index % len(families)], first_seed + index // len(families)
        sample = testbed.generate(family, seed, split=split)
        ids = tokenizer(f"{sample.prompt} {sample.response}", add_special_tokens=False)["input_ids"]
        documents.append(Document(ids, len(sample.prompt.split()), family, seed))
    return documents
