"""Writing files under one rule: what this tool did not write is never replaced, unless --overwrite says so.

A file shows by what stands near its beginning who wrote it; each kind that is written has a mark of this tool:
    pages         <meta name="generator" content="learnevict">
    pictures      the PNG text Software: learnevict
    Markdown      a first comment, <!-- Written by learnevict ... -->
    CSV           our columns in its first line
    JSON, JSONL   keys of ours: "program" of a run's record, "configuration" of per-sample numbers, "id" and "key" of answers

An empty file is nobody's. A link stays a link: what it leads to is replaced. A device or a pipe (/dev/stdout) is written to
as it is. A folder that is made as a whole is replaced only if nothing but files of an earlier one is in it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import warnings
from collections.abc import Collection, Generator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, LearnevictWarning, UsageError, unusable

PAGE = b'<meta name="generator" content="learnevict">'
PICTURE = b"Software\0learnevict"
MARKDOWN = b"<!-- Written by learnevict"
LOCK = '{"pid": '
HEAD = 2**16
"""Bytes in which a mark is looked for."""


def special(path: Path) -> bool:
    """Returns whether a path is a device, a pipe or an open file of this process, which can be written to but not replaced."""
    named = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return named or (path.exists() and not path.is_file() and not path.is_dir())


def is_ours(path: Path, mark: bytes) -> bool:
    """Returns whether a file bears a mark of ours, or is empty; an OSError if it cannot be read."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    return not head or mark in head


def check(path: Path, mark: bytes, *, overwrite: bool | None = None) -> None:
    """Raises a DataError before the work, not after it, where a file may not or cannot be made, replaced or added to.

    Args:
        path: of the file.
        mark: what a file of this kind has near its beginning if this tool wrote it.
        overwrite: replace it in any case; None: the program has no such flag.
    """
    with writing(path):
        if special(path):
            return
        if not path.exists():
            fresh = _unfinished(path)  # not the file itself, which another process may be making
            fresh.touch()
            fresh.unlink()
            return
        with path.open("ab"):  # refuses what is write-protected, though it could be replaced
            pass
        if not overwrite and not is_ours(path, mark):
            flag = "" if overwrite is None else ", or replace it with --overwrite"
            raise DataError(f"{str(path)!r} was not written by this program; choose another --out{flag}")


def _unfinished(path: Path) -> Path:
    """Returns a new name beside what a path leads to; it begins with a dot, so that nobody takes it for a result."""
    path = path.resolve()
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}.part")


@contextmanager
def replacing(path: Path, mark: bytes, *, overwrite: bool | None = None) -> Generator[Path]:
    """Yields a path beside a file, to write to; when all is well it takes the file's place. Arguments, errors as in `check`."""
    check(path, mark, overwrite=overwrite)
    with writing(path):
        if special(path):
            yield path
            return
        target, fresh = path.resolve(), _unfinished(path)
        try:
            yield fresh
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, fresh)
            os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)


def write(path: Path, content: str | bytes, mark: bytes, *, overwrite: bool | None = None) -> None:
    """Writes a file, whole or not at all; text as UTF-8. Arguments and errors as in `check`."""
    with replacing(path, mark, overwrite=overwrite) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turns an OSError inside into a DataError that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {str(path)!r}: {unusable(error, 'choose another --out')}") from error


class Lines:
    """A file of JSON lines that grows line by line, each for good, so that a killed run loses the last one at most.

    Reading changes nothing; what a killed run had begun to write is cut off by `mend`, and when the next line is added.
    A file whose first line does not begin with `mark`, or that cannot be read or written, is a DataError.

    Attributes:
        rows: what was in it when it was opened.
    """

    def __init__(self, path: Path, mark: bytes) -> None:
        self.path = path
        self.rows: list[Any] = []
        self._end, self._last = -1, b""
        with writing(path):
            if special(path) or not path.exists():
                return
            raw = path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        last = raw[whole:]
        try:
            self.rows = [json.loads(line) for line in raw[:whole].splitlines()]
            if not (raw.startswith(mark) or mark.startswith(raw)):
                raise ValueError("it begins otherwise")
            self._end = whole if last else -1
            try:
                self.rows += [json.loads(last)] if last else []
                self._last = last + b"\n"
            except ValueError:
                if last[:2] not in (b"{", b'{"'):
                    raise
        except (ValueError, RecursionError) as error:
            raise DataError(f"{str(path)!r} was not written by this program ({error}); choose another --out") from error

    def append(self, row: Any) -> None:
        """Adds a line, and waits until it is on the disk."""
        self.mend()
        with writing(self.path):
            try:
                line = json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # half a surrogate pair, which only an escape can carry
                line = json.dumps(row).encode()
            with self.path.open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                if not special(self.path):
                    os.fsync(file.fileno())

    def mend(self) -> None:
        """Ends the file with a whole line."""
        if self._end >= 0:
            with writing(self.path), self.path.open("r+b") as file:
                file.seek(self._end)
                file.truncate()
                file.write(self._last)
        self._end = -1


