"""Tasks of the suite: the testbed's families, retrieval in long prose, plain texts, and mathematics."""

from learnevict.evals.tasks.families import FamilyTask, family_tasks, read
from learnevict.evals.tasks.task import (
    SHARED_MODES,
    AnsweredTask,
    MeasuredTask,
    ReferenceTask,
    Task,
    TextBatch,
    fingerprint,
    is_share,
    resolve,
)

__all__ = [
    "SHARED_MODES", "AnsweredTask", "FamilyTask", "MeasuredTask", "ReferenceTask", "Task", "TextBatch", "family_tasks",
    "fingerprint", "is_share", "read", "resolve",
]  # fmt: skip
