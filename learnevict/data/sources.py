"""Sources of documents: a file, a folder, or a dataset of the Hub, opened as rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from learnevict.errors import DataError
from learnevict.infer.prompts import read_file, read_lines

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """The name of a source of texts, and how they are cut.

    Attributes:
        name: a .txt, .jsonl or .parquet file, a folder of such files or of `save_to_disk`, or a dataset of the Hub.
        config, split: of a dataset; the split also of a saved one.
        column: where the text or the chat is; None: "text", "messages", "conversations", or "prompt" and "completion".
        max_length: tokens of a document at most; exactly, if packed.
        packed: join texts and cut them into pieces of `max_length`.
        streaming: rows of the Hub are read as they are needed; otherwise the dataset is downloaded.
    """

    name: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    max_length: int = 4096
    packed: bool = False
    streaming: bool = False


class TextRows:
    """The rows of text files one after another, whose position can be saved, as that of a datasets.IterableDataset.

    datasets wants columns that have one type each; in conversations a content may be a text, a list or nothing.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files, self.position = files, 0

    def __iter__(self) -> Iterator[Any]:
        """Yields a .txt file as one row, the items of a .json array, or lines of JSON that are not parsed yet.

        In place of a file that is no text, or no array, stands a DataError about it.
        """
        for row in islice(chain.from_iterable(map(_rows_of, self.files)), self.position, None):
            self.position += 1
            yield row

    def state_dict(self) -> dict[str, Any]:
        """Returns how many rows have been read."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind that row."""
        self.position = state["position"]


def _rows_of(path: Path) -> Iterator[Any]:
    if kind_of(path) == "json" and not _is_array(path):
        yield from read_lines(path)
        return
    try:
        whole = read_file(path)
        rows = [{"text": whole}] if kind_of(path) == "text" else json.loads(whole)
    except DataError as error:
        rows = [error]
    except (ValueError, RecursionError) as error:
        rows = [DataError(f"{str(path)!r} is not JSON: {error}")]
    yield from rows


def _is_array(path: Path) -> bool:
    lines = read_lines(path) if path.suffix.lower() == ".json" else iter(())
    return next((line.lstrip() for line in lines if line.strip()), b"").startswith(b"[")


def kind_of(path: Path) -> str:
    """Returns the format of a file by the end of its name, in capitals or not; "" for others."""
    return FORMATS.get(path.suffix.lower(), "")


def check_there(name: str) -> None:
    """Raises a DataError for the name of a file or folder that is not there; other names may be datasets of the Hub."""
    path = Path(name).expanduser()
    if not path.exists() and (kind_of(path) or HUB_ID.fullmatch(name) is None or name.startswith(".")):
        raise DataError(f"cannot read {name!r}: there is no such file or folder")


def open_rows(source: Source) -> Any:
    """Returns rows in order, as TextRows or a datasets.IterableDataset, whose position can be saved; DataError: no such."""
    path = Path(source.name).expanduser()
    saved_here = path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if path.exists() and (source.config or (source.split != "train" and not saved_here)):
        what = f"configuration {source.config!r}" if source.config else f"split {source.split!r}"
        raise DataError(
            f"{source.name!r} is no dataset of the Hub and has no {what}; leave that out, or name the file of it"
        )
    if path.is_file() and kind_of(path) in ("json", "text"):
        return TextRows([path])
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"reading {source.name!r} needs the package datasets: pip install 'learnevict[train]'"
        ) from error
    try:
        if saved_here:
            saved: Any = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                if source.split not in saved:
                    splits = ", ".join(map(str, saved))
                    raise DataError(f"{source.name!r} has no split {source.split!r}; it has {splits}")
                saved = saved[source.split]
            elif source.split not in ("train", str(saved.split)):
                raise DataError(f"{source.name!r} has one split, {saved.split}, and no {source.split!r}; leave it out")
            return saved.to_iterable_dataset()
        if path.exists():
            return _local(path, source)
        check_there(source.name)
        found: Any = datasets.load_dataset(source.name, source.config, split=source.split, streaming=source.streaming)
        return found if source.streaming else found.to_iterable_dataset()
    except DataError:
        raise
    except Exception as error:  # datasets, its readers and its network each raise errors of their own
        raise DataError(f"cannot read {source.name!r}: {' '.join(str(error).split())[:300]}") from error


def _local(path: Path, source: Source) -> Any:
    """Opens a file, or a folder of files of one format."""
    import datasets

    files = [path]
    if path.is_dir():  # what is hidden was not put there to be read: .git, .ipynb_checkpoints, ._copies
        found = (one for one in path.rglob("*") if kind_of(one) and one.is_file())
        files = sorted(one for one in found if not any(part.startswith(".") for part in one.relative_to(path).parts))
    kinds = {kind_of(one) for one in files}
    if len(kinds) != 1 or kinds == {""}:
        what = f"files of {len(kinds)} formats" if len(kinds) > 1 else "none of these"
        raise DataError(
            f"cannot read {source.name!r}: expected files of one format, {', '.join(FORMATS)}; found {what}"
        )
    if kinds != {"parquet"}:
        return TextRows(files)
    names = [str(one) for one in files]
    return datasets.load_dataset("parquet", data_files={"train": names}, split="train", streaming=True)
