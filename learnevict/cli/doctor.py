"""learnevict doctor: what is installed, what it runs on, and how much memory a model will take."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Annotated, Any

import typer

import learnevict.cli.options as o
from learnevict import __version__
from learnevict.cli.opened_model import COMPARISON, TESTBED
from learnevict.cli.output import cell, for_tables, size, tell

EXTRAS = ("datasets", "trl", "peft", "wandb", "deepspeed", "triton", "matplotlib")
CALCULATOR = "Memory calculator"


def run(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Reckon the memory of this model from its config; no weights are loaded.",
            rich_help_panel=CALCULATOR,
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="As in infer: 512, 25% or 64MiB.", rich_help_panel=CALCULATOR)
    ] = "512",
    context: Annotated[
        int, typer.Option(help="Tokens of a conversation, prompt and answer.", rich_help_panel=CALCULATOR)
    ] = 32768,
    batch: Annotated[int, typer.Option(help="Conversations at a time.", rich_help_panel=CALCULATOR)] = 1,
    slack: Annotated[
        int | None,
        typer.Option(help="Tokens between evictions. [dim]128, 16 on the testbed[/dim]", rich_help_panel=CALCULATOR),
    ] = None,
    dtype: o.Dtype = o.Precision.auto,
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Check the installation; with --model, also say what its weights, its full cache and an evicting cache take.

    Examples:

        learnevict doctor

        learnevict doctor --model Qwen/Qwen3-0.6B --budget 512 --context 32768 --batch 4
    """
    found: dict[str, Any] = {"versions": versions(), "problems": problems(), "machine": machine()}
    if model is not None:
        found["memory"] = memory(model, budget, context, batch, slack, dtype.value)
    if as_json:
        tell(json.dumps(found))
    else:
        show(found)
    if found["problems"]:
        raise typer.Exit(1)


def versions() -> dict[str, str | None]:
    """Returns the installed versions of what learnevict requires and what its extras bring; None: not installed."""
    names = dict.fromkeys([requirement.name for requirement in required()] + list(EXTRAS))
    return {"python": platform.python_version(), "learnevict": __version__, **{name: installed(name) for name in names}}


def problems() -> list[str]:
    """Returns the requirements that are not met, each with its remedy."""
    wrong: list[str] = []
    for requirement in required():
        have = installed(requirement.name)
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            wrong.append(
                f"{requirement.name} {have or 'is missing'}: learnevict needs {wanted}; pip install '{wanted}'"
            )
    return wrong


def required() -> list[Any]:
    """Returns what a core install must have, from the package's metadata."""
    from packaging.requirements import Requirement

    try:
        listed = requires("learnevict") or []
    except PackageNotFoundError:
        listed = []
    parsed = [Requirement(line) for line in listed]
    return [
        requirement
        for requirement in parsed
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def installed(name: str) -> str | None:
    """Returns the version of a distribution, None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, str]:
    """Returns the devices, and which execution path they get."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": f"{cores} cores, {torch.get_num_threads()} threads used by torch, {size(memory)} of memory"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            kind = f"compute capability {about.major}.{about.minor}"
            found[f"cuda:{index}"] = f"{about.name}, {size(total)}, {size(free)} free, {kind}"
    elif torch.accelerator.is_available():
        found[str(torch.accelerator.current_accelerator())] = "an accelerator torch can use"
    else:
        found["accelerator"] = "none: everything runs on the CPU"
    found["kernels"] = kernels(cuda=torch.cuda.is_available())
    return found


def kernels(*, cuda: bool) -> str:
    """Returns whether the Triton kernels can run here."""
    from learnevict import ops

    if not hasattr(ops, "use_kernels") or find_spec("learnevict_kernels") is None:
        return "reference path in plain torch, on every device"
    if find_spec("triton") is None:
        return "reference path in plain torch; for the kernels: pip install 'learnevict[gpu]'"
    return "Triton kernels available" if cuda else "reference path in plain torch: the kernels need a CUDA device"


def memory(model: str, budget: str, context: int, batch: int, slack: int | None, dtype: str) -> dict[str, Any]:
    """Returns the calculator's figures in bytes, all rows together."""
    from learnevict.config import Budget
    from learnevict.infer.load import load_config, pick_dtype
    from learnevict.infer.model.memory import estimate
    from learnevict.policy import Guard, Schedule

    testbed = model == TESTBED
    if testbed:
        from learnevict.testbed import path

        model, dtype = str(path()), "fp32" if dtype == "auto" else dtype
    config = load_config(model)
    usual = COMPARISON["slack"] if testbed else 128
    kind: Any = None if dtype == "auto" else pick_dtype(dtype)
    found = estimate(
        config, Budget.parse(budget), tokens=context, batch=batch, dtype=kind, guard=Guard(recent=8),
        schedule=Schedule(usual if slack is None else slack),
    )  # fmt: skip
    return {"model": TESTBED if testbed else model, "context": context, "batch": batch, "asked": budget, **vars(found)}


def show(found: dict[str, Any]) -> None:
    """Prints the figures as tables."""
    from rich.table import Table

    console, table = for_tables(), Table.grid(padding=(0, 2))
    for name, have in found["versions"].items():
        table.add_row(name, have or "[dim]not installed (optional)[/dim]")
    table.add_row()
    for name, have in found["machine"].items():
        table.add_row(name, have)
    if "memory" in found:
        table.add_row()
        for name, figure in reckoning(found["memory"]):
            table.add_row(name, cell(figure))
    console.print(table)
    console.print()
    for problem in found["problems"]:
        console.print(f"[red]problem[/red]  {problem}", soft_wrap=True)
    if not found["problems"]:
        console.print("Everything that learnevict needs is here.")


def reckoning(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the calculator's lines."""
    full, evicted, weights = figures["full"], figures["evicted"], figures["weights"]
    asked = "" if figures["asked"] == str(figures["budget"]) else f" = {figures['asked']}"
    share = f"{evicted / full:.1%} of the full cache" if full else "nothing to evict"
    return [
        ("model", f"{figures['model']}: {figures['parameters']:,} weights, {size(weights)}"),
        ("context", f"{figures['context']} tokens x {figures['batch']} rows"),
        ("full cache", f"{size(full)}; with the weights {size(full + weights)}"),
        ("evicting", f"{size(evicted)} at most, {share}; with the weights {size(evicted + weights)}"),
        (
            "budget",
            f"{figures['budget']} slots per head{asked}, in {figures['evicting']} of {figures['layers']} layers",
        ),
    ]
