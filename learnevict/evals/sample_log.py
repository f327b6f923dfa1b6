"""The per-sample log of a run: one line per finished batch, appended at once, so that a killed run loses one batch at most."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, UsageError
from learnevict.files import Lines, write, writing

Entry = dict[str, float]
START = b'{"configuration": '
"""How a log begins."""


@dataclass(frozen=True)
class Key:
    """One cell of a comparison in one mode ("teacher" or "free")."""

    method: str
    family: str
    budget: str
    mode: str


class SampleLog:
    """Per-sample numbers by cell and seed, in memory and in a JSONL file.

    The first line of the file is the configuration; each further line holds a batch: lists run over its seeds, a single
    number holds for each of them. In memory every seed also knows how many shared its batch, as "batch".

    Args:
        path: the file; None keeps everything in memory.
        configuration: everything that would make old numbers wrong if it changed.
        resume: go on with a file that is there.

    Raises:
        UsageError: the file is there and `resume` is not set, or it belongs to another configuration.
        DataError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, configuration: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self.entries: dict[Key, dict[int, Entry]] = {}
        self.identity: dict[Key, Any] = {}
        wanted = json.loads(json.dumps(configuration))
        if path is None:
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = Lines(path, START)
        if not self.lines.rows:
            self.lines.append({"configuration": wanted})
        elif resume:
            self._take_all(path, wanted)
        else:
            raise UsageError(f"{path} holds an earlier run; go on with it (--resume) or choose another --out")

    def missing(
        self, key: Key, seeds: Sequence[int], identity: Mapping[str, Any], columns: Sequence[str] = ()
    ) -> list[int]:
        """Returns seeds of a cell that still have to be run, for the first time or for the sake of a column that they lack.

        Raises:
            UsageError: the cell was begun with other hyperparameters or gates.
        """
        known = self.identity.setdefault(key, json.loads(json.dumps(identity)))
        if known != json.loads(json.dumps(identity)):
            raise UsageError(
                f"{self.path} holds {key.method} on {key.family} at {key.budget} with {known}, but now it is "
                f"{dict(identity)}; write to another --out"
            )
        done = self.entries.get(key, {})
        return [seed for seed in seeds if seed not in done or any(name not in done[seed] for name in columns)]

    def add(self, key: Key, seeds: Sequence[int], values: Mapping[str, Any]) -> None:
        """Adds a finished batch."""
        line = {**vars(key), "identity": self.identity.get(key), "seeds": list(seeds), **values}
        self._take(line)
        if self.path is not None:
            self.lines.append(line)

    def column(self, key: Key, seeds: Sequence[int], name: str) -> list[float] | None:
        """Returns one number per seed; None unless every seed has it."""
        found = self.entries.get(key, {})
        if any(name not in found.get(seed, {}) for seed in seeds):
            return None
        return [found[seed][name] for seed in seeds]

    def _take(self, line: dict[str, Any]) -> None:
        values = dict(line)
        key = Key(*(values.pop(name) for name in Key.__annotations__))
        self.identity[key] = values.pop("identity")
        seeds = values.pop("seeds")
        cell = self.entries.setdefault(key, {})
        for index, seed in enumerate(seeds):
            mine = {name: value[index] if isinstance(value, list) else value for name, value in values.items()}
            cell[seed] = {**mine, "batch": len(seeds)}

    def _take_all(self, path: Path, wanted: dict[str, Any]) -> None:
        """Reads what the file holds, if it is of this configuration."""
        first, *rows = self.lines.rows
        found = first["configuration"]
        differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        if differ:
            changes = ", ".join(f"{name} {found.get(name)!r} (now {wanted.get(name)!r})" for name in differ)
            raise UsageError(f"{path} belongs to another configuration: {changes}; write to another --out")
        try:
            for row in rows:
                self._take(row)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{str(path)!r} is no record of an evaluation; write to another --out") from error


def forget(path: Path, name: str) -> int:
    """Drops all numbers of one method, and of its settings tried in tuning ("NAME window=8"), from a log.

    The file is written anew beside the old one and takes its place at once.

    Returns:
        How many batches are gone; 0 if there is no such file.

    Raises:
        DataError: the file cannot be read or written, or is no record.
    """
    if not path.exists():
        return 0
    lines = Lines(path, START).rows
    kept = [line for line in lines if line.get("method", "").split(" ")[0] != name]
    write(path, "".join(json.dumps(line) + "\n" for line in kept), START)
    return len(lines) - len(kept)


def read_log(path: Path) -> tuple[dict[str, Any], SampleLog]:
    """Returns configuration and numbers of a finished log.

    Raises:
        DataError: no such file, or no log.
    """
    try:
        with path.open(encoding="utf-8") as file:
            configuration = json.loads(file.readline())["configuration"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} is no record of an evaluation") from error
    return configuration, SampleLog(path, configuration, resume=True)