@contextmanager
def locked(path: Path | None) -> Generator[None]:
    """Holds a file, or a folder that is there, while it is written: others that ask are refused with a UsageError.

    PATH.lock says who holds it. It ends with its process, however that ends; what a killed one left is taken over. Devices,
    and None, are not held.
    """
    if path is None or special(path):
        yield
        return
    path = path.resolve()
    lock = path / "run.lock" if path.is_dir() else path.with_name(path.name + ".lock")
    with writing(lock):
        handle = _hold(lock, path)
    try:
        yield
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)
            os.close(handle)


def _hold(lock: Path, path: Path) -> int | None:
    """Returns an open lock file that nobody else holds; None, with a warning, where files cannot be locked."""
    handle, said = -1, ""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock

        while handle < 0 or not lock.exists() or not os.path.samestat(os.fstat(handle), lock.stat()):
            if handle >= 0:
                os.close(handle)  # its holder has just removed it
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            said = os.read(handle, 4096).decode(errors="replace")
            if said and not said.startswith(LOCK):
                raise DataError(f"{str(lock)!r} is no lock of this program; choose another --out than {path}")
            flock(handle, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        holder = said or "just begun"
        raise UsageError(
            f"another process is writing {str(path)!r} ({holder}); wait for it, or choose another --out"
        ) from None
    except (ImportError, OSError) as error:
        if handle < 0 and isinstance(error, OSError):
            raise
        warnings.warn(f"{lock} cannot be locked ({error}); no other run may write there", LearnevictWarning, 4)
        return handle if handle >= 0 else None
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": now}).encode(), 0)
    return handle


def check_folder(folder: Path, names: Collection[str], proof: str, mark: bytes) -> None:
    """Raises a DataError for a folder that is not new, empty or an earlier one; finishes a replacing that was killed.

    Args:
        folder: that is to be replaced as a whole.
        names: of the files that an earlier one may hold.
        proof: the file among them that bears the mark.
        mark: as in `check`.
    """
    with writing(folder):
        if Path.cwd().is_relative_to(folder.resolve()):
            raise DataError(
                f"{str(folder)!r} is the folder you are in, or holds it; name another one, such as a new one in it"
            )
        fresh, old = _beside(folder)
        if not folder.exists() and old.exists() and fresh.exists():
            os.replace(fresh, folder)
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        strange = [name for name in found if name not in names or not (folder / name).is_file()]
        if found and not strange and not (proof in found and is_ours(folder / proof, mark)):
            strange = found
    if strange:
        some = ", ".join(strange[:3]) + " and more" * (len(strange) > 3)
        raise DataError(f"{str(folder)!r} holds {some}, not written by this program; choose another folder")


@contextmanager
def replacing_folder(folder: Path, names: Collection[str], proof: str, mark: bytes) -> Generator[Path]:
    """Yields an empty folder beside one, to fill, which then takes its place. Arguments and errors as in `check_folder`."""
    check_folder(folder, names, proof, mark)
    fresh, old = _beside(folder)
    with writing(folder):
        shutil.rmtree(fresh, ignore_errors=True)  # their names say who left them
        shutil.rmtree(old, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        check_folder(folder, names, proof, mark)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Returns where a folder is made before it takes the place of an earlier one, and where that one goes."""
    return folder.with_name(f".{folder.name}.learnevict-new"), folder.with_name(f".{folder.name}.learnevict-old")
