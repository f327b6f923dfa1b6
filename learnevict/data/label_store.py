"""The label store: labels of many documents as sharded Parquet, with a manifest so that runs are not mixed.

    folder/manifest.json            what the labels are: base, data, block, reducer, layout; hashes
    folder/data/train-00003-of-00010.parquet
    folder/states/train-00003-of-00010.safetensors      if wanted, what the attention of every layer reads, float16

Shards are written under another name and renamed when whole, so a killed run leaves whole shards; which are missing is seen
from the files. A shard's bytes depend on its documents alone, not on who writes it or when.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from learnevict.errors import LabelError
from learnevict.files import replacing, write

MARK = b'"base_hash": '
"""What shows that a file is a manifest."""
STATES = b'"written_by":"learnevict"'


@dataclass(frozen=True)
class Manifest:
    """What a store holds; runs with different manifests never share a folder."""

    base_hash: str
    data: str
    data_hash: str
    block: int
    reduce: str
    num_layers: int
    num_heads: int
    num_documents: int
    documents_per_shard: int
    repetition: str = ""  # how texts are repeated, for labels of a repetition; empty for those of a text's own future
    states: bool = False  # hidden states are kept beside the labels

    @property
    def num_shards(self) -> int:
        """Shards of the whole store."""
        return -(-self.num_documents // self.documents_per_shard)


@dataclass(frozen=True)
class Document:
    """One document: token ids; labels float16 [L, H, T, M] and inputs of attention float16 [L, T, E], if it has them.

    Layers that stay stock hold zeros. Stored states are read from the disk as they are needed.
    """

    input_ids: list[int]
    prompt_length: int
    family: str
    seed: int
    labels: Tensor | None = None
    states: Tensor | None = None


def hash_documents(documents: list[Document]) -> str:
    """Returns the sha256 over the token ids of documents."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(torch.tensor(document.input_ids, dtype=torch.int32).numpy().tobytes())
    return digest.hexdigest()[:32]


def check_new(folder: Path) -> None:
    """Raises a LabelError for a folder without a manifest that holds what no run of labelling has begun to write."""
    begun = ("manifest.json", "run.json", "run.lock", "data")  # other processes of this run are as far as that
    found = [path for part in (folder, folder / "data") for path in part.glob("[!.]*")]
    if strange := sorted(str(path.relative_to(folder)) for path in found if path.name not in begun):
        some = ", ".join(strange[:3]) + " and more" * (len(strange) > 3)
        raise LabelError(
            f"{str(folder)!r} holds {some}, not written by a run that makes labels; choose another --out, a new folder"
        )


