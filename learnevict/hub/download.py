"""Download of gates: from the Hub into the local cache, and from there into a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from huggingface_hub import HfApi, constants, get_session, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm

from learnevict.errors import DataError, FromCacheWarning, GateError, HubError
from learnevict.hub.repo import PATIENCE, PAUSE, SLOWEST, Address, HTTPError, asking, insist, offline, unreachable

CONFIG, WEIGHTS, CARD, RUN = "config.json", "model.safetensors", "README.md", "run.json"
FILES = (CONFIG, WEIGHTS, CARD, RUN)
"""What gates consist of on the Hub; nothing else is sent or fetched. The card and the run's record may be missing."""
LARGEST = {CONFIG: 2**20, WEIGHTS: 2**31, CARD: 2**20, RUN: 10 * 2**20}
"""Bytes. Gates are small: more than this is something else."""
GRACE, TRIES = 60.0, 5
"""A download may take so many seconds on top of its size's; a connection may break so often."""
AGAIN = "give the same command again, and tell the owner if it stays so"
MODEL_TYPE = "learnevict-gates"
ORIGIN = "origin.json"
"""The file that says where a pulled folder came from; it stays on this machine."""


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


def fetch(source: Address, token: str | None = None) -> Snapshot:
    """Fetches gates into the local cache; what is there already is not downloaded again.

    If the Hub cannot be reached, an earlier download is taken, with a FromCacheWarning unless HF_HUB_OFFLINE asks for that.

    Raises:
        HubError: no such repository or revision, no access, neither Hub nor cache can be asked, or no sizes and hashes.
        GateError: something else than gates is there, or a file too large for them.
    """
    try:
        with asking(source):
            question: dict[str, Any] = {"revision": source.revision, "timeout": PATIENCE, "files_metadata": True}
            info: Any = insist(HfApi(token=token).model_info, source.repo_id, **question)
    except HubError as error:
        return _cached(source, error)
    found: dict[str, Any] = {file.rfilename: file for file in info.siblings or []}
    missing = [name for name in (CONFIG, WEIGHTS) if name not in found]
    if missing:
        raise GateError(f"{source} does not hold gates: there is no {' and no '.join(missing)} in it")
    files = [found[name] for name in FILES if name in found]
    for file in files:
        if file.size is None or _stated(file) is None:
            raise HubError(
                f"the Hub does not state size and hash of {file.rfilename} in {source}, so that what arrives cannot be "
                "compared; unset HF_ENDPOINT if that is a mirror, or download the folder yourself"
            )
        if file.size > (limit := LARGEST[file.rfilename]):
            raise GateError(
                f"{file.rfilename} in {source} has {file.size} bytes, and gates at most {limit}; is it the right repository?"
            )
    with asking(source):
        check_kind(_download(source, info.sha, files[0], token), str(source))
        for file in files[1:]:
            _download(source, info.sha, file, token)
        # By the branch's name, so that the cache remembers what it meant: without a network that is what one gets.
        config = insist(hf_hub_download, source.repo_id, CONFIG, revision=source.revision, token=token)
    return Snapshot(source, Path(config).parent, info.sha)


def _download(source: Address, commit: str, file: Any, token: str | None) -> Path:
    """Fetches one file of a commit into the cache of huggingface_hub, with the size and hash that the Hub states.

    huggingface_hub itself compares no hash, and its timeout counts from byte to byte. A HubError leaves nothing in the cache.
    """
    name, stated = file.rfilename, _stated(file)
    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source.repo_id, repo_type="model")
    place, fresh = storage / "snapshots" / commit / name, storage / f"{uuid4().hex}.incomplete"
    if place.is_file() and _hash(place, file) == stated:
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        for rest in reversed(range(TRIES)):
            try:
                _read(source, commit, file, fresh, token)
                break
            except (HTTPError, ConnectionError, TimeoutError) as error:
                if not rest or not unreachable(error) or type(error) is TimeoutError:  # which has taken long enough
                    raise
            time.sleep(PAUSE)
        if (found := _hash(fresh, file)) != stated:
            raise HubError(f"{name} of {source} arrived with hash {found}, and the Hub states {stated}; {AGAIN}")
        os.replace(fresh, place)
    finally:
        fresh.unlink(missing_ok=True)
    return place


