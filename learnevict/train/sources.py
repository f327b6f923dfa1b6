"""Where documents come from: a file, a folder, or a dataset of the Hub, opened as rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learnevict.errors import DataError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Texts by name, and how they are cut.

    Attributes:
        name: a .txt, .jsonl or .parquet file, a folder of such files or of `save_to_disk`, or a dataset of the Hub.
        config, split: of a dataset; the split also of a saved one.
        column: where the text or the chat is; None: "text", "messages", or "prompt" and "completion".
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


def is_file(source: Source) -> bool:
    """Whether we read it ourselves: a text file, or nothing that is there (then reading it says so)."""
    return Path(source.name).suffix in (".txt", ".jsonl") and not Path(source.name).is_dir()


def open_rows(source: Source) -> Any:
    """Rows in order, as a datasets.IterableDataset, whose position can be saved.

    Raises:
        DataError: there is nothing of that name, or it cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"reading {source.name!r} needs the package datasets: pip install 'learnevict[train]'"
        ) from error
    path = Path(source.name).expanduser()
    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            saved: Any = datasets.load_from_disk(str(path))
            return _split(saved, source).to_iterable_dataset()
        if path.exists():
            return _local(path, source)
        if path.suffix in FORMATS or HUB_ID.fullmatch(source.name) is None or source.name.startswith("."):
            raise DataError(f"cannot read {source.name!r}: there is no such file or folder")
        found: Any = datasets.load_dataset(source.name, source.config, split=source.split, streaming=source.streaming)
        return found if source.streaming else found.to_iterable_dataset()
    except DataError:
        raise
    except Exception as error:  # datasets, its readers and its network each raise errors of their own
        raise DataError(f"cannot read {source.name!r}: {' '.join(str(error).split())[:300]}") from error


def _local(path: Path, source: Source) -> Any:
    """A file, or a folder of files of one format."""
    import datasets

    files = sorted(one for one in path.rglob("*") if one.suffix in FORMATS) if path.is_dir() else [path]
    kinds = {FORMATS.get(one.suffix, "") for one in files}
    if len(kinds) != 1 or kinds == {""}:
        found = f"files of {len(kinds)} formats" if len(kinds) > 1 else "none of these"
        raise DataError(
            f"cannot read {source.name!r}: expected files of one format, {', '.join(FORMATS)}; found {found}"
        )
    (kind,) = kinds
    more: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    names = [str(one) for one in files]
    return datasets.load_dataset(kind, data_files={"train": names}, split="train", streaming=True, **more)


def _split(saved: Any, source: Source) -> Any:
    """One split of what `save_to_disk` wrote."""
    import datasets

    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if source.split not in saved:
        raise DataError(f"{source.name!r} has no split {source.split!r}; it has {', '.join(map(str, saved))}")
    return saved[source.split]
