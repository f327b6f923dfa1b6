"""learnevict demo: three prompts of the testbed under three caches, in a minute."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

import learnevict.cli.options as o
from learnevict.cli.opened_model import open_model
from learnevict.cli.output import for_tables, size, tell
from learnevict.cli.prompts import Answer, make_request

METHODS = ("full", "streaming_llm", "foresightkv")
TASKS = ("program", "ledger", "recall")


def run(
    budget: Annotated[str, typer.Option("--budget", "-b", help="Slots kept per layer and head.")] = "48",
    seed: Annotated[int, typer.Option(help="Which prompts.")] = 1,
    as_json: o.AsJson = False,
) -> None:
    """A short guided tour: the bundled reasoning model with a full cache, a recent window, and a learned policy.

    The whole story, training included, is scripts/demo in a checkout.

    Examples:

        learnevict demo

        learnevict demo --budget 64 --seed 5
    """
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
    for method in METHODS:
        eviction = o.EvictionOptions() if method == "full" else o.EvictionOptions(method, budget)
        answers = opened.under(eviction).answer(requests, seed=0, max_new_tokens=400, temperature=0.0)
        rows.append(summary(answers))
    if as_json:
        tell(json.dumps(rows))
        return
    show(rows)


def summary(answers: list[Answer]) -> dict[str, Any]:
    """Returns the figures of one method over all prompts."""
    records = [answer.record for answer in answers]
    return {
        "method": records[0]["method"],
        "correct": {record["id"]: record["correct"] for record in records},
        "kept": round(max(record["kept"]["mean"] for record in records)),
        "kv_bytes_peak": sum(record["kv_bytes_peak"] for record in records),
        "kv_bytes_full": sum(record["kv_bytes_full"] for record in records),
        "tokens_per_second": records[0]["tokens_per_second"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the figures as a table, and what to try next."""
    from rich.table import Table

    table = Table(
        "method", *TASKS, "slots per head, mean", "keys and values, peak", "tokens/s", box=None, header_style="bold"
    )
    for row in rows:
        marks = ["[green]right[/green]" if row["correct"][task] else "[red]wrong[/red]" for task in TASKS]
        speed = f"{row['tokens_per_second']:.0f}"
        table.add_row(row["method"], *marks, str(row["kept"]), size(row["kv_bytes_peak"]), speed)
    console = for_tables()
    console.print(table)
    console.print(
        "\nNext: [bold]learnevict infer --task program --seed 3 --budget 48[/bold] streams one answer,\n"
        "[bold]learnevict viz --task program --seed 3 --budget 48[/bold] shows what each head keeps,\n"
        "[bold]learnevict eval --help[/bold] measures it."
    )
