"""learnevict list, doctor and demo: the methods there are, what is installed and what a model takes, and a short tour."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import typer

import learnevict.cli.options as o
from learnevict import __version__, methods
from learnevict.cli.output import cell, for_tables, tell
from learnevict.config import Budget, readable_bytes
from learnevict.infer.model.catalogue import folder_of_model

EXTRAS = ("datasets", "trl", "peft", "wandb", "deepspeed", "triton", "matplotlib")
CALCULATOR = "Memory calculator"
SHOWN = ("full", "streaming_llm", "foresightkv")
TASKS = ("program", "ledger", "recall")
COMPOSING = """
What a method takes is yours to choose: base, another method inside it (methods.flowkv.policy(512, base="kvzap", gate=gate));
allocation, how layers and heads share the budget (equal, pooled, a file of `learnevict profile`); schedule, when tokens go;
gate, trained gates (--ckpt); and where heads hold equally many, store, in what slots are held (drop, int8, int4, 50%+int4).
An import path of your own (my_package.my_method) works wherever a name does."""


OPTIONS: dict[str, Any] = {
    "model": o.option(CALCULATOR, "Reckon the memory of this model from its config; no weights are loaded.", "--model",
        "-m"),
    "doctor.budget": o.option(CALCULATOR, "As in infer: 512, 25% or 64MiB.", "--budget", "-b"),
    "context": o.option(CALCULATOR, "Tokens of a conversation, prompt and answer."),
    "batch": o.option(CALCULATOR, "Conversations at a time."),
    "slack": o.option(CALCULATOR, "Tokens between evictions. [dim]128, 16 on the testbed[/dim]"),
    "demo.budget": o.option(None, "Slots kept per layer and head.", "--budget", "-b"),
    "seed": o.option(None, "Which prompts."),
}  # fmt: skip


def list_methods(as_json: bool = False) -> None:
    """List the eviction methods by what they decide, and what each takes from others: gates, a base, an allocation, a schedule.

    Examples:

        learnevict list

        learnevict list --json
    """
    rows: list[dict[str, Any]] = []
    for name in methods.METHODS:
        module = methods.load(name)
        first, bounded, paper = (module.__doc__ or "").strip().split("\n")[0], name != "full", module.PAPER
        more = {"summary": first, "bounded": bounded, "group": paper.group, "takes": paper.takes}
        rows.append({"name": name, **vars(paper), **more})
    if as_json:
        tell(json.dumps(rows, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table("method", "paper", "year", "takes", "memory", box=None, pad_edge=False, header_style="bold")
    for group, about in methods.PARTS.items():
        chosen = [row for row in rows if row["group"] == group]
        if chosen:
            table.add_row(f"\n[bold]{group}[/bold]", f"\n{about}")
        for row in chosen:
            paper = row["title"] + (f" [dim]arXiv {row['arxiv']}[/dim]" if row["arxiv"] else "")
            memory = "bounded" if row["bounded"] else "grows"
            table.add_row(row["name"], paper, str(row["year"]), ", ".join(row["takes"]), memory)
    for_tables().print(table)
    tell(COMPOSING)


def doctor(
    model: str | None = None,
    budget: str = "512",
    context: int = 32768,
    batch: int = 1,
    slack: int | None = None,
    dtype: o.Precision = o.Precision.auto,
    as_json: bool = False,
) -> None:
    """Check the installation; with --model, also say what its weights, its full cache and an evicting cache take.

    Examples:

        learnevict doctor

        learnevict doctor --model Qwen/Qwen3-0.6B --budget 512 --context 32768 --batch 4
    """
    Budget.parse(budget)
    if model not in (None, "testbed"):
        folder_of_model(model)
    found: dict[str, Any] = {**_requirements(), "machine": _machine()}
    if model is not None:
        found["memory"] = _memory(model, budget, context, batch, slack, dtype.value)
    if as_json:
        tell(json.dumps(found))
    else:
        _show(found)
    if found["problems"]:
        raise typer.Exit(1)


def _requirements() -> dict[str, Any]:
    """Returns installed versions of what learnevict and its extras require, and what is not met, each with its remedy."""
    from packaging.requirements import Requirement

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    listed = [Requirement(line) for line in (requires("learnevict") or [] if installed("learnevict") else [])]
    required = [one for one in listed if one.marker is None or one.marker.evaluate({"extra": ""})]
    versions: dict[str, str | None] = {"python": platform.python_version(), "learnevict": __version__}
    versions |= {name: installed(name) for name in (*(one.name for one in required), *EXTRAS)}
    problems = [
        f"{one.name} {versions[one.name] or 'is missing'}: learnevict needs {one.name}{one.specifier}; pip install "
        f"'{one.name}{one.specifier}'"
        for one in required
        if versions[one.name] is None or not one.specifier.contains(versions[one.name] or "", prereleases=True)
    ]
    return {"versions": versions, "problems": problems}


def _machine() -> dict[str, str]:
    """Returns the devices, and which execution path they get."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "cpu": f"{cores} cores, {torch.get_num_threads()} threads used by torch, {readable_bytes(memory)} of memory"
    }
    cuda = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if cuda else 0):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        kind = f"compute capability {about.major}.{about.minor}"
        found[f"cuda:{index}"] = f"{about.name}, {readable_bytes(total)}, {readable_bytes(free)} free, {kind}"
    if not cuda and torch.accelerator.is_available():
        found[str(torch.accelerator.current_accelerator())] = "an accelerator torch can use"
    elif not cuda:
        found["accelerator"] = "none: everything runs on the CPU"
    from learnevict.ops.kernels import default

    on, why = default()
    found["kernels"] = f"{'on' if on else 'off'} by default: {why}"
    return found