class LabelStore:
    """A folder of labelled documents; without a manifest, what is there is opened. LabelError: none, or of another run."""

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if manifest is None and not path.is_file():
            raise LabelError(
                f"no labels in {str(folder)!r}: manifest.json is missing; make them with `learnevict oracle`"
            )
        try:
            found = Manifest(**json.loads(path.read_text())) if path.is_file() else None
        except (ValueError, TypeError) as error:
            raise LabelError(f"{str(path)!r} is no manifest of labels ({error}); use another --out") from error
        if found is not None and manifest is not None and found != manifest:
            wrong = [key for key, value in asdict(manifest).items() if asdict(found)[key] != value]
            raise LabelError(
                f"{str(folder)!r} holds labels of another run ({', '.join(wrong)} differ); use another --out"
            )
        wanted = found or manifest
        assert wanted is not None
        self.manifest: Manifest = wanted
        if found is None:
            check_new(self.folder)
            (self.folder / "data").mkdir(parents=True, exist_ok=True)
            write(path, json.dumps(asdict(self.manifest), indent=1), MARK)  # processes of one run all write the same

    def path(self, shard: int) -> Path:
        """Returns the file of a shard."""
        return self.folder / "data" / f"train-{shard:05d}-of-{self.manifest.num_shards:05d}.parquet"

    def states_path(self, shard: int) -> Path:
        """Returns the file of a shard's states."""
        return self.folder / "states" / f"{self.path(shard).stem}.safetensors"

    def missing(self) -> list[int]:
        """Returns the shards that are not written yet."""
        return [shard for shard in range(self.manifest.num_shards) if not self.path(shard).exists()]

    def span(self, shard: int) -> range:
        """Returns the indices of the documents of a shard."""
        per = self.manifest.documents_per_shard
        return range(shard * per, min((shard + 1) * per, self.manifest.num_documents))

    def write(self, shard: int, documents: list[Document]) -> None:
        """Writes one shard, whole or not at all."""
        import pyarrow.parquet as parquet
        from datasets import Dataset, Features, List, Value

        features = Features(
            input_ids=List(Value("int32")),
            prompt_length=Value("int32"),
            family=Value("string"),
            seed=Value("int64"),
            num_blocks=Value("int32"),
            labels=List(Value("float16")),
        )
        rows = [
            {
                **{key: value for key, value in vars(document).items() if key not in ("labels", "states")},
                "num_blocks": document.labels.shape[-1],
                "labels": document.labels.to(torch.float16).flatten().numpy(),
            }
            for document in documents
            if document.labels is not None
        ]
        table = Dataset.from_list(rows, features=features).data.table
        if self.manifest.states:  # before the labels, whose presence says that a shard is done
            states = {str(i): one.states for i, one in enumerate(documents) if one.states is not None}
            self.states_path(shard).parent.mkdir(exist_ok=True)
            with replacing(self.states_path(shard), STATES) as fresh:
                save_file(states, fresh, {"written_by": "learnevict"})
        with replacing(self.path(shard), b"PAR1") as fresh:  # a worker may outlive its killed launcher
            parquet.write_table(table, fresh, compression="zstd")

    def written(self) -> list[int]:
        """Returns the shards written so far; a LabelError if there is none."""
        shards = [shard for shard in range(self.manifest.num_shards) if self.path(shard).exists()]
        if not shards:
            raise LabelError(
                f"{str(self.folder)!r} has a manifest but no shard yet; run `learnevict oracle` to the end"
            )
        return shards

    def clean(self) -> None:
        """Removes what killed runs had begun to write; call it when no shard is missing."""
        for path in self.folder.glob("*/.train-*.part"):
            path.unlink(missing_ok=True)

    def lengths(self) -> list[int]:
        """Returns the tokens of the documents of the shards written so far; a LabelError if there is none."""
        import pyarrow.parquet as parquet

        tables = [parquet.read_table(str(self.path(shard)), columns=["input_ids"]) for shard in self.written()]
        return [len(ids) for table in tables for ids in table.column("input_ids")]

    def _states(self, shard: int) -> dict[str, Tensor]:
        """Returns the states of a shard's documents by their number in it; the file is mapped, not read."""
        path = self.states_path(shard)
        try:
            return load_file(path) if self.manifest.states else {}
        except (OSError, SafetensorError) as error:
            raise LabelError(
                f"cannot read {str(path)!r} ({error}); remove the shard's labels too, and make both anew"
            ) from error

    def documents(self) -> list[Document]:
        """Returns the documents of the shards written so far; a LabelError if there is none."""
        import pyarrow.parquet as parquet

        found: list[Document] = []
        for shard in self.written():
            table = parquet.read_table(str(self.path(shard)))
            states = self._states(shard)
            rows = table.drop_columns(["labels"]).to_pylist()
            for index, (row, labels) in enumerate(zip(rows, table.column("labels"), strict=True)):
                flat = torch.from_numpy(labels.values.to_numpy(zero_copy_only=False).copy())
                shape = (
                    self.manifest.num_layers,
                    self.manifest.num_heads,
                    len(row["input_ids"]),
                    row.pop("num_blocks"),
                )
                found.append(Document(**row, labels=flat.view(shape), states=states.get(str(index))))
        return found
