"""Every error a user can meet, drawn as one tree.

    LearnevictError
    |- BudgetError        a budget that cannot be parsed or cannot hold its guards
    |- CacheError         a cache used in a way that would corrupt it
    |  `- NotAttachedError   an EvictingCache met a model without hooks
    |- ModelError         a model, layer kind or attention that is not supported
    |- GateError          a gate that does not fit: missing, malformed, made for another model
    |- LabelError         oracle labels that do not belong to this run
    |- TraceError         a trace that does not belong to this run
    |- DataError          a file or row of the user that cannot be read
    `- UsageError         a command or argument that makes no sense

Each message says what was given, what was expected and what to do.
"""


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


class TrainedOtherwiseWarning(LearnevictWarning):
    """A gate is used in another way than it was trained for."""


class PromptInPiecesWarning(LearnevictWarning):
    """A policy depends on where the prompt ends, but the prompt comes in several forwards and its length was not given."""


class KernelUnusedWarning(LearnevictWarning):
    """Kernels were asked for, but a step has to run in plain torch."""
