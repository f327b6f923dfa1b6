"""Labels documents with the attention that their tokens will get, into a store that a killed run goes on with.

    python recipes/oracle.py --out runs/labels                              # the testbed
    python recipes/oracle.py --model path/to/model --data texts.jsonl --out runs/labels
    python recipes/oracle.py --model smollm2 --data facts.jsonl --target reconstruction --states --out runs/labels
    accelerate launch recipes/oracle.py --out runs/labels                   # or torchrun --nproc-per-node 2

One full-cache pass per document, labels streamed layer by layer (never [T, T]); shards of Parquet, each written whole, shared
out among the processes. Run the same command again to resume, with any number of processes; a folder that holds labels of
another base, data or block is refused. With --states, gates that read hidden states alone (kvzap, fast_kvzip) learn from the
store without running the model again: `learnevict train fast_kvzip --target reconstruction --labels runs/labels`.
Paper: golden eviction, Section 3.1 of ForesightKV (arXiv 2602.03203). Departure: block means over real rows only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from learnevict.data.labelling import Labelling, fill_store, processes
from learnevict.data.opening import load_base, read_source
from learnevict.data.sources import Source
from learnevict.errors import told_in_one_line
from learnevict.infer.load import quiet
from learnevict.testbed import families_of
from learnevict.train.run.flags import check_fields, flag, read_flags

SMOKE = {"documents": 6, "per_shard": 3, "batch_size": 3}


@dataclass(frozen=True)
class Config:
    """Flags of this program."""

    out: Path = flag(Path("runs/labels"), "a folder; what is in it is kept")
    model: str = flag("testbed", "base model: testbed, a folder, a name of `learnevict model list` or a Hub id")
    allow_pickle: bool = flag(
        False, "read weights of the model that are pickles (.bin) too; otherwise safetensors only"
    )
    data: str = flag("testbed", "testbed, a file, a folder, or a dataset of the Hub")
    data_config: str | None = flag(None, "of a dataset of the Hub")
    data_split: str = flag("train", "of a dataset")
    column: str | None = flag(None, "where the text or the chat is; otherwise text, messages, or prompt and completion")
    families: str = flag("", "of the testbed, comma-separated; otherwise all")
    documents: int = flag(2000, "at most")
    max_length: int = flag(4096, "tokens of a document at most; exactly, if packed")
    packed: bool = flag(False, "join texts and cut them into pieces of max_length")
    streaming: bool = flag(False, "read as needed")
    target: str = flag(
        "future",
        "future: attention of the text's later blocks; reconstruction: of its repetition (KVzip), by chat models",
    )
    labels: str = flag("", "golden, of the future; kvzip or kvzip+, of a reconstruction, by default kvzip")
    states: bool = flag(
        False, "keep what the attention of every layer reads too, in float16: for each token layers x width x 2 B"
    )
    block: int = flag(16, "queries per label block (the paper: 256); the testbed's texts have 350 tokens")
    batch_size: int = flag(16, "documents at a time")
    per_shard: int = flag(200, "documents in a file")
    first_seed: int = flag(0, "of the testbed's samples")
    threads: int = flag(
        1, "of each process on a CPU; sums of another number of threads may differ in the last bit", most=1024
    )
    smoke: bool = flag(False, "seconds, the same code")

    def __post_init__(self) -> None:
        check_fields(self)
        families_of(self.families)


def main(config: Config) -> None:
    """Labels the documents that are missing."""
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
    labelling = Labelling.of_target(
        config.target, config.labels, tokenizer, data=name, block=config.block, batch_size=config.batch_size,
        per_shard=config.per_shard, threads=config.threads, states=config.states,
    )  # fmt: skip
    if state.is_main_process:
        print(f"{len(documents)} documents")
    done = fill_store(config.out, model, documents, labelling, config=vars(config), watch=watched)
    if state.is_main_process:
        print(f"{done}\nlabels in {config.out}")
    state.destroy_process_group()


def watched(shards: Sequence[int]) -> Iterable[int]:
    """Yields documents under a progress bar of the main process's share."""
    return track(shards, "labelling", disable=not shards)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Returns the settings that a command line asks for."""
    return read_flags({"options": Config}, arguments, __doc__, smoke=SMOKE).of(Config)


if __name__ == "__main__":
    with told_in_one_line("whole shards are kept: run the same command again to go on"):
        main(parse())
