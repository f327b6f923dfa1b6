"""Tasks of the suite: the testbed's families, retrieval in long prose, plain texts, and mathematics."""

from learnevict.evals.tasks.families import FamilyTask, family_tasks, read
from learnevict.evals.tasks.task import SHARED_MODES, OwnModes, Task, TextBatch, is_share, resolve

__all__ = ["SHARED_MODES", "FamilyTask", "OwnModes", "Task", "TextBatch", "family_tasks", "is_share", "read", "resolve"]