def _memory(model: str, budget: str, context: int, batch: int, slack: int | None, dtype: str) -> dict[str, Any]:
    """Returns the calculator's figures in bytes, all rows together."""
    from learnevict.data.opening import describe_base
    from learnevict.infer.load import pick_dtype
    from learnevict.infer.model.memory import estimate
    from learnevict.policy import Guard, Schedule

    asked = Budget.parse(budget)
    config, stored = describe_base(model)
    kind: Any = stored if dtype == "auto" else pick_dtype(dtype)
    schedule = Schedule((16 if model == "testbed" else 128) if slack is None else slack)
    found = estimate(config, asked, tokens=context, batch=batch, dtype=kind, guard=Guard(recent=8), schedule=schedule)
    return {"model": model, "context": context, "batch": batch, "asked": budget, **vars(found)}


def _show(found: dict[str, Any]) -> None:
    """Prints what doctor found as tables."""
    from rich.table import Table

    console, table = for_tables(), Table.grid(padding=(0, 2))
    for name, have in found["versions"].items():
        table.add_row(name, have or "[dim]not installed (optional)[/dim]")
    table.add_row()
    for name, have in found["machine"].items():
        table.add_row(name, have)
    if "memory" in found:
        table.add_row()
        for name, figure in _reckoning(found["memory"]):
            table.add_row(name, cell(figure))
    console.print(table)
    console.print()
    for problem in found["problems"]:
        console.print(f"[red]problem[/red]  {problem}", soft_wrap=True)
    if not found["problems"]:
        console.print("Everything that learnevict needs is here.")


def _reckoning(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the calculator's lines."""
    full, evicted, weights = figures["full"], figures["evicted"], figures["weights"]
    asked = "" if figures["asked"] == str(figures["budget"]) else f" = {figures['asked']}"
    share = f"{evicted / full:.1%} of the full cache" if full else "nothing to evict"
    where = f"in {figures['evicting']} of {figures['layers']} layers"
    return [
        ("model", f"{figures['model']}: {figures['parameters']:,} weights, {readable_bytes(weights)}"),
        ("context", f"{figures['context']} tokens x {figures['batch']} rows"),
        ("full cache", f"{readable_bytes(full)}; with the weights {readable_bytes(full + weights)}"),
        (
            "evicting",
            f"{readable_bytes(evicted)} at most, {share}; with the weights {readable_bytes(evicted + weights)}",
        ),
        ("budget", f"{figures['budget']} slots per head{asked}, {where}"),
    ]


def demo(
    budget: str = "48",
    seed: int = 1,
    as_json: bool = False,
) -> None:
    """A short guided tour: the bundled reasoning model with a full cache, a recent window, and a learned policy.

    The whole story, training included, is scripts/demo in a checkout.

    Examples:

        learnevict demo

        learnevict demo --budget 64 --seed 5
    """
    asked = [o.EvictionOptions() if name == "full" else o.EvictionOptions(name, budget) for name in SHOWN]
    from learnevict.cli.opened_model import open_model
    from learnevict.cli.prompts import make_request

    opened = open_model(o.ModelOptions(device="cpu"))
    requests = [make_request(opened, {"task": task, "seed": seed}, name=task) for task in TASKS]
    longest = max(len(request.ids) for request in requests)
    if not as_json:
        tell(
            f"The testbed is a small reasoning model trained on tasks with decoys. Three prompts of up to {longest}\n"
            f"tokens; each layer and head may keep {budget} of them. A recent window forgets what it will need; a\n"
            "trained scorer predicts it.\n"
        )
    rows: list[dict[str, Any]] = []
    for eviction in asked:
        answers = opened.under(eviction).answer(requests, seed=0, max_new_tokens=400, temperature=0.0)
        rows.append(_summary([record for _, record in answers]))
    if as_json:
        tell(json.dumps(rows))
    else:
        _show_demo(rows)


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the figures of one method over all prompts."""
    return {
        "method": records[0]["method"],
        "correct": {record["id"]: record["correct"] for record in records},
        "kept": round(max(record["kept"]["mean"] for record in records)),
        "kv_bytes_peak": sum(record["kv_bytes_peak"] for record in records),
        "kv_bytes_full": sum(record["kv_bytes_full"] for record in records),
        "tokens_per_second": records[0]["tokens_per_second"],
    }


def _show_demo(rows: list[dict[str, Any]]) -> None:
    """Prints the figures as a table, and what to try next."""
    from rich.table import Table

    titles = ("method", *TASKS, "slots per head, mean", "keys and values, peak", "tokens/s")
    table = Table(*titles, box=None, header_style="bold")
    for row in rows:
        marks = ["[green]right[/green]" if row["correct"][task] else "[red]wrong[/red]" for task in TASKS]
        speed = f"{row['tokens_per_second']:.0f}"
        table.add_row(row["method"], *marks, str(row["kept"]), readable_bytes(row["kv_bytes_peak"]), speed)
    console = for_tables()
    console.print(table)
    console.print(
        "\nNext: [bold]learnevict infer --task program --seed 3 --budget 48[/bold] streams one answer,\n"
        "[bold]learnevict viz --task program --seed 3 --budget 48[/bold] shows what each head keeps,\n"
        "[bold]learnevict eval --help[/bold] measures it."
    )
