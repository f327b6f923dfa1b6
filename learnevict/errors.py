"""Every error a user can meet, drawn as one tree.

    LearnevictError
    |- BudgetError        a budget that cannot be parsed or cannot hold its guards
    |- CacheError         a cache used in a way that would corrupt it
    |  `- NotAttachedError   an EvictingCache met a model without hooks
    |- ModelError         a model, layer kind or attention that is not supported
    |- GateError          a gate that does not fit: missing, malformed, made for another model
    |- HubError           the Hub cannot be reached, or refuses
    |- LabelError         oracle labels that do not belong to this run
    |- TraceError         a trace that does not belong to this run
    |- DataError          a file or row of the user that cannot be read
    `- UsageError         a command or argument that makes no sense

Each message says what was given, what was expected and what to do.
"""

import errno
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

from learnevict.untrusted import printable


class LearnevictError(Exception):
    """Base of all errors raised on purpose by learnevict."""


class BudgetError(LearnevictError, ValueError):
    """A budget that cannot be parsed, or that is smaller than its guards plus the fresh block."""


class CacheError(LearnevictError, RuntimeError):
    """A cache used in a way that would corrupt it."""


class NotAttachedError(CacheError):
    """An EvictingCache was handed to a model that carries no learnevict hooks."""


class ModelError(LearnevictError, ValueError):
    """A model, layer kind or attention variant that learnevict cannot serve."""


class GateError(LearnevictError, ValueError):
    """A gate that is missing, malformed, or made for another model."""


class HubError(LearnevictError, RuntimeError):
    """The Hub cannot be reached, knows no such repository, or does not allow what was asked for."""


class LabelError(LearnevictError, ValueError):
    """Oracle labels that do not belong to this run (another block, length or layout)."""


class TraceError(LearnevictError, ValueError):
    """A trace that does not belong to this run (another length or layout), or was not recorded."""


class DataError(LearnevictError, ValueError):
    """A file or row supplied by the user that cannot be read."""


class UsageError(LearnevictError, ValueError):
    """An argument, name or combination of options that makes no sense."""


class LearnevictWarning(UserWarning):
    """Base of all warnings: something works, but not as one may think."""


class StockLayersWarning(LearnevictWarning):
    """Some layers keep their stock cache: sliding-window or linear layers are bounded already."""


class UnusedWeightsWarning(LearnevictWarning):
    """A checkpoint holds tensors of parts that the model lacks, such as a head for another task."""


class DefaultBudgetWarning(LearnevictWarning):
    """Who governs a cache names no budget, so a default holds."""


class TrainedOtherwiseWarning(LearnevictWarning):
    """A gate is used in another way than it was trained for."""


class FromCacheWarning(LearnevictWarning):
    """The Hub cannot be reached; what was downloaded earlier is used, and may be old."""


class NotPushedWarning(LearnevictWarning):
    """A checkpoint did not reach the Hub; training goes on, and what was saved here is untouched."""


class PromptInPiecesWarning(LearnevictWarning):
    """A policy depends on where the prompt ends, but the prompt comes in several forwards and its length was not given."""


class UnusedCacheWarning(LearnevictWarning):
    """A cache was made for a `with` block, and nothing was read into it."""


class PaddingReadWarning(LearnevictWarning):
    """Tokens were read as text that the mask of a later turn calls padding; what they evicted is lost."""


class KernelUnusedWarning(LearnevictWarning):
    """Kernels were asked for, but a step has to run in plain torch."""


FREE_SPACE = "free some space, then run it again"


def debugging() -> bool:
    """Returns whether LEARNEVICT_DEBUG asks for tracebacks."""
    return os.environ.get("LEARNEVICT_DEBUG", "0") not in ("", "0")


def unusable(error: OSError, remedy: str) -> str:
    """Returns what the operating system says of a file, and what to do: on a full disk, no other file would be any better."""
    return f"{error.strerror or type(error).__name__}; {FREE_SPACE if is_disk_full(error) else remedy}"


def is_disk_full(error: Exception) -> bool:
    """Returns whether an error, of the operating system or of a library that writes, comes from a disk without room."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


@contextmanager
def told_in_one_line(after_interrupt: str) -> Generator[None, None, None]:
    """Says in one line what went wrong inside, the main part of a program; no traceback unless LEARNEVICT_DEBUG=1.

    Args:
        after_interrupt: what Ctrl-C leaves behind and how to go on.

    Raises:
        SystemExit: 1 after an error, 2 after one of usage, 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; {after_interrupt}\n")
        raise SystemExit(130) from None
    except (LearnevictError, OSError) as error:
        if debugging():
            raise
        full = isinstance(error, OSError) and is_disk_full(error)
        sys.stderr.write(printable(f"error: {' '.join(str(error).split())}{f'; {FREE_SPACE}' * full}") + "\n")
        raise SystemExit(2 if isinstance(error, UsageError | BudgetError) else 1) from None
    except Exception as error:  # whatever it is: a person who cannot read tracebacks is told how to get one
        if debugging():
            raise
        sys.stderr.write(printable(f"error: {unforeseen(error, 'LEARNEVICT_DEBUG=1')}") + "\n")
        raise SystemExit(1) from None


def unforeseen(error: Exception, flag: str) -> str:
    """Returns one line about an error that nothing else explains; `flag` is what shows its traceback."""
    kind, said = type(error).__name__, " ".join(str(error).split())
    remedy = FREE_SPACE if is_disk_full(error) else f"for the traceback run it again with {flag}"
    return f"{kind}{': ' * bool(said)}{said[:300]}; {remedy}"


@contextmanager
def needing(extra: str) -> Generator[None, None, None]:
    """Says in one line which import of a program inside is not installed.

    Args:
        extra: of this package, that brings it.

    Raises:
        SystemExit: 1, if an import fails.
    """
    try:
        yield
    except ImportError as error:
        if debugging():
            raise
        sys.stderr.write(printable(f"error: {error}; pip install 'learnevict[{extra}]'") + "\n")
        raise SystemExit(1) from None
