"""Gates from the Hub: into the local cache, and from there into a folder of the user's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from learnevict.errors import DataError, FromCacheWarning, GateError, HubError
from learnevict.hub.reach import PATIENCE, Address, asking, insist, offline, unreachable

CONFIG, WEIGHTS, CARD, RUN = "config.json", "model.safetensors", "README.md", "run.json"
FILES = (CONFIG, WEIGHTS, CARD, RUN)
"""What gates consist of on the Hub; nothing else is sent or fetched. The card and the run's record may be missing."""
MODEL_TYPE = "learnevict-gates"
ORIGIN = "origin.json"
"""Where a pulled folder came from; stays on this machine."""


@dataclass(frozen=True)
class Snapshot:
    """Gates in the local cache: a folder with FILES, as they were at a commit."""

    source: Address
    folder: Path
    commit: str

    @property
    def files(self) -> tuple[str, ...]:
        """Those of FILES that are there."""
        return tuple(name for name in FILES if (self.folder / name).is_file())


def fetch(source: Address) -> Snapshot:
    """Bring gates into the local cache; files that are there already are not downloaded again.

    Without a network, or when the Hub itself fails, what was downloaded earlier is taken, with a FromCacheWarning unless
    HF_HUB_OFFLINE asks for just that.

    Raises:
        HubError: no such repository or revision, no access, or neither Hub nor cache can be asked.
        GateError: something else than gates is there.
    """
    try:
        with asking(source):
            info: Any = insist(HfApi().model_info, source.repo_id, revision=source.revision, timeout=PATIENCE)
    except HubError as error:
        return _cached(source, error)
    found = {sibling.rfilename for sibling in info.siblings or []}
    missing = [name for name in (CONFIG, WEIGHTS) if name not in found]
    if missing:
        raise GateError(f"{source} does not hold gates: there is no {' and no '.join(missing)} in it")
    with asking(source):
        check_kind(Path(hf_hub_download(source.repo_id, CONFIG, revision=info.sha)), str(source))
        # By the branch's name, so that the cache remembers what it meant: without a network that is what one gets.
        folder = Path(snapshot_download(source.repo_id, revision=source.revision, allow_patterns=list(FILES)))
    return Snapshot(source, folder, folder.name)


def _cached(source: Address, error: HubError) -> Snapshot:
    """What an earlier download left, if it is the Hub that cannot be reached."""
    cause = error.__cause__ or error
    if not unreachable(cause):
        raise error
    try:
        options: Any = {"revision": source.revision, "allow_patterns": list(FILES), "local_files_only": True}
        folder = Path(snapshot_download(source.repo_id, **options))
    except LocalEntryNotFoundError:
        raise error from cause
    if not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise error
    if not offline(cause):
        warnings.warn(
            f"the Hub cannot be reached; {source} comes from the local cache, as of commit {folder.name[:8]}",
            FromCacheWarning,
            stacklevel=3,
        )
    return Snapshot(source, folder, folder.name)


def check_kind(config: Path, where: str) -> None:
    """Look into a config.json before anything large is read or sent.

    Raises:
        GateError: it is not that of gates.
    """
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise GateError(f"{where} does not hold gates: {CONFIG} cannot be read ({error})") from error
    if kind != MODEL_TYPE:
        raise GateError(
            f"{where} does not hold gates but a model of type {kind!r}; gates are what recipes train, of type {MODEL_TYPE!r}"
        )


def install(snapshot: Snapshot, folder: Path) -> tuple[str, ...]:
    """Copy a snapshot into a folder: a new or empty one, or one that was pulled from the same repository.

    A new folder appears as a whole. In an earlier one each file is replaced as a whole and the note in ORIGIN last, so
    that an interrupted pull is finished by the next.

    Returns:
        The names of the files that changed.

    Raises:
        DataError: the folder holds something else, or files that were changed since they were pulled.
    """
    folder = folder.expanduser().absolute()
    try:
        digests = {name: digest(snapshot.folder / name) for name in snapshot.files}
        note = {"repo_id": snapshot.source.repo_id, "commit": snapshot.commit, "sha256": digests}
        here, before = _held(folder, snapshot.source, digests)
        if before == note and here == digests:
            return ()
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = folder.with_name(f".{folder.name}.pulling")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        for name in digests:
            shutil.copyfile(snapshot.folder / name, fresh / name)
        (fresh / ORIGIN).write_text(json.dumps(note, indent=1), encoding="utf-8")
        if not folder.exists():
            os.replace(fresh, folder)
        else:
            for name in (*digests, ORIGIN):
                os.replace(fresh / name, folder / name)
            for name in set(here) - set(digests):
                (folder / name).unlink()
            fresh.rmdir()
    except OSError as error:
        raise DataError(f"cannot write {str(folder)!r}: {error.strerror}; choose another --out") from error
    return tuple(name for name in digests if here.get(name) != digests[name])


def _held(folder: Path, source: Address, digests: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """What an earlier pull left in the folder, by file, and its note; {} and {} where nothing is.

    Raises:
        DataError: something of the user's would be lost.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}, {}
    try:
        note = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        origin, pulled = str(note["repo_id"]), dict(note["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        origin, note, pulled = "", {}, {}
    if origin != source.repo_id:
        held = f"gates of {origin}" if origin else "something else"
        raise DataError(f"{str(folder)!r} holds {held} already; choose another --out, so that nothing is lost")
    names = [name for name in FILES if name in {*digests, *pulled}]
    here = {name: digest(folder / name) for name in names if (folder / name).is_file()}
    edited = [name for name, found in here.items() if found not in (pulled.get(name), digests.get(name))]
    if edited:
        raise DataError(
            f"{' and '.join(edited)} in {str(folder)!r} changed since they were pulled; choose another --out, so that "
            "nothing is lost"
        )
    return here, note


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
