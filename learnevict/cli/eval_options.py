"""Options of `learnevict eval`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import typer

from learnevict.cli.options import LARGEST_SEED, MACHINE, POLICY, OtherBase, Recent, Sinks, Slack

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

    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples per family. [dim]200[/dim]", rich_help_panel=TASKS)
    ] = None
    split: Annotated[
        Split | None,
        typer.Option("--split", help="Which samples; training saw neither. [dim]test[/dim]", rich_help_panel=TASKS),
    ] = None
    length: Annotated[
        Length | None,
        typer.Option("--length", help="long: longer than in training. [dim]normal[/dim]", rich_help_panel=TASKS),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=LARGEST_SEED, help="First sample of each family. [dim]0[/dim]", rich_help_panel=TASKS
        ),
    ] = None
    teacher: Annotated[
        bool | None,
        typer.Option(
            "--teacher/--no-teacher",
            help="Step accuracy and loss along the reference text. [dim]yes[/dim]",
            rich_help_panel=ANSWERS,
        ),
    ] = None
    oracle: Annotated[
        bool | None,
        typer.Option(
            "--oracle/--no-oracle",
            help="Compare what is kept with what the oracle would keep: recall, regret, attention kept; takes a fifth longer. "
            "[dim]yes[/dim]",
            rich_help_panel=ANSWERS,
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Of free answers; 0 takes the likeliest token. [dim]0[/dim]", rich_help_panel=ANSWERS
        ),
    ] = None
    tries: Annotated[
        int | None,
        typer.Option(
            min=1, help="Answers per sample if temperature > 0 (avg@k). [dim]1[/dim]", rich_help_panel=ANSWERS
        ),
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples per forward. [dim]32[/dim]", rich_help_panel=MACHINE)
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """What was said, by the names of an `evals.plan.Plan`."""
        found = {("num_samples" if name == "samples" else name): value for name, value in vars(self).items()}
        return {
            name: value.value if isinstance(value, Enum) else value
            for name, value in found.items()
            if value is not None
        }


@dataclass(frozen=True)
class MethodOptions:
    """The methods to compare and their settings."""

    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            "--method",
            help="Who evicts, separated by commas. [dim]full, random, lexical, some heuristics, golden, foresightkv[/dim]",
            rich_help_panel=POLICY,
        ),
    ] = ""
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets",
            "--budget",
            "-b",
            help="Slots per layer and kv head, separated by commas: 1/4 (of the mean length), 64 (tokens) or 25% (of the "
            "tokens read so far).",
            rich_help_panel=POLICY,
        ),
    ] = "1/4"
    ckpt: Annotated[
        list[str] | None,
        typer.Option(
            "--ckpt",
            help="Trained gates: a folder or a Hub id; may be repeated. The testbed brings its own.",
            rich_help_panel=POLICY,
        ),
    ] = None
    tuned: Annotated[
        bool,
        typer.Option(
            "--tuned",
            help="Heuristics with settings tuned on validation samples of the testbed.",
            rich_help_panel=POLICY,
        ),
    ] = False
    allow_other_base: OtherBase = False
    sinks: Sinks = None
    recent: Recent = None
    slack: Slack = None
    keep_prompt: Annotated[
        bool,
        typer.Option(
            "--keep-prompt",
            "--prompt-protect",
            help="Never evict the prompt; budgets count the rest, and 1/4 is of the mean answer.",
            rich_help_panel=POLICY,
        ),
    ] = False
