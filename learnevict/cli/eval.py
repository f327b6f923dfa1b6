"""learnevict eval: how much accuracy a small cache costs, on the testbed's tasks or on your own text."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import learnevict.cli.eval_options as e
import learnevict.cli.options as o
from learnevict.cli.output import INTERRUPTED, cell, for_tables, say, tell
from learnevict.errors import UsageError
from learnevict.files import special


def run(
    *,
    task: Annotated[
        e.Task, typer.Option("--task", help="The testbed, or perplexity of --text.", rich_help_panel=e.TASKS)
    ] = e.Task.testbed,
    families: Annotated[
        str, typer.Option(help="Task families, separated by commas. [dim]all five[/dim]", rich_help_panel=e.TASKS)
    ] = "",
    samples: e.SampleOptions,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file, for --task perplexity.", rich_help_panel=e.TASKS)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Read only the beginning of the text.", rich_help_panel=e.TASKS)
    ] = None,
    methods: e.MethodOptions,
    free: Annotated[
        bool | None,
        typer.Option(
            "--free/--no-free",
            help="Exact match of the model's own answers. [dim]of the full cache only[/dim]",
            rich_help_panel=e.ANSWERS,
        ),
    ] = None,
    model: o.ModelOptions,
    as_json: Annotated[
        bool, typer.Option("--json", help="Rows as JSON lines on standard output.", rich_help_panel=o.OUTPUT)
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="JSONL file for rows; per-sample numbers go beside it.", rich_help_panel=o.OUTPUT
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with --out: skip what is finished, add what is new.", rich_help_panel=o.OUTPUT
        ),
    ] = False,
) -> None:
    """Evaluate methods under small caches: accuracy with intervals, exact match, loss, nearness to the oracle, bytes.

    Examples:

        learnevict eval --methods full

        learnevict eval --families program --methods random,h2o,golden --budgets 1/4,1/8 --samples 48 --out r.jsonl

        learnevict eval --task perplexity --text book.txt --model Qwen/Qwen3-0.6B --method snapkv --budget 512

    An interrupted run goes on with --resume. `learnevict report r.jsonl` makes a table and a plot.

    "Loss gap closed from random" is 0 where a method loses as much as random eviction and 1 where it loses as little as
    golden. (The gap closed of docs/results.md is another: of step accuracy, from the best heuristic.)
    """
    from learnevict.cli.evaluation import Evaluation
    from learnevict.evals.records import log_path, read_rows

    given = samples.given
    evaluation = Evaluation(model, methods, names(methods.methods), names(methods.budgets))
    if task is e.Task.perplexity:
        flags = {
            "families": families or None, "keep_prompt": methods.keep_prompt or None, "tuned": methods.tuned or None,
            "free": free, "resume": resume or None,
        }  # fmt: skip
        _refuse({**given, **flags}, "the testbed, not to --task perplexity")
        if text is None:
            raise UsageError("--task perplexity needs a text: --text FILE")
        with _told(out, out, "to evaluate the rest choose another --out"):
            rows = evaluation.perplexity(text, max_tokens, out)
    else:
        _refuse({"text": text, "max_tokens": max_tokens}, "--task perplexity")
        plan = evaluation.plan(names(families), free={None: "full", True: "all", False: "none"}[free], **given)
        with _told(out, out and log_path(out), "the same command with --resume goes on"):
            rows = evaluation.testbed(plan, out, resume)
    if as_json:
        for row in rows:
            tell(json.dumps(row))
    else:
        _show(rows)
    if out is not None and not special(out):
        say(f"{len(read_rows(out))} rows are in {out}; table and plot: learnevict report {out} --out DIR")


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


def names(text: str) -> tuple[str, ...]:
    """Returns the names between commas, each once; says which were given more often."""
    given = [word.strip() for word in text.split(",") if word.strip()]
    if again := [word for word in dict.fromkeys(given) if given.count(word) > 1]:
        say(f"warning: {', '.join(again)} named more than once; counted once")
    return tuple(dict.fromkeys(given))


def _show(rows: list[dict[str, Any]]) -> None:
    """A table on standard output; only columns with something in them."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = {title: show for title, show in COLUMNS.items() if any(show(row) for row in rows)}
    for title in columns:
        table.add_column(title, justify="left" if title in ("family", "method") else "right")
    last = None
    for row in rows:
        if last not in (None, row["family"]):
            table.add_section()
        last = row["family"]
        table.add_row(*(cell(show(row) or "–") for show in columns.values()))
    for_tables().print(table)


def _interval(row: dict[str, Any], value: str, low: str, high: str) -> str:
    if row.get(value) is None:
        return ""
    return f"{row[value]:.3f}" + (f" [{row[low]:.3f}, {row[high]:.3f}]" if row.get(low) is not None else "")


def _number(row: dict[str, Any], name: str, form: str) -> str:
    return "" if row.get(name) is None else format(row[name], form)


def _budget(row: dict[str, Any]) -> str:
    if row["budget"] is None:
        return "full"
    return f"{row['budget_share']} = {row['budget']}" if row.get("budget_share") else str(row["budget"])


def _kib(row: dict[str, Any]) -> str:
    if row.get("kv_bytes_peak") is None:
        return ""
    return f"{row['kv_bytes_peak'] / 1024:.0f} / {row['kv_bytes_full'] / 1024:.0f}"


def _attention(row: dict[str, Any]) -> str:
    if row.get("attention_kept") is None:
        return ""
    return f"{row['attention_kept']:.3f} ({row['attention_kept_min']:.3f})"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "family": lambda row: row["family"],
    "method": lambda row: row["method"],
    "budget": _budget,
    "step accuracy": lambda row: _interval(row, "step_accuracy", "ci_low", "ci_high"),
    "exact match": lambda row: _interval(row, "exact_match", "exact_low", "exact_high"),
    "perplexity": lambda row: _number(row, "perplexity", ".3f"),
    "ratio": lambda row: _number(row, "perplexity_ratio", ".3f"),
    "loss ratio": lambda row: _number(row, "loss_ratio", ".3g"),
    "loss gap closed from random": lambda row: _number(row, "oracle_gap_closed", ".3f"),
    "recall": lambda row: _number(row, "top_recall", ".3f"),
    "regret": lambda row: _number(row, "regret", ".3f"),
    "attention kept (min)": _attention,
    "tokens": lambda row: _number(row, "tokens_generated", ".0f"),
    "tokens/s": lambda row: _number(row, "tokens_per_second", ".0f"),
    "KiB peak / full": _kib,
    "samples": lambda row: _number(row, "samples", "d"),
}
