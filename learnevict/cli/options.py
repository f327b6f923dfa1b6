"""Options that several commands share, each with one meaning and one help text."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

PROMPT, POLICY, MACHINE, OUTPUT = "What to read", "Who evicts", "Model and machine", "Output"


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
        help="testbed (bundled), a local folder, or a Hub id (downloaded because you ask for it). Code that comes "
        "with a model is never run.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=MACHINE)]
Dtype = Annotated[
    Precision, typer.Option(help="auto keeps what the model was saved in (testbed: fp32).", rich_help_panel=MACHINE)
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read a model's weights from pickles (.bin) too; otherwise safetensors only.",
        rich_help_panel=MACHINE,
    ),
]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt itself.", rich_help_panel=PROMPT)]
Task = Annotated[
    str | None,
    typer.Option(
        help="A testbed prompt: program, ledger, recall, procedure or dialogue; --seed picks which.",
        rich_help_panel=PROMPT,
    ),
]
LARGEST_SEED = 2**63 - 1
"""Half of what torch takes: rows of a batch add to it."""
Seed = Annotated[
    int,
    typer.Option(
        min=0, max=LARGEST_SEED, help="Of the task, and of the draws if temperature > 0.", rich_help_panel=PROMPT
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put the prompt into the model's chat template.", rich_help_panel=PROMPT)
]
Method = Annotated[
    str | None,
    typer.Option(
        help="A name from [bold]learnevict list[/bold], or the import path of your own module. Without method, gates "
        "and budget the cache stays full.",
        rich_help_panel=POLICY,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--ckpt",
        help="Trained gates: a folder, or user/repo or user/repo@revision on the Hub. The testbed brings its own.",
        rich_help_panel=POLICY,
    ),
]
OtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Accept gates trained on other weights.", rich_help_panel=POLICY)
]
Kept = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        help="Slots kept per layer and kv head: 512 (tokens), 25% or 1/4 (of the tokens read) or 64MiB (keys and values of "
        "one row).",
        rich_help_panel=POLICY,
    ),
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
Schedule = Annotated[
    When | None,
    typer.Option(
        metavar="WHEN",
        help="blocks also evicts while the prompt is read (memory bounded), prefill_end first when it has been read, "
        "prefill_only then never again.",
        rich_help_panel=POLICY,
    ),
]
KeepPrompt = Annotated[
    bool,
    typer.Option("--keep-prompt", help="Never evict the prompt; the budget counts the rest.", rich_help_panel=POLICY),
]
Variant = Annotated[
    str | None, typer.Option(help="A method's variant, where repositories differ.", rich_help_panel=POLICY)
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
