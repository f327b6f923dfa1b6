"""What `learnevict eval` asks: options of tasks and samples, checked before a model is opened."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import learnevict.cli.options as o
from learnevict.errors import DataError, UsageError
from learnevict.testbed import families_of

TASKS, ANSWERS = "What to evaluate", "How to evaluate"
TESTBED, PERPLEXITY = "testbed", "perplexity"
RETRIEVAL = ("needle", "multi_key", "multi_value", "multi_query", "variable_tracking", "frequent_words")
MATHEMATICS = ("gsm8k", "math500", "aime24", "aime25")
BOOKKEEPING = ("accounts", "moves")
PROCEDURES = ("table", "path")
GROUPS = {
    TESTBED: TESTBED, PERPLEXITY: PERPLEXITY, **dict.fromkeys(RETRIEVAL, "retrieval"),
    **dict.fromkeys(MATHEMATICS, "problems"), **dict.fromkeys(BOOKKEEPING, "bookkeeping"),
    **dict.fromkeys(PROCEDURES, "procedures"),
}  # fmt: skip
"""What kind of task each name is."""
PUZZLES = "reasoning-gym:"
"""How the names of tasks begin that the package reasoning-gym makes."""


OPTIONS: dict[str, Any] = {
    "tasks": o.option(TASKS,
        f"testbed; perplexity of --text; retrieval from --text: {', '.join(RETRIEVAL)}; or problems of --data: "
        f"{', '.join(MATHEMATICS)}; {', '.join(PROCEDURES)}, whose long answers follow from the prompt; "
        f"{', '.join(BOOKKEEPING)} (taught by recipes/adapt.py); or {PUZZLES}NAME, puzzles of that package. Several of one "
        "group, separated by commas.", "--tasks", "--task"),
    "families": o.option(TASKS, "Families of the testbed, separated by commas. [dim]all five[/dim]"),
    "text": o.option(TASKS, "UTF-8 file of prose, or a folder of .txt and .md files: what is read, or where facts are "
        "hidden."),
    "length": o.option(TASKS, "Tokens of each context (retrieval) or of the right answer (table, path), several by commas "
        "(1000,2000); of each stretch of the text for perplexity; for the testbed normal or long (longer than in training). "
        "[dim]1000; the whole text at once; normal[/dim]", "--length"),
    "depth": o.option(TASKS, "Where the first fact is hidden: 0 first, 1 last. [dim]drawn[/dim]", min=0.0, max=1.0),
    "question": o.option(TASKS, "Ask only after the context was read and compressed, or only with the question known "
        "while it is read. [dim]both[/dim]"),
    "max_tokens": o.option(TASKS, "Read only the beginning of the text.", min=2),
    "data": o.option(TASKS, "JSON lines of problems with answers, as GSM8K and MATH-500 have."),
    "examples": o.option(TASKS, "The same, for worked examples before every problem."),
    "shots": o.option(TASKS, "How many of them. [dim]8[/dim]", min=1),
    "chat": o.option(TASKS, "Ask under the model's chat template. [dim]yes, where it has one[/dim]",
        "--chat/--no-chat"),
    "max_new_tokens": o.option(ANSWERS, "The longest answer. [dim]24 for retrieval, 320 for bookkeeping, 64 beyond --length "
        "for table and path, 1024 for others[/dim]", min=1),
    "samples": o.option(TASKS, "Samples per task. [dim]200; 50 of other tasks than the testbed's[/dim]", min=1),
    "split": o.option(TASKS, "Which samples; training saw neither. [dim]test[/dim]"),
    "seed": o.option(TASKS, "First sample of each task. [dim]0[/dim]", min=0, max=o.LARGEST_SEED),
    "teacher": o.option(ANSWERS, "Step accuracy and loss along the reference text. [dim]yes[/dim]",
        "--teacher/--no-teacher"),
    "oracle": o.option(ANSWERS, "Compare what is kept with what the oracle would keep: recall, regret, attention "
        "kept; takes a fifth longer. [dim]yes[/dim]", "--oracle/--no-oracle"),
    "temperature": o.option(ANSWERS, "Of free answers; 0 takes the likeliest token. [dim]0[/dim]", min=0.0),
    "tries": o.option(ANSWERS, "Answers per sample if temperature > 0 (avg@k). [dim]1[/dim]", min=1),
    "batch_size": o.option(o.MACHINE, "Samples per forward. [dim]32; 8 of other tasks than the testbed's[/dim]", min=1),
}  # fmt: skip


class Split(str, Enum):
    """Which samples; training has seen none of either."""

    test = "test"
    validation = "validation"


class When(str, Enum):
    """When a question about a context is asked."""

    after = "after"
    known = "known"


@dataclass(frozen=True)
class TaskOptions:
    """What is asked of the model, beside the testbed's own families; None where nothing was said.

    Raises:
        UsageError: no such task, tasks of several groups, or options of another group.
    """

    tasks: str = TESTBED
    families: str = ""
    text: Path | None = None
    length: str | None = None
    depth: float | None = None
    question: When | None = None
    max_tokens: int | None = None
    data: Path | None = None
    examples: Path | None = None
    shots: int | None = None
    chat: bool | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        names = listed(self.tasks)
        if strange := [name for name in names if name not in GROUPS and not name.startswith(PUZZLES)]:
            raise UsageError(f"there is no task {', '.join(strange)}; choose {', '.join(GROUPS)} or {PUZZLES}NAME")
        groups = dict.fromkeys(map(group_of, names))
        if len(groups) != 1:
            raise UsageError(f"one run asks tasks of one group, not {' and '.join(groups) or 'none'}; give each a run")
        refuse(
            {name: getattr(self, name) or None for name in OWN if self.group not in OWN[name]},
            f"other tasks than {self.tasks}",
        )
        if self.group == TESTBED:
            families_of(self.families)
        if self.text is None and self.group in (PERPLEXITY, "retrieval"):
            raise UsageError(f"{self.tasks} needs a text of prose: --text FILE")
        if self.group == "problems" and (self.data is None or len(names) > 1):
            raise UsageError(
                f"give one task of problems and its file, such as --tasks gsm8k --data test.jsonl, not {self.tasks}"
            )
        for path in (self.data, self.examples):
            if path is not None and not path.exists():
                raise DataError(f"cannot read {str(path)!r}: there is no such file")
        if self.shots is not None and self.examples is None:
            raise UsageError("--shots needs the worked examples: --examples FILE")
        if self.group == TESTBED and self.length not in (None, "normal", "long"):
            raise UsageError(f"texts of the testbed are normal or long, not {self.length!r}")
        if self.group != TESTBED and not all(
            word.isdecimal() and int(word) > 1 for word in listed(self.length or "2") or ("",)
        ):
            raise UsageError(f"--length is a number of tokens, such as 1000, not {self.length!r}")
        if self.group == PERPLEXITY and len(listed(self.length or "")) > 1:
            raise UsageError("perplexity is measured on stretches of one --length; give each a run")

    @property
    def group(self) -> str:
        """Returns what kind of tasks these are: a value of GROUPS, or puzzles."""
        return group_of(listed(self.tasks)[0])

    @property
    def streamed(self) -> bool:
        """Returns whether one text is read as a whole."""
        return self.group == PERPLEXITY and self.length is None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Returns the lengths in tokens."""
        return tuple(map(int, listed(self.length or "1000")))


