"""Options that several commands share, and how a function becomes a command: its parameters are the command's options.

What an option means stands in OPTIONS of its module, by the parameter's name or as "function.name", and else in OPTIONS here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from learnevict import methods, testbed
from learnevict.cli.output import INTERRUPTED, say
from learnevict.config import Budget, parse_store
from learnevict.errors import DataError, UsageError
from learnevict.infer.model.catalogue import folder_of_gates, folder_of_model
from learnevict.infer.prompts import decode

PROMPT, POLICY, MACHINE, OUTPUT = "What to read", "Who evicts", "Model and machine", "Output"
LARGEST_SEED = 2**63 - 1
"""Half of what torch takes: rows of a batch add to it."""


def option(panel: str | None, told: str, *names: str, **more: Any) -> Any:
    """Returns an option in a panel of the help page."""
    return typer.Option(*names, help=told, rich_help_panel=panel, **more)


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


class KernelUse(str, Enum):
    """Who computes decode steps."""

    auto = "auto"
    on = "on"
    off = "off"


OPTIONS: dict[str, Any] = {
    "prompt": option(PROMPT, "The prompt itself.", "--prompt", "-p"),
    "task": option(PROMPT, "A testbed prompt: program, ledger, recall, procedure or dialogue; --seed picks which."),
    "seed": option(PROMPT, "Of the task, and of the draws if temperature > 0.", min=0, max=LARGEST_SEED),
    "chat": option(PROMPT, "Put the prompt into the model's chat template.", "--chat"),
    "allow_pickle": option(MACHINE, "Read a model's weights from pickles (.bin) too; otherwise safetensors only.",
        "--allow-pickle"),
    "method": option(POLICY, "A name from [bold]learnevict list[/bold], or the import path of your own module. "
        "Without method, gates and budget the cache stays full."),
    "budget": option(POLICY, "Slots kept per layer and kv head: 512 (tokens), 25% or 1/4 (of the tokens read) or "
        "64MiB (keys and values of one row).", "--budget", "-b"),
    "checkpoint": option(POLICY, "Trained gates: a folder, or user/repo or user/repo@revision on the Hub. The testbed "
        "brings its own.", "--ckpt"),
    "keep_prompt": option(POLICY, "Never evict the prompt; the budget counts the rest.", "--keep-prompt"),
    "variant": option(POLICY, "A method's variant, where repositories differ."),
    "overwrite": option(OUTPUT, "Replace files that learnevict did not write.", "--overwrite"),
    "as_json": option(OUTPUT, "One JSON object on standard output.", "--json"),
    "allocation": option(POLICY, "How the budget is shared out: equal, pooled (all layers and heads compete by "
        "score), or a file of [bold]learnevict profile[/bold]. [dim]the method's own[/dim]"),
    "store": option(POLICY, "int8, int4, int2: all but guards and fresh tokens in so many bits; 50%+int4: half of the budget "
        "in full precision, losers demoted to 4 bits. The budget's bytes then hold more tokens. [dim]drop[/dim]"),
    "schedule": option(POLICY, "blocks also evicts while the prompt is read (memory bounded), prefill_end first when "
        "it has been read, prefill_only then never again.", metavar="WHEN"),
    "slack": option(POLICY, "Tokens between evictions; 0 evicts at every step. [dim]128, 16 on the testbed[/dim]", min=0),
    "recent": option(POLICY, "Last tokens that always stay. [dim]the method's own, 8 on the testbed[/dim]", min=0),
    "sinks": option(POLICY, "First tokens that always stay. [dim]4[/dim]", min=0),
    "allow_other_base": option(POLICY, "Accept gates trained on other weights.", "--allow-other-base"),
    "dtype": option(MACHINE, "auto keeps what the model was saved in (testbed: fp32)."),
    "device": option(MACHINE, "auto, cpu, cuda, cuda:1, mps."),
    "kernels": option(MACHINE, "Decode by Triton kernels where they can serve a layer. auto: on a CUDA device with Triton; "
        "[bold]learnevict doctor[/bold] says whether that is so here."),
    "model": option(MACHINE, "testbed (bundled), a local folder, a name of `learnevict model list`, or a Hub id "
        "(downloaded because you ask for it). Code that comes with a model is never run.", "--model", "-m"),
}  # fmt: skip


@dataclass(frozen=True)
class PromptOptions:
    """One prompt: its text, or a task of the testbed. Raises UsageError: a chat template for a task."""

    prompt: str | None = None
    task: str | None = None
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        if self.task is not None:
            testbed.families_of(self.task or "none")
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
    """Which model is opened, where, and in which number format; a ModelError if it is neither here nor a name of the Hub."""

    model: str = "testbed"
    device: str = "auto"
    dtype: Precision = Precision.auto
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.model != "testbed":
            folder_of_model(self.model)


@dataclass(frozen=True)
class EvictionOptions:
    """What the user said about eviction, checked as far as that goes without a model; None where nothing was said.

    Raises:
        BudgetError: a budget that cannot be parsed.
        GateError, DataError: no gates there, no file of shares there.
        UsageError: an unknown method, a budget without a method or the reverse, options of an eviction not asked for.
    """

    method: str | None = None
    budget: str | None = None
    checkpoint: str | None = None
    allow_other_base: bool = False
    sinks: int | None = None
    recent: int | None = None
    slack: int | None = None
    schedule: When | None = None
    allocation: str | None = None
    store: str | None = None
    keep_prompt: bool = False
    variant: str | None = None

    def __post_init__(self) -> None:
        parsed = None if self.budget is None else Budget.parse(self.budget)
        if self.method is not None:
            check_method(self.method)
        if self.checkpoint is not None:
            folder_of_gates(self.checkpoint)
        check_allocation(self.allocation)
        check_store(self.store)
        written = [f"--{name}" if name != "prompt" else "--keep-prompt" for name in self.given]
        written += ["--allow-other-base"] * self.allow_other_base
        if self.full and written:
            raise UsageError(
                f"{' and '.join(written)} without --budget: the cache would stay full; give --budget 48, and "
                "--method or --ckpt to choose who evicts"
            )
        if self.method == "full" and not self.full:
            raise UsageError(
                "method full keeps everything, so a budget means nothing to it; drop --budget or name another method"
            )
        if parsed is None and not self.full:
            raise UsageError("say how much may be kept: --budget 512 (tokens), 25%, 1/4 or 64MiB")
        if self.golden and (self.variant or self.store):
            raise UsageError("golden has neither variants nor stores; drop --variant and --store")

    @property
    def full(self) -> bool:
        """Whether nothing is to be evicted."""
        return self.method in (None, "full") and self.checkpoint is None and self.budget is None

    @property
    def golden(self) -> bool:
        """Whether the oracle evicts, which has to see a text in full first."""
        return self.method == "golden" and self.checkpoint is None

    @property
    def given(self) -> dict[str, Any]:
        """Arguments for the method's `policy` that the user gave."""
        found = {**self.settings, "store": self.store, "prompt": self.keep_prompt or None}
        names = ("sinks", "recent", "slack", "schedule", "allocation", "store", "prompt", "variant")
        return {name: found[name] for name in names if found[name] is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that was said, as JSON knows it; a resumed file of answers compares it."""
        found = asdict(self)
        schedule = None if self.schedule is None else self.schedule.value
        if self.store is None:
            del found["store"]  # answers that were begun before there was any
        return {**found, "schedule": schedule, "prompt": found.pop("keep_prompt") or None}


def check_method(name: str) -> None:
    """Raises a UsageError for a method that is not there; one of the user's own is imported, so that gates may be of it."""
    if name not in methods.METHODS:
        methods.load(name)


def check_allocation(word: str | None) -> None:
    """Raises a DataError for a file of shares that is not there."""
    if word not in (None, "equal", "pooled") and not Path(word).is_file():
        raise DataError(f"there is no file {word!r} of shares; give equal, pooled, or a file of learnevict profile")


def check_store(word: str | None) -> None:
    """Raises a UsageError for a store that is unknown."""
    if word is not None:
        parse_store(word)


def path(word: str | Path) -> Path:
    """Returns a path that was given on a command line, or that is the default.

    Raises:
        BadParameter: it is empty, as "$UNSET" is; pathlib would take that for the current folder.
    """
    if not word:
        raise typer.BadParameter("it is empty; name a file or a folder")
    return Path(word)


def _annotated(owner: Callable[..., None] | type) -> dict[str, Any]:
    """Returns the types of a command's parameters or of a dataclass, with what OPTIONS of its module, or of this one, says."""
    own, found = vars(sys.modules[owner.__module__]).get("OPTIONS", {}), get_type_hints(owner, include_extras=True)
    for name, hint in found.items():
        said = own.get(f"{owner.__name__}.{name}") or own.get(name) or OPTIONS.get(name)
        if said is not None and not is_dataclass(hint):
            said.parser = path if Path in (hint, *get_args(hint)) else None
            found[name] = Annotated[hint, said]
    return found


def prepared(function: Callable[..., None]) -> Callable[..., None]:
    """Returns a command for typer: parameters that are dataclasses of options become these options.

    A command that is stopped with Ctrl-C says so and exits with 130.
    """
    hints = _annotated(function)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if not is_dataclass(hints[name]):
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name] = hints[name]
        types = _annotated(hints[name])
        for one in fields(groups[name]):
            how: Any = {"default": one.default, "annotation": types[one.name]}
            parameters.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, **how))

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