def _read(source: Address, commit: str, file: Any, place: Path, token: str | None) -> None:
    """Writes what the Hub sends into a new file; a HubError if it is more than stated, or comes too slowly."""
    name, size, arrived, start = file.rfilename, file.size, 0, time.monotonic()
    session, url = get_session(), hf_hub_url(source.repo_id, name, revision=commit)
    question = session.build_request("GET", url, headers=build_hf_headers(token=token), timeout=PATIENCE)
    with (
        closing(insist(session.send, question, stream=True, follow_redirects=True)) as answer,
        tqdm(desc=name, total=size, unit="B", unit_scale=True, disable=None if name == WEIGHTS else True) as bar,
        place.open("wb") as out,
    ):
        hf_raise_for_status(answer)
        for piece in answer.iter_bytes():
            arrived += len(piece)
            seconds = time.monotonic() - start
            if arrived > size:
                raise HubError(f"{name} of {source} is more than the {size} bytes that the Hub states; {AGAIN}")
            if seconds > GRACE + arrived / SLOWEST:
                raise HubError(
                    f"{name} of {source} comes too slowly, {arrived} of {size} bytes in {seconds:.0f} s; check the network "
                    "and give the same command again"
                )
            out.write(piece)
            bar.update(len(piece))


def _stated(file: Any) -> str | None:
    """Returns the hash of a file that the Hub states: sha256 of large ones, git's of others."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def _hash(path: Path, file: Any) -> str:
    return digest(path, None if file.lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))


def _cached(source: Address, error: HubError) -> Snapshot:
    """Returns what an earlier download left, if it is the Hub that cannot be reached."""
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
    """Raises a GateError unless a config.json is that of gates; asked before anything large is read or sent."""
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise GateError(f"{where} does not hold gates: {CONFIG} cannot be read ({error})") from error
    if kind != MODEL_TYPE:
        raise GateError(
            f"{where} does not hold gates but a model of type {kind!r}; gates are what recipes train, of type {MODEL_TYPE!r}"
        )


def install(snapshot: Snapshot, folder: Path) -> tuple[str, ...]:
    """Copies a snapshot into a folder, new, empty or pulled from there before; returns the names of the files that changed.

    A new folder appears as a whole. In an earlier one each file is replaced as a whole and ORIGIN last, so that the next pull
    finishes an interrupted one.

    Raises:
        DataError: the folder holds something else, or files that were changed since they were pulled.
    """
    folder = folder.expanduser().absolute()
    try:
        digests = {name: digest(snapshot.folder / name) for name in snapshot.files}
        note = {"repo_id": snapshot.source.repo_id, "commit": snapshot.commit, "sha256": digests}
        here, before = _pulled_before(folder, snapshot.source, digests)
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


def _pulled_before(folder: Path, source: Address, digests: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the digests of what an earlier pull left in the folder, and the content of ORIGIN; {} and {} where nothing is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}, {}
    try:
        note = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        origin, pulled = str(note["repo_id"]), dict(note["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        origin, note, pulled = "", {}, {}
    if origin != source.repo_id:
        content = f"gates of {origin}" if origin else "something else"
        raise DataError(f"{str(folder)!r} holds {content} already; choose another --out, so that nothing is lost")
    names = [name for name in FILES if name in {*digests, *pulled}]
    here = {name: digest(folder / name) for name in names if (folder / name).is_file()}
    edited = [name for name, found in here.items() if found not in (pulled.get(name), digests.get(name))]
    if edited:
        raise DataError(
            f"{' and '.join(edited)} in {str(folder)!r} changed since they were pulled; choose another --out, so that "
            "nothing is lost"
        )
    return here, note


def digest(path: Path, begun: Any = None) -> str:
    """Returns the sha256 of a file, or what another hash that was begun comes to."""
    state = begun or hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            state.update(piece)
    return state.hexdigest()
