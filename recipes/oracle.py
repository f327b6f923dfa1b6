"""Label documents with golden attention, into a store that survives being killed.

    python recipes/oracle.py --out runs/labels                              # the testbed
    python recipes/oracle.py --model path/to/model --data texts.jsonl --out runs/labels

One full-cache pass per document, labels streamed layer by layer (never [T, T]); shards of Parquet, each written whole.
Run the same command again to resume; a folder that holds labels of another base, data or block is refused.
Paper: golden eviction, Section 3.1 of ForesightKV (arXiv 2602.03203). Departure: block means over real rows only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from transformers import HfArgumentParser

from learnevict import testbed
from learnevict.errors import told_in_one_line
from learnevict.hub import weight_hash
from learnevict.oracle import golden_labels
from learnevict.testbed.corpus import load_base, read_source
from learnevict.train.labels import Document, LabelStore, Manifest, hash_documents
from learnevict.train.ranker import Collator


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    out: Path = Path("runs/labels")
    model: str = "testbed"
    data: str = "testbed"  # "testbed", or a local .txt / .jsonl file
    families: str = ""  # testbed only: comma-separated, default all
    documents: int = 2000
    max_length: int = 4096
    block: int = 16  # "mean over queries in a block of 256" (Section 3.1); the testbed's texts are 350 tokens long
    batch_size: int = 16
    per_shard: int = 200
    first_seed: int = 0
    smoke: bool = False


def label(model: torch.nn.Module, documents: list[Document], config: Config, pad: int) -> list[Document]:
    """The same documents with labels float16 [L, H, T, M]."""
    done = []
    for start in range(0, len(documents), config.batch_size):
        batch = documents[start : start + config.batch_size]
        inputs = Collator(pad)(batch)
        layers, _ = golden_labels(model, inputs["input_ids"], inputs["attention_mask"], block=config.block)
        like = next(part for part in layers if part is not None)
        full = torch.stack([torch.zeros_like(like) if part is None else part for part in layers])
        for row, document in enumerate(batch):
            size = len(document.input_ids)
            blocks = -(-size // config.block)
            part = full[:, row, :, full.shape[3] - size :, :blocks].to(torch.float16)
            done.append(Document(**{**vars(document), "labels": part.cpu()}))
    return done


def main(config: Config) -> None:
    """Label what is missing."""
    if config.smoke:
        config = Config(**{**vars(config), "documents": 6, "per_shard": 3, "batch_size": 3})
    model, tokenizer = load_base(config.model)
    families = tuple(config.families.split(",")) if config.families else testbed.FAMILIES
    documents = read_source(
        config.data, tokenizer, config.documents, config.max_length, first_seed=config.first_seed, families=families
    )
    text = model.config.get_text_config(decoder=True)
    manifest = Manifest(
        base_hash=weight_hash(model),
        data=config.data if config.data == "testbed" else Path(config.data).name,
        data_hash=hash_documents(documents),
        block=config.block,
        reduce="golden",
        num_layers=text.num_hidden_layers,
        num_heads=text.num_key_value_heads,
        num_documents=len(documents),
        documents_per_shard=config.per_shard,
    )
    store = LabelStore(config.out, manifest)
    missing = store.missing()
    print(f"{len(documents)} documents, {manifest.num_shards} shards, {manifest.num_shards - len(missing)} done before")
    for shard in track(missing, "labelling", disable=not missing):
        store.write(shard, label(model, [documents[i] for i in store.span(shard)], config, tokenizer.pad_token_id or 0))
    print(f"labels in {config.out}")


if __name__ == "__main__":
    with told_in_one_line("whole shards are kept: run the same command again to go on"):
        main(HfArgumentParser(Config).parse_args_into_dataclasses()[0])
