"""Options of `learnevict eval` that no other command has."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from learnevict.cli.options import LARGEST_SEED, MACHINE, OUTPUT, POLICY

TASKS, ANSWERS = "What to judge", "How to judge"


class Task(str, Enum):
    """What is judged."""

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


Which = Annotated[Task, typer.Option("--task", help="The testbed, or perplexity of --text.", rich_help_panel=TASKS)]
Families = Annotated[
    str, typer.Option(help="Task families, separated by commas. [dim]all five[/dim]", rich_help_panel=TASKS)
]
Samples = Annotated[int | None, typer.Option(min=1, help="Samples per family. [dim]200[/dim]", rich_help_panel=TASKS)]
Part = Annotated[
    Split | None,
    typer.Option("--split", help="Which samples; training saw neither. [dim]test[/dim]", rich_help_panel=TASKS),
]
Long = Annotated[
    Length | None,
    typer.Option("--length", help="long: longer than in training. [dim]normal[/dim]", rich_help_panel=TASKS),
]
FirstSeed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, max=LARGEST_SEED, help="First sample of each family. [dim]0[/dim]", rich_help_panel=TASKS
    ),
]
Text = Annotated[Path | None, typer.Option(help="UTF-8 file, for --task perplexity.", rich_help_panel=TASKS)]
MaxTokens = Annotated[
    int | None, typer.Option(min=2, help="Judge only the beginning of the text.", rich_help_panel=TASKS)
]
Methods = Annotated[
    str,
    typer.Option(
        "--methods",
        "--method",
        help="Who evicts, separated by commas. [dim]full, random, lexical, some heuristics, golden, foresightkv[/dim]",
        rich_help_panel=POLICY,
    ),
]
Budgets = Annotated[
    str,
    typer.Option(
        "--budgets",
        "--budget",
        "-b",
        help="Slots per layer and kv head, separated by commas: 1/4 (of the mean length), 64 (tokens) or 25% (of the "
        "tokens read so far).",
        rich_help_panel=POLICY,
    ),
]
Checkpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--ckpt",
        help="Trained gates: a folder or a Hub id; may be repeated. The testbed brings its own.",
        rich_help_panel=POLICY,
    ),
]
Tuned = Annotated[
    bool,
    typer.Option(
        "--tuned", help="Heuristics with settings tuned on validation samples of the testbed.", rich_help_panel=POLICY
    ),
]
KeepPrompt = Annotated[
    bool,
    typer.Option(
        "--keep-prompt",
        "--prompt-protect",
        help="Never evict the prompt; budgets count the rest, and 1/4 is of the mean answer.",
        rich_help_panel=POLICY,
    ),
]
Teacher = Annotated[
    bool | None,
    typer.Option(
        "--teacher/--no-teacher",
        help="Step accuracy and loss along the reference text. [dim]yes[/dim]",
        rich_help_panel=ANSWERS,
    ),
]
Oracle = Annotated[
    bool | None,
    typer.Option(
        "--oracle/--no-oracle",
        help="Compare what is kept with what the oracle would keep: recall, regret, attention kept; takes a fifth longer. "
        "[dim]yes[/dim]",
        rich_help_panel=ANSWERS,
    ),
]
Free = Annotated[
    bool | None,
    typer.Option(
        "--free/--no-free",
        help="Exact match of the model's own answers. [dim]of the full cache only[/dim]",
        rich_help_panel=ANSWERS,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="Of free answers; 0 takes the likeliest token. [dim]0[/dim]", rich_help_panel=ANSWERS),
]
Tries = Annotated[
    int | None,
    typer.Option(min=1, help="Answers per sample if temperature > 0 (avg@k). [dim]1[/dim]", rich_help_panel=ANSWERS),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Samples per forward. [dim]32[/dim]", rich_help_panel=MACHINE)
]
AsJson = Annotated[bool, typer.Option("--json", help="Rows as JSON lines on standard output.", rich_help_panel=OUTPUT)]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="JSONL file for rows; per-sample numbers go beside it.", rich_help_panel=OUTPUT),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with --out: skip what is finished, add what is new.", rich_help_panel=OUTPUT),
]
