"""Sharing gates: a folder becomes one commit on the Hub, and gates on the Hub become a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from learnevict.errors import DataError, GateError, HubError, UsageError
from learnevict.files import write
from learnevict.hub.card import MARK, make_card
from learnevict.hub.download import CARD, CONFIG, FILES, LARGEST, RUN, WEIGHTS, check_kind, fetch, install
from learnevict.hub.gates import Gates, locate
from learnevict.hub.repo import COMMIT, PATIENCE, Address, asking, insist
from learnevict.hub.run_record import without_folders

MAIN = "main"


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the commit's address, whether the repository is new, whether anything changed."""

    address: Address
    url: str
    created: bool
    changed: bool
    files: tuple[str, ...]


@dataclass(frozen=True)
class Pulled:
    """The result of a pull: the folder, its commit, and which files changed."""

    folder: Path
    commit: str
    changed: tuple[str, ...]


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    token: str | None = None,
) -> Pushed:
    """Shares a folder of gates as one commit: config.json, model.safetensors, run.json if there is one, and a card.

    The same call repeats a push that broke off: what has arrived is not sent twice, and until the commit is made nothing
    can be seen. Absolute paths in the config and the record are sent without their folders.

    Args:
        folder: gates, or the name of those that ship with the package; only read.
        repo_id: "user/repo", or "repo" of the token's owner, and "@branch" after it; made if it does not exist.
        private: who may see a repository that has to be made.
        revision: branch, if it does not stand in `repo_id`; made from the default one if it does not exist.
        message: of the commit.
        rows: of an evaluation, for the card; a README.md that the user wrote goes up instead of a card.
        token: of the account; else the one that is logged in.

    Raises:
        GateError, DataError: no gates, files too large for them, or a config or record that is no JSON.
        HubError: not logged in, no access, no network.
        UsageError: no Hub id, a commit for a branch, rows of other gates, or a public repository that should be private.
    """
    place = _folder(folder)
    gates = Gates.load(place)
    api = HfApi(token=token)
    where, info = _look_at(api, repo_id, revision, private=private)
    license = info.card_data.to_dict().get("license") if info is not None and info.card_data else None
    sent: dict[str, str | bytes] = {
        **{name: _shareable(place / name) for name in (CONFIG, RUN) if (place / name).is_file()},
        WEIGHTS: str(place / WEIGHTS),
        CARD: _card(place, gates, where, rows or (), license).encode(),
    }
    branch = where.revision or MAIN
    with asking(where, to_write=True):
        if info is None:
            insist(api.create_repo, where.repo_id, private=private or None, exist_ok=True)
        if branch != MAIN:
            insist(api.create_branch, where.repo_id, branch=branch, exist_ok=True)
        head: Any = insist(api.model_info, where.repo_id, revision=branch, timeout=PATIENCE)
        stale = {sibling.rfilename for sibling in head.siblings or []} & ({*FILES} - {*sent})
        summary = message or f"{gates.method} gates for {gates.config.base_name or 'a base model'}"
        size = sum(len(one) if isinstance(one, bytes) else Path(one).stat().st_size for one in sent.values())

        def commit() -> Any:
            """Makes a new list each time: what has arrived, or is the same already, is recognised and left out."""
            changes = [CommitOperationAdd(name, content) for name, content in sent.items()]
            gone = [CommitOperationDelete(name) for name in sorted(stale)]
            return api.create_commit(where.repo_id, [*changes, *gone], commit_message=summary, revision=branch)

        made = insist(commit, num_bytes=size)
    return Pushed(
        where, made.commit_url, info is None, made.oid != head.sha, tuple(name for name in FILES if name in sent)
    )


