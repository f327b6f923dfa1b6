"""Label documents with golden attention, into a store that survives being killed.

    python recipes/oracle.py --out runs/labels                              # the testbed
    python recipes/oracle.py --model path/to/model --data texts.jsonl --out runs/labels
    accelerate launch recipes/oracle.py --out runs/labels                   # or torchrun --nproc-per-node 2

One full-cache pass per document, labels streamed layer by layer (never [T, T]); shards of Parquet, each written whole, shared
out among the processes. Run the same command again to resume, with any number of processes; a folder that holds labels of
another base, data or block is refused.
Paper: golden eviction, Section 3.1 of ForesightKV (arXiv 2602.03203). Departure: block means over real rows only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track
from transformers import HfArgumentParser

from learnevict.data.labelling import Labelling, fill_store, processes
from learnevict.data.opening import families_of, load_base, read_source
from learnevict.data.sources import Source
from learnevict.errors import told_in_one_line
from learnevict.infer.load import quiet
from learnevict.train.run.ranges import check_numbers


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    out: Path = Path("runs/labels")
    model: str = "testbed"
    allow_pickle: bool = False  # of the model: read .bin files too; otherwise safetensors only
    data: str = "testbed"  # "testbed", a file, a folder, or a dataset of the Hub: see learnevict.data.sources
    data_config: str | None = None
    data_split: str = "train"
    column: str | None = None
    families: str = ""  # testbed only: comma-separated, default all
    documents: int = 2000
    max_length: int = 4096
    packed: bool = False
    streaming: bool = False
    block: int = 16  # "mean over queries in a block of 256" (Section 3.1); the testbed's texts are 350 tokens long
    batch_size: int = 16
    per_shard: int = 200
    first_seed: int = 0
    threads: int = 1  # of each process on a CPU; sums of another number of threads may differ in the last bit
    smoke: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        families_of(self.families)


def main(config: Config) -> None:
    """Label what is missing."""
    if config.smoke:
        config = Config(**{**vars(config), "documents": 6, "per_shard": 3, "batch_size": 3})
    state = processes()
    quiet(bars=False)
    model, tokenizer = load_base(config.model, device=str(state.device), allow_pickle=config.allow_pickle)
    source = Source(
        config.data, config.data_config, config.data_split, config.column, config.max_length, config.packed, config.streaming
    )  # fmt: skip
    documents = read_source(
        source, tokenizer, config.documents, first_seed=config.first_seed, families=families_of(config.families)
    )
    name = config.data if config.data == "testbed" else Path(config.data).name
    pad = tokenizer.pad_token_id or 0
    labelling = Labelling(name, config.block, config.batch_size, config.per_shard, pad, config.threads)
    if state.is_main_process:
        print(f"{len(documents)} documents")
    done = fill_store(config.out, model, documents, labelling, config=vars(config), watch=watched)
    if state.is_main_process:
        print(f"{done}\nlabels in {config.out}")
    state.destroy_process_group()


def watched(shards: Sequence[int]) -> Iterable[int]:
    """A bar for the main process's share."""
    return track(shards, "labelling", disable=not shards)


if __name__ == "__main__":
    with told_in_one_line("whole shards are kept: run the same command again to go on"):
        main(HfArgumentParser(Config).parse_args_into_dataclasses()[0])
