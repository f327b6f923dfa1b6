"""The record of a run, `run.json` beside what it made: what would be needed to make it again, and how it ended.

    with Record(folder, "distill", config={...}, base_hash=..., data_hash=...) as record:
        ...                                  # status "running" is on the disk: a killed run is seen to be one
        record.add(log=trainer.state.log_history)

It holds nothing about the machine's owner: no host, no user, no folder that was not given. What results carry away (`origin`)
names files without their folders, as does a record that is shared (learnevict.hub).
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from learnevict import __version__
from learnevict.errors import DataError
from learnevict.files import locked, write

FILE = "run.json"
PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy", "trl", "deepspeed", "triton",
)  # fmt: skip
ABSOLUTE = r"(?:file://)?(?:~[\w.-]*[/\\]|[A-Za-z]:[/\\]|/|\\\\)"
"""How a path from a root or a home begins, on any system."""
WHOLE = re.compile(ABSOLUTE)
WITHIN = re.compile(
    r"(?P<link>\b(?!file:)[A-Za-z][\w+.-]+://\S*)"
    rf"|(?P<quote>['\"`])(?P<quoted>{ABSOLUTE}[^'\"`\n]*)(?P=quote)"
    rf"|(?<![\w.~/\\<-])(?P<bare>{ABSOLUTE}[^\s'\"`,;:()<>|/\\]+[/\\][^\s'\"`,;:()<>|]*)"
)
"""Paths in a text: between quotes, or bare and of two parts at least ("/INST" is none); links are passed over."""


class Record:
    """A run's record, written when the run begins, whenever something is added, and when it ends.

    Args:
        folder: of the run's results; created if missing, and held while the run lasts (UsageError).
        program: which program runs; a DataError if the folder holds the record of another.
        config: everything that was set; dataclasses and paths are welcome.
        goes_on: the run goes on where an earlier one in the same folder stopped; what that one was stays in "sessions".
        writes: False in all processes but one.
        **facts: anything else of JSON, such as base_hash, data_hash and seeds.
    """

    def __init__(
        self,
        folder: str | Path,
        program: str,
        config: Mapping[str, Any] | None = None,
        *,
        goes_on: bool = False,
        writes: bool = True,
        **facts: Any,
    ) -> None:
        self.path = Path(folder) / FILE
        self.writes, self.running, self.began = writes, False, time.monotonic()
        before = own_record(folder, program) if writes else None
        self.lock = locked(Path(folder))
        self.content: dict[str, Any] = {
            "program": program,
            "status": "running",
            "started": now(),
            "git": commit(),
            "versions": versions(),
            "platform": machine(),
            "config": as_json(config or {}),
            **{name: as_json(fact) for name, fact in facts.items()},
        }
        if goes_on and before is not None:
            kept = ("status", "started", "seconds", "git", "versions")
            self.content["sessions"] = [
                *before.get("sessions", []),
                {name: before[name] for name in kept if name in before},
            ]

    @property
    def origin(self) -> dict[str, Any]:
        """What the results themselves carry: what made them, but not when, where or how far it came, and no folders."""
        passing = ("status", "started", "ended", "seconds", "platform", "sessions", "log", "error")
        return without_folders({name: fact for name, fact in self.content.items() if name not in passing})

    def add(self, **facts: Any) -> None:
        """Adds facts, and writes them down if the run has begun."""
        self.content |= {name: as_json(fact) for name, fact in facts.items()}
        if self.running:
            self._write()

    def __enter__(self) -> Record:
        self.began, self.running = time.monotonic(), True
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock.__enter__()
        try:
            self._write()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.content["status"] = "finished"
        elif isinstance(error, KeyboardInterrupt):
            self.content["status"] = "interrupted"
        else:
            self.content |= {"status": "failed", "error": as_json(f"{type(error).__name__}: {error}")}
        self.content |= {"ended": now(), "seconds": round(time.monotonic() - self.began, 2)}
        try:
            self._write()
        except (DataError, OSError):
            if error is None:  # else what went wrong in the run is what the user has to hear
                raise
        finally:
            self._release()

    def _release(self) -> None:
        if self.writes:
            self.lock.__exit__(None, None, None)

    def _write(self) -> None:
        if self.writes:
            write(self.path, json.dumps(self.content, indent=1) + "\n", b'"program": ')


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """Returns the record in a folder; None if there is none. A DataError if run.json is something else."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        if isinstance(found := json.loads(path.read_text(encoding="utf-8")), dict):
            return found
        problem = f"{type(found).__name__} of JSON"
    except ValueError as error:
        problem = str(error)
    raise DataError(f"{str(path)!r} is not the record of a run ({problem}); remove it, or use another folder")


def own_record(folder: str | Path, program: str) -> dict[str, Any] | None:
    """Returns the record of an earlier run of this program in a folder; a DataError if there is one of something else."""
    found = read_record(folder)
    if found is not None and found.get("program") != program:
        raise DataError(
            f"{str(Path(folder) / FILE)!r} is not the record of {program} but of {found.get('program', 'something else')}; "
            "choose another folder"
        )
    return found


def now() -> str:
    """Returns the time, UTC to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> dict[str, Any] | None:
    """Returns the commit of the checkout this code runs from, and whether its files differ from it; None if installed."""
    here = Path(__file__).resolve().parent.parent / "__init__.py"

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", here.name
        )  # in a virtual environment inside another repository it is installed
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", ":/"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Returns the kind of machine, and no name of it."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count(), "gpu": card}


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this package and of its requirements."""
    return {
        "python": platform.python_version(),
        "learnevict": __version__,
        **{name: found for name in PACKAGES if (found := installed(name)) is not None},
    }


def installed(name: str) -> str | None:
    """Returns the version of a distribution; None if it is not installed. Nothing is imported."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def changed(training: TrainingArguments) -> dict[str, Any]:
    """Returns training arguments that differ from the defaults, but for tokens, the progress bar and resuming.

    Defaults are read from the class: making others would make accelerate forget what it knows about processes.
    """
    given = training.to_dict()
    plain = {one.name: None if one.default is MISSING else one.default for one in fields(training)}
    own = AcceleratorConfig().to_dict()
    plain["accelerator_config"] = {name: own[name] for name in own if name != "use_configured_state"}
    nothing = (None, False, "", "none", [], {})
    return {
        name: value
        for name, value in given.items()
        if not name.endswith("token")
        and name not in ("disable_tqdm", "resume_from_checkpoint")
        and value != plain.get(name)
        and not (value in nothing and plain[name] in nothing)
    }


def as_json(value: Any) -> Any:
    """Returns dataclasses, paths and tuples as JSON, anything else as text, and the home folder as ~."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [as_json(part) for part in value]
    if isinstance(value, int | float | bool | None):
        return value
    home = str(Path.home())
    return str(value).replace(home, "~") if len(home) > 1 else str(value)


def without_folders(value: Any) -> Any:
    """Returns JSON with every absolute path in it reduced to its last part; links, Hub ids and relative paths stay."""
    if isinstance(value, Mapping):
        return {name: without_folders(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    return last_part(value) if WHOLE.match(value) else WITHIN.sub(_reduced, value)


def last_part(path: str) -> str:
    """Returns the last part of a path of any system; a bare root as it is."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def _reduced(found: re.Match[str]) -> str:
    if found["link"]:
        return found["link"]
    quote = found["quote"] or ""
    return quote + last_part(found["quoted"] or found["bare"]) + quote
