"""The per-sample log of a run: one line per finished batch, appended at once, so that a killed run loses one batch at most."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, UsageError
from learnevict.evals.plan import Key
from learnevict.files import Lines, writing

START = b'{"configuration": '
"""How a log begins."""


class SampleLog:
    """Per-sample numbers by cell and seed, in memory and in a JSONL file.

    The first line of the file is the configuration; each further line holds a batch: lists run over its seeds, a single
    number holds for each of them. In memory every seed also knows how many shared its batch, as "batch".

    Args:
        path: the file; None keeps everything in memory.
        configuration: everything that would make old numbers wrong if it changed; None: whatever the file says.
        resume: go on with a file that is there.

    Raises:
        UsageError: the file is there and `resume` is not set, or it belongs to another configuration.
        DataError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, configuration: Mapping[str, Any] | None, *, resume: bool = False) -> None:
        self.path = path
        self.entries: dict[Key, dict[int, dict[str, float]]] = {}
        self.identity: dict[Key, Any] = {}
        self.configuration: dict[str, Any] = json.loads(json.dumps(configuration or {}))
        if path is None:
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = Lines(path, START)
        if not self.lines.rows:
            self.lines.append({"configuration": self.configuration})
        elif not resume:
            raise UsageError(f"{path} holds an earlier run; go on with it (--resume) or choose another --out")
        else:
            self._take_all(path, None if configuration is None else self.configuration)

    def missing(
        self, key: Key, seeds: Sequence[int], identity: Mapping[str, Any], columns: Sequence[str] = ()
    ) -> list[int]:
        """Returns seeds of a cell that still have to be run, for the first time or for the sake of a column that they lack.

        Raises:
            UsageError: the cell was begun with other hyperparameters or gates.
        """
        now = json.loads(json.dumps(identity))
        known = self.identity.setdefault(key, now)
        if known != now:
            raise UsageError(
                f"{self.path} holds {key.method} on {key.family} at {key.budget} with {known}, but now it is {now}; "
                "write to another --out"
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

    def columns(self, key: Key, seeds: Sequence[int], *names: str) -> list[list[float]] | None:
        """Returns several columns; None unless all are there."""
        found = [self.column(key, seeds, name) for name in names]
        whole = [one for one in found if one is not None]
        return whole if len(whole) == len(found) else None

    def _take(self, line: Mapping[str, Any]) -> None:
        values = dict(line)
        key = Key(*(values.pop(name) for name in Key.__annotations__))
        self.identity[key] = values.pop("identity")
        seeds = values.pop("seeds")
        cell = self.entries.setdefault(key, {})
        for index, seed in enumerate(seeds):
            mine = {name: value[index] if isinstance(value, list) else value for name, value in values.items()}
            cell[seed] = {**mine, "batch": len(seeds)}

    def _take_all(self, path: Path, wanted: dict[str, Any] | None) -> None:
        """Reads what the file holds, if it is of this configuration."""
        try:
            first, *rows = self.lines.rows
            found = self.configuration = dict(first["configuration"])
            wanted = found if wanted is None else wanted
            differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            for row in [] if differ else rows:
                self._take(row)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{str(path)!r} is no record of an evaluation; write to another --out") from error
        if differ:
            changes = ", ".join(f"{name} {found.get(name)!r} (now {wanted.get(name)!r})" for name in differ)
            raise UsageError(f"{path} belongs to another configuration: {changes}; write to another --out")


def log_path(out: Path) -> Path:
    """Returns where the per-sample numbers behind a file of rows are kept."""
    return out.with_name(f"{out.stem}.samples.jsonl")
