"""Requests to the Hub: addresses, retries, and errors as one line that says what to do."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from learnevict.errors import HubError, LearnevictError, UsageError
from learnevict.infer.load import ANSWER, Answer, answer_of

PATIENCE = 10.0
"""Seconds from one byte of an answer to the next."""
SLOWEST = 2**14
"""Files have the time of so many bytes a second."""
PAUSE = 1.0
COMMIT = re.compile(r"[0-9a-f]{40}")

# huggingface_hub has changed its HTTP library; this is the root of whichever tree of errors it stands in.
HTTPError: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


@dataclass(frozen=True)
class Address:
    """A repository on the Hub, and a branch, tag or commit of it."""

    repo_id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> Address:
        """Reads "user/repo" or "user/repo@revision"; a UsageError for anything else, or two revisions that differ."""
        repo_id, at, written = text.partition("@")
        if (at and not written) or (written and revision not in (None, written)):
            raise UsageError(f"{text!r} with revision {revision!r}: give one revision, as in user/repo@v1")
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise UsageError(f"{text!r} is no Hub id ({error}); write user/repo or user/repo@revision") from error
        if "/" not in repo_id:
            raise UsageError(f"{text!r} is no Hub id; write user/repo or user/repo@revision")
        return cls(repo_id, written or revision)

    def __str__(self) -> str:
        return self.repo_id + (f"@{self.revision}" if self.revision else "")


@contextmanager
def asking(where: Address, *, to_write: bool = False) -> Generator[None]:
    """Turns errors of the Hub or the network inside into a HubError of one line that says what to do."""
    try:
        yield
    except LearnevictError:
        raise
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError, ValueError, LocalEntryNotFoundError) as error:
        raise HubError(explain(error, where, to_write=to_write)) from error


def insist(call: Callable[..., Answer], *args: object, num_bytes: int = 0, **options: object) -> Answer:
    """Returns the call's answer; asks again if the Hub itself failed (status 5xx), as it does in passing.

    Raises:
        TimeoutError: the answer takes too long as a whole, for a call that sends `num_bytes`.
    """
    within = ANSWER if not num_bytes else 5 * ANSWER + num_bytes / SLOWEST  # a commit is several questions
    try:
        return answer_of(call, *args, within=within, **options)
    except HfHubHTTPError as error:
        if _status(error) // 100 != 5:
            raise
    time.sleep(PAUSE)
    return answer_of(call, *args, within=within, **options)


def unreachable(error: BaseException) -> bool:
    """Returns whether it is the network or the Hub itself that failed, and not the question."""
    answered = any(_status(one) and _status(one) // 100 != 5 for one in _chain(error))
    return not answered and any(isinstance(one, (HTTPError, ConnectionError, TimeoutError)) for one in _chain(error))


def offline(error: BaseException) -> bool:
    """Returns whether the user has forbidden the network."""
    return any(isinstance(one, OfflineModeIsEnabled) for one in _chain(error))


def explain(error: BaseException, where: Address, *, to_write: bool) -> str:
    """Returns what happened, and what to do about it."""
    chain = list(_chain(error))
    status = next((code for one in chain if (code := _status(one))), 0)
    kinds = {kind for one in chain for kind in type(one).__mro__}
    log_in = "log in with `hf auth login` (or set HF_TOKEN), with a token that may " + ("write" if to_write else "read")
    if offline(error):
        return f"{where} was asked for, but HF_HUB_OFFLINE forbids the network; unset it"
    if RevisionNotFoundError in kinds:
        return f"{where.repo_id} has no branch, tag or commit {where.revision or 'main'!r}; look at its page for those it has"
    if GatedRepoError in kinds:
        return f"{where.repo_id} is gated: ask for access on its page, then {log_in}"
    if status == 401 and (to_write or get_token() is not None):
        return f"the Hub does not accept the token that was sent; {log_in}"
    if RepositoryNotFoundError in kinds or status in (401, 404):
        return f"the Hub shows no repository {where.repo_id}: it does not exist, or is private; check the name, or {log_in}"
    if status == 403:
        return f"this token may not {'write to' if to_write else 'read'} {where.repo_id}; {log_in} there"
    if status:
        return f"the Hub answered {status} for {where}: {_said(error)}; try again later"
    if any(type(one) is TimeoutError for one in chain):
        return f"the Hub sends {chain[0]} for {where}; check the network and give the same command again"
    if unreachable(error):
        return (
            f"the Hub cannot be reached for {where}, or the connection broke off ({type(chain[-1]).__name__}); check the "
            "network and give the same command again"
        )
    xet = " (without Xet storage on that Hub: set HF_HUB_DISABLE_XET=1)" if "xet" in str(error).lower() else ""
    return f"the Hub did not take {where}: {_said(error)}{xet}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields the error and what caused it."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _status(error: BaseException) -> int:
    """Returns the HTTP status of an answer; 0 if there was none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _said(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