OWN = {
    "families": (TESTBED,), "text": (PERPLEXITY, "retrieval"),
    "length": (TESTBED, PERPLEXITY, "retrieval", "procedures"),
    "depth": ("retrieval",), "question": ("retrieval",), "max_tokens": (PERPLEXITY,), "data": ("problems",),
    "examples": ("problems",),
    "shots": ("problems",), "chat": ("retrieval", "problems", "puzzles", "procedures"),
    "max_new_tokens": ("retrieval", "problems", "puzzles", "bookkeeping", "procedures"),
}  # fmt: skip
"""Options of TaskOptions, and the groups of tasks that have them."""
WITHOUT = {
    "retrieval": ("teacher", "oracle", "free", "temperature", "tries", "keep_prompt"), "problems": (), "bookkeeping": (),
    "procedures": (),
    "puzzles": ("teacher", "oracle"), PERPLEXITY: ("teacher", "free", "temperature", "tries", "keep_prompt"), TESTBED: (),
}  # fmt: skip
"""Options of samples and answers that would change nothing in a group of tasks (a context that is a prompt kept whole would be
a full cache)."""


@dataclass(frozen=True)
class SampleOptions:
    """Which samples are read, and how answers are evaluated; None where nothing was said."""

    samples: int | None = None
    split: Split | None = None
    seed: int | None = None
    teacher: bool | None = None
    oracle: bool | None = None
    temperature: float | None = None
    tries: int | None = None
    batch_size: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What was said, by the names of evals.plan.Plan and evals.tasks.family_tasks."""
        said = {name: value for name, value in vars(self).items() if value is not None}
        plain = {name: value.value if isinstance(value, Enum) else value for name, value in said.items()}
        return {("num_samples" if name == "samples" else name): value for name, value in plain.items()}


FLAGS = {
    "num_samples": "--samples", "teacher": "--teacher/--no-teacher", "oracle": "--oracle/--no-oracle",
    "free": "--free/--no-free",
}  # fmt: skip


def refuse(values: dict[str, Any], whose: str) -> None:
    """Raises a UsageError about options that this task would ignore."""
    flags = [FLAGS.get(name, "--" + name.replace("_", "-")) for name, value in values.items() if value is not None]
    if flags:
        raise UsageError(f"{' and '.join(flags)} {'belong' if len(flags) > 1 else 'belongs'} to {whose}")


def group_of(task: str) -> str:
    """Returns what kind of task a name is of."""
    return "puzzles" if task.startswith(PUZZLES) else GROUPS[task]


def listed(text: str) -> tuple[str, ...]:
    """Returns the names between commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
