"""Options that several commands share, each with one meaning and one help text; `prepared` makes a command of a function."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from learnevict.cli.output import INTERRUPTED, say
from learnevict.config import Budget
from learnevict.errors import UsageError
from learnevict.infer.prompts.text_files import decode

PROMPT, POLICY, MACHINE, OUTPUT = "What to read", "Who evicts", "Model and machine", "Output"
LARGEST_SEED = 2**63 - 1
"""Half of what torch takes: rows of a batch add to it."""


class When(str, Enum):
    """When evictions fall."""

    blocks = "blocks"
    prefill_end = "prefill_end"
    prefill_only = "prefill_only"


class Precision(str, Enum):
    """Number formats of weights and cache."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="testbed (bundled), a local folder, a name of `learnevict model list`, or a Hub id (downloaded because you "
        "ask for it). Code that comes with a model is never run.",
        rich_help_panel=MACHINE,
    ),
]
Dtype = Annotated[
    Precision, typer.Option(help="auto keeps what the model was saved in (testbed: fp32).", rich_help_panel=MACHINE)
]
OtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Accept gates trained on other weights.", rich_help_panel=POLICY)
]
Sinks = Annotated[int | None, typer.Option(help="First tokens that always stay. [dim]4[/dim]", rich_help_panel=POLICY)]
Recent = Annotated[
    int | None,
    typer.Option(
        help="Last tokens that always stay. [dim]the method's own, 8 on the testbed[/dim]", rich_help_panel=POLICY
    ),
]
Slack = Annotated[
    int | None,
    typer.Option(
        help="Tokens between evictions; 0 evicts at every step. [dim]128, 16 on the testbed[/dim]",
        rich_help_panel=POLICY,
    ),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer.", rich_help_panel=MACHINE)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.", rich_help_panel=MACHINE)]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Prompts of a --batch at a time. [dim]8[/dim]", rich_help_panel=MACHINE)
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files that learnevict did not write.", rich_help_panel=OUTPUT)
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File to write.", rich_help_panel=OUTPUT)]


@dataclass(frozen=True)
class PromptOptions:
    """One prompt: its text, or a task of the testbed.

    Raises:
        UsageError: a chat template for a task.
    """

    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt itself.", rich_help_panel=PROMPT)] = (
        None
    )
    task: Annotated[
        str | None,
        typer.Option(
            help="A testbed prompt: program, ledger, recall, procedure or dialogue; --seed picks which.",
            rich_help_panel=PROMPT,
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, help="Of the task, and of the draws if temperature > 0.", rich_help_panel=PROMPT
        ),
    ] = 0
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.", rich_help_panel=PROMPT)
    ] = False

    def __post_init__(self) -> None:
        if self.chat and self.task is not None:
            raise UsageError("--chat means nothing to --task, whose prompts are conversations already; drop --chat")

    def row(self) -> dict[str, Any]:
        """Returns the prompt as a row of a batch file; the text "-" stands for standard input.

        Raises:
            DataError: standard input is not UTF-8.
        """
        if self.task is not None:
            return {"task": self.task, "seed": self.seed}
        text = self.prompt or ""
        return {"prompt": decode(sys.stdin.buffer.read(), "standard input") if text == "-" else text}


@dataclass(frozen=True)
class ModelOptions:
    """Which model is opened, where, and in which number format."""

    model: Model = "testbed"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=MACHINE)] = "auto"
    dtype: Dtype = Precision.auto
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read a model's weights from pickles (.bin) too; otherwise safetensors only.",
            rich_help_panel=MACHINE,
        ),
    ] = False


@dataclass(frozen=True)
class EvictionOptions:
    """What the user said about eviction; None where nothing was said.

    Raises:
        BudgetError: a budget that cannot be parsed.
    """

    method: Annotated[
        str | None,
        typer.Option(
            help="A name from [bold]learnevict list[/bold], or the import path of your own module. Without method, gates "
            "and budget the cache stays full.",
            rich_help_panel=POLICY,
        ),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="Slots kept per layer and kv head: 512 (tokens), 25% or 1/4 (of the tokens read) or 64MiB (keys and "
            "values of one row).",
            rich_help_panel=POLICY,
        ),
    ] = None
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--ckpt",
            help="Trained gates: a folder, or user/repo or user/repo@revision on the Hub. The testbed brings its own.",
            rich_help_panel=POLICY,
        ),
    ] = None
    allow_other_base: OtherBase = False
    sinks: Sinks = None
    recent: Recent = None
    slack: Slack = None
    schedule: Annotated[
        When | None,
        typer.Option(
            metavar="WHEN",
            help="blocks also evicts while the prompt is read (memory bounded), prefill_end first when it has been read, "
            "prefill_only then never again.",
            rich_help_panel=POLICY,
        ),
    ] = None
    keep_prompt: Annotated[
        bool,
        typer.Option(
            "--keep-prompt", help="Never evict the prompt; the budget counts the rest.", rich_help_panel=POLICY
        ),
    ] = False
    variant: Annotated[
        str | None, typer.Option(help="A method's variant, where repositories differ.", rich_help_panel=POLICY)
    ] = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            Budget.parse(self.budget)

    @property
    def given(self) -> dict[str, Any]:
        """Arguments for the method's `policy` that the user gave."""
        found = {**self.settings, "prompt": self.keep_prompt or None}
        names = ("sinks", "recent", "slack", "schedule", "prompt", "variant")
        return {name: found[name] for name in names if found[name] is not None}

    @property
    def flags(self) -> list[str]:
        """What was given as it is written, such as "--slack"."""
        written = [f"--{name}" if name != "prompt" else "--keep-prompt" for name in self.given]
        return written + ["--allow-other-base"] * self.allow_other_base

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that was said, as JSON knows it; a resumed file of answers compares it."""
        found = asdict(self)
        schedule = None if self.schedule is None else self.schedule.value
        return {**found, "schedule": schedule, "prompt": found.pop("keep_prompt") or None}


def path(word: str) -> Path:
    """Returns a path that was given on a command line.

    Raises:
        BadParameter: it is empty, as "$UNSET" is; pathlib would take that for the current folder.
    """
    if not word:
        raise typer.BadParameter("it is empty; name a file or a folder")
    return Path(word)


def prepared(function: Callable[..., None]) -> Callable[..., None]:
    """Returns a command for typer: parameters that are dataclasses of options become these options.

    A command that is stopped with Ctrl-C says so and exits with 130.
    """
    hints = get_type_hints(function, include_extras=True)
    for hint in hints.values():
        if get_origin(hint) is Annotated and Path in (hint.__origin__, *get_args(hint.__origin__)):
            hint.__metadata__[0].parser = path
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if not is_dataclass(hints[name]):
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name] = hints[name]
        types = get_type_hints(hints[name], include_extras=True)
        for one in fields(groups[name]):
            parameters.append(
                inspect.Parameter(
                    one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=types[one.name]
                )
            )

    @wraps(function)
    def run(**options: Any) -> None:
        for name, kind in groups.items():
            options[name] = kind(**{one.name: options.pop(one.name) for one in fields(kind)})
        try:
            function(**options)
        except KeyboardInterrupt as error:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from error

    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