def open_repository(repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Makes a repository if it does not exist; returns "user/repo", with "@branch" if given. Errors as in `push_folder`."""
    api = HfApi(token=token)
    where, info = _look_at(api, repo_id, None, private=private)
    if info is None:
        with asking(where, to_write=True):
            insist(api.create_repo, where.repo_id, private=private or None, exist_ok=True)
    return str(where)


def _look_at(api: HfApi, repo_id: str, revision: str | None, *, private: bool) -> tuple[Address, Any]:
    """Returns the full address, and what the Hub knows of the repository; None if this token may see none."""
    where = _full_address(api, repo_id, revision)
    with asking(where, to_write=True):
        try:
            info: Any = insist(api.model_info, where.repo_id, timeout=PATIENCE)
        except RepositoryNotFoundError as error:
            if error.response.status_code != 404:
                raise
            return where, None
    if private and not info.private:
        raise UsageError(
            f"{where.repo_id} exists already and is public; change that on its page first, or give another name: nothing "
            "was sent"
        )
    return where, info


def pull_folder(repo_id: str, folder: str | Path | None = None, *, revision: str | None = None) -> Pulled:
    """Copies gates of "user/repo" or "user/repo@revision" into a folder, by default one with the repository's name, here.

    The folder is new, empty, or was pulled from there before; the same call finishes a pull that broke off.

    Raises:
        HubError, GateError: as from `fetch`.
        DataError: something in the folder would be lost, or it cannot be written.
    """
    source = Address.parse(repo_id, revision)
    snapshot = fetch(source)
    Gates.load(snapshot.folder)
    target = Path(source.repo_id.partition("/")[2] if folder is None else folder)
    return Pulled(target, snapshot.commit, install(snapshot, target))


def write_card(folder: str | Path, repo_id: str, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes the card of a folder of gates into it, unless it holds a README.md of the user's."""
    place = Path(folder)
    check_links(place)
    text = _card(place, Gates.load(place), Address.parse(repo_id), rows, None)
    if MARK in text:
        write(place / CARD, text, MARK.encode())


def _full_address(api: HfApi, repo_id: str, revision: str | None) -> Address:
    """Returns where to write to: user/repo, also where only the repository was named, and its branch."""
    ownerless = "/" not in repo_id.partition("@")[0]
    where = Address.parse(f"owner/{repo_id}" if ownerless else repo_id, revision)
    if where.revision is not None and COMMIT.fullmatch(where.revision):
        raise UsageError(f"revision {where.revision!r} is a commit, and commits cannot change; give a branch")
    if api.token is None and get_token() is None:
        raise HubError("nobody is logged in to the Hub: `hf auth login`, or set HF_TOKEN to a token that may write")
    if not ownerless:
        return where
    with asking(where, to_write=True):
        return replace(where, repo_id=f"{insist(api.whoami)['name']}/{where.repo_id.partition('/')[2]}")


def _folder(source: str | Path) -> Path:
    """Returns a local folder that may be sent; a GateError if there are no gates, or files too large."""
    place = locate(source)
    if not isinstance(place, Path):
        raise GateError(f"no folder {str(source)!r}: what is pushed is a folder with config.json and model.safetensors")
    check_kind(place / CONFIG, repr(str(source)))
    if not (place / WEIGHTS).is_file():
        raise GateError(
            f"{str(source)!r} does not hold gates: there is no {WEIGHTS} in it; save them with save_pretrained"
        )
    check_links(place)
    for name, limit in LARGEST.items():
        if (place / name).is_file() and (size := (place / name).stat().st_size) > limit:
            raise GateError(
                f"{name} in {str(source)!r} has {size} bytes, and gates at most {limit}; is it the right folder?"
            )
    return place


def check_links(place: Path) -> None:
    """Raises a GateError if a file is a link out of the folder, which would publish or replace another file."""
    for name in FILES:
        real = (place / name).resolve()
        if place.resolve() not in real.parents:
            raise GateError(
                f"{name} in {str(place)!r} is a link to {str(real)!r}, outside of the folder; put the file itself there "
                "(`cp -L`): nothing was sent"
            )


def _shareable(path: Path) -> bytes:
    """Returns a file of JSON without the folders of this machine; byte by byte as it is, if it names none."""
    try:
        written = path.read_bytes()
        content = json.loads(written)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {str(path)!r} as JSON: {error}; write it anew, or remove it") from error
    shared = without_folders(content)
    return written if shared == content else (json.dumps(shared, indent=2) + "\n").encode()


def _card(place: Path, gates: Gates, where: Address, rows: Sequence[Mapping[str, Any]], license: str | None) -> str:
    """Returns the README.md that the user wrote, or a fresh card."""
    written = place / CARD
    try:
        text = written.read_text(encoding="utf-8") if written.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(written)!r}: {error}; save it as UTF-8, or remove it") from error
    if text and MARK not in text:
        if rows:
            raise UsageError(
                f"{str(written)!r} is a text of your own, so the rows have no place; remove it, or drop them"
            )
        return text
    return make_card(gates, where, rows, license)
