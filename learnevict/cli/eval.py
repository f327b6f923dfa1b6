"""learnevict eval and report: how much accuracy a small cache costs, on the testbed's tasks or on your own text."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

import learnevict.cli.options as o
from learnevict.cli.output import INTERRUPTED, say, show_rows, tell
from learnevict.config import Budget
from learnevict.errors import DataError, UsageError
from learnevict.files import special
from learnevict.infer.prompts.text_files import read_file

TASKS, ANSWERS = "What to evaluate", "How to evaluate"


class Task(str, Enum):
    """What is evaluated."""

    testbed = "testbed"
    perplexity = "perplexity"


class Split(str, Enum):
    """Which samples; training has seen none of either."""

    test = "test"
    validation = "validation"


class Length(str, Enum):
    """Lengths of texts."""

    normal = "normal"
    long = "long"


@dataclass(frozen=True)
class SampleOptions:
    """Which samples of the testbed are read, and how their answers are evaluated; None where nothing was said."""

    samples: Annotated[int | None, o.option(TASKS, "Samples per family. [dim]200[/dim]", min=1)] = None
    split: Annotated[Split | None, o.option(TASKS, "Which samples; training saw neither. [dim]test[/dim]")] = None
    length: Annotated[
        Length | None, o.option(TASKS, "long: longer than in training. [dim]normal[/dim]", "--length")
    ] = None
    seed: Annotated[
        int | None, o.option(TASKS, "First sample of each family. [dim]0[/dim]", min=0, max=o.LARGEST_SEED)
    ] = None
    teacher: Annotated[
        bool | None,
        o.option(ANSWERS, "Step accuracy and loss along the reference text. [dim]yes[/dim]", "--teacher/--no-teacher"),
    ] = None
    oracle: Annotated[
        bool | None,
        o.option(
            ANSWERS,
            "Compare what is kept with what the oracle would keep: recall, regret, attention kept; takes a fifth longer. "
            "[dim]yes[/dim]",
            "--oracle/--no-oracle",
        ),
    ] = None
    temperature: Annotated[
        float | None, o.option(ANSWERS, "Of free answers; 0 takes the likeliest token. [dim]0[/dim]", min=0.0)
    ] = None
    tries: Annotated[
        int | None, o.option(ANSWERS, "Answers per sample if temperature > 0 (avg@k). [dim]1[/dim]", min=1)
    ] = None
    batch_size: Annotated[int | None, o.option(o.MACHINE, "Samples per forward. [dim]32[/dim]", min=1)] = None

    @property
    def given(self) -> dict[str, Any]:
        """What was said, by the names of evals.plan.Plan and evals.tasks.family_tasks."""
        said = {name: value for name, value in vars(self).items() if value is not None}
        plain = {name: value.value if isinstance(value, Enum) else value for name, value in said.items()}
        return {("num_samples" if name == "samples" else name): value for name, value in plain.items()}


@dataclass(frozen=True)
class MethodOptions:
    """The methods to compare and their settings.

    Raises:
        UsageError: no such method, except for names of gates that ship with the testbed.
        BudgetError: a budget that is not understood.
    """

    methods: Annotated[
        str,
        o.option(
            o.POLICY,
            "Who evicts, separated by commas. [dim]full, random, lexical, some heuristics, golden, foresightkv[/dim]",
            "--methods",
            "--method",
        ),
    ] = ""
    budgets: Annotated[
        str,
        o.option(
            o.POLICY,
            "Slots per layer and kv head, separated by commas: 1/4 (of the mean length), 64 (tokens) or 25% (of the tokens "
            "read so far).",
            "--budgets",
            "--budget",
            "-b",
        ),
    ] = "1/4"
    ckpt: Annotated[
        list[str] | None,
        o.option(
            o.POLICY,
            "Trained gates: a folder or a Hub id; may be repeated. The testbed brings its own.",
            "--ckpt",
        ),
    ] = None
    tuned: Annotated[
        bool,
        o.option(o.POLICY, "Heuristics with settings tuned on validation samples of the testbed.", "--tuned"),
    ] = False
    allow_other_base: o.OtherBase = False
    sinks: o.Sinks = None
    recent: o.Recent = None
    slack: o.Slack = None
    keep_prompt: Annotated[
        bool,
        o.option(
            o.POLICY,
            "Never evict the prompt; budgets count the rest, and 1/4 is of the mean answer.",
            "--keep-prompt",
            "--prompt-protect",
        ),
    ] = False

    def __post_init__(self) -> None:
        for budget in listed(self.budgets):
            Budget.parse(budget)


def evaluate(
    *,
    task: Annotated[Task, o.option(TASKS, "The testbed, or perplexity of --text.", "--task")] = Task.testbed,
    families: Annotated[str, o.option(TASKS, "Task families, separated by commas. [dim]all five[/dim]")] = "",
    samples: SampleOptions,
    text: Annotated[Path | None, o.option(TASKS, "UTF-8 file, for --task perplexity.")] = None,
    max_tokens: Annotated[int | None, o.option(TASKS, "Read only the beginning of the text.", min=2)] = None,
    methods: MethodOptions,
    free: Annotated[
        bool | None,
        o.option(
            ANSWERS, "Exact match of the model's own answers. [dim]of the full cache only[/dim]", "--free/--no-free"
        ),
    ] = None,
    model: o.ModelOptions,
    as_json: Annotated[bool, o.option(o.OUTPUT, "Rows as JSON lines on standard output.", "--json")] = False,
    out: Annotated[
        Path | None, o.option(o.OUTPUT, "JSONL file for rows; per-sample numbers go beside it.", "--out", "-o")
    ] = None,
    resume: Annotated[
        bool, o.option(o.OUTPUT, "Go on with --out: skip what is finished, add what is new.", "--resume")
    ] = False,
) -> None:
    """Evaluate methods under small caches: accuracy with intervals, exact match, loss, nearness to the oracle, bytes.

    Examples:

        learnevict eval --methods full

        learnevict eval --families program --methods random,h2o,golden --budgets 1/4,1/8 --samples 48 --out r.jsonl

        learnevict eval --task perplexity --text book.txt --model Qwen/Qwen3-0.6B --method snapkv --budget 512

    An interrupted run goes on with --resume. `learnevict report r.jsonl` makes a table and a plot.

    "Loss recovered" is 0 where a method loses as much as random eviction and 1 where it loses as little as golden. (The
    recovery of docs/results.md is another: of step accuracy, from the best heuristic.)
    """
    given, content = samples.given, ""
    for words in (families, methods.methods, methods.budgets):
        _warn_of_doubles(words)
    if task is Task.perplexity:
        flags = {
            "families": families or None, "keep_prompt": methods.keep_prompt or None, "tuned": methods.tuned or None,
            "free": free, "resume": resume or None,
        }  # fmt: skip
        _refuse({**given, **flags}, "the testbed, not to --task perplexity")
        if text is None:
            raise UsageError("--task perplexity needs a text: --text FILE")
        content = read_text(text)
    else:
        _refuse({"text": text, "max_tokens": max_tokens}, "--task perplexity")
        if resume and out is None:
            raise UsageError("--resume needs the --out of the run to go on with")
    from learnevict.cli.evaluation import compare, compare_on_text
    from learnevict.evals.records import log_path, read_rows

    if text is not None:
        with _told(out, out, "to evaluate the rest choose another --out"):
            rows = compare_on_text(model, methods, (text.name, content), max_tokens, out)
    else:
        given["free"] = {None: "full", True: "all", False: "none"}[free]
        with _told(out, out and log_path(out), "the same command with --resume goes on"):
            rows = compare(model, methods, listed(families), given, out, resume)
    if as_json:
        for row in rows:
            tell(json.dumps(row))
    else:
        show_rows(rows)
    if out is not None and not special(out):
        say(f"{len(read_rows(out))} rows are in {out}; table and plot: learnevict report {out} --out DIR")


def read_text(path: Path) -> str:
    """Returns the text of the user's file.

    Raises:
        DataError: no such file, not UTF-8, or empty.
    """
    text = read_file(path)
    if not text.strip():
        raise DataError(f"{str(path)!r} is empty; give a text of at least a few words")
    return text


FLAGS = {
    "num_samples": "--samples", "teacher": "--teacher/--no-teacher", "oracle": "--oracle/--no-oracle",
    "free": "--free/--no-free",
}  # fmt: skip


def _refuse(values: dict[str, Any], whose: str) -> None:
    """Raises a UsageError about options that this task would ignore."""
    flags = [FLAGS.get(name, "--" + name.replace("_", "-")) for name, value in values.items() if value is not None]
    if flags:
        raise UsageError(f"{' and '.join(flags)} {'belong' if len(flags) > 1 else 'belongs'} to {whose}")


@contextmanager
def _told(out: Path | None, kept: Path | None, remedy: str) -> Generator[None]:
    """Says what an interruption leaves behind."""
    try:
        yield
    except KeyboardInterrupt as error:
        if out is None:
            say("interrupted: nothing is kept; with --out FILE what is finished would be")
        elif kept is None or not kept.exists():
            say("interrupted before anything was finished")
        else:
            say(f"interrupted: what is finished is kept in {kept}; {remedy}")
        raise typer.Exit(INTERRUPTED) from error


def listed(text: str) -> tuple[str, ...]:
    """Returns the names between commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _warn_of_doubles(text: str) -> None:
    given = [word.strip() for word in text.split(",") if word.strip()]
    if again := [word for word in dict.fromkeys(given) if given.count(word) > 1]:
        say(f"warning: {', '.join(again)} named more than once; counted once")


def report(
    rows: Annotated[list[Path], typer.Argument(help="JSONL files of `learnevict eval`, or report.json of the demo.")],
    out: Annotated[
        Path | None, o.option(o.OUTPUT, "Folder for table.md, table.csv and accuracy.png.", "--out", "-o")
    ] = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Make a Markdown table, a CSV file and a plot of accuracy against budget.

    Examples:

        learnevict report rows.jsonl --out report

        learnevict report checkpoints/demo/report.json

    Without --out only the table is printed. An earlier report in the folder is replaced.
    """
    from learnevict.evals.records import read_rows
    from learnevict.evals.report import markdown, write_report

    found = [row for path in rows for row in read_rows(path)]
    if out is None:
        tell(markdown(found).rstrip("\n"))
        return
    for path in write_report(found, out, overwrite=overwrite):
        say(f"wrote {path}")
