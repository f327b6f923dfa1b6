"""learnevict eval: how much accuracy a small cache costs, on the testbed's tasks or on your own text."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

import learnevict.cli.eval_options as e
import learnevict.cli.options as o
from learnevict.cli.output import INTERRUPTED, cell, for_tables, say, tell
from learnevict.errors import UsageError
from learnevict.files import special


def run(
    task: e.Which = e.Task.testbed, families: e.Families = "", samples: e.Samples = None, split: e.Part = None,
    length: e.Long = None, seed: e.FirstSeed = None, text: e.Text = None, max_tokens: e.MaxTokens = None,
    methods: e.Methods = "", budgets: e.Budgets = "1/4", ckpt: e.Checkpoints = None, tuned: e.Tuned = False,
    allow_other_base: o.OtherBase = False, sinks: o.Sinks = None, recent: o.Recent = None, slack: o.Slack = None,
    keep_prompt: e.KeepPrompt = False, teacher: e.Teacher = None, oracle: e.Oracle = None, free: e.Free = None,
    temperature: e.Temperature = None, tries: e.Tries = None, model: o.Model = "testbed", device: o.Device = "auto",
    dtype: o.Dtype = o.Precision.auto, allow_pickle: o.AllowPickle = False,
    batch_size: e.BatchSize = None, as_json: e.AsJson = False, out: e.Out = None,
    resume: e.Resume = False,
) -> None:  # fmt: skip
    """Judge methods under small caches: accuracy with intervals, exact match, loss, nearness to the oracle, bytes.

    Examples:

        learnevict eval --methods full

        learnevict eval --families program --methods random,h2o,golden --budgets 1/4,1/8 --samples 48 --out r.jsonl

        learnevict eval --task perplexity --text book.txt --model Qwen/Qwen3-0.6B --method snapkv --budget 512

    An interrupted run goes on with --resume. `learnevict report r.jsonl` makes a table and a plot.

    "Loss gap closed from random" is 0 where a method loses as much as random eviction and 1 where it loses as little as
    golden. (The gap closed of docs/results.md is another: of step accuracy, from the best heuristic.)
    """
    from learnevict.cli.evaluation import Evaluation
    from learnevict.evals.suite import journal_path
    from learnevict.evals.summaries import read_rows

    judging = Evaluation(
        model=model, device=device, dtype=dtype.value, methods=names(methods), budgets=names(budgets),
        ckpts=tuple(ckpt or ()), allow_other_base=allow_other_base, sinks=sinks, recent=recent, slack=slack,
        prompt=keep_prompt, tuned=tuned, allow_pickle=allow_pickle,
    )  # fmt: skip
    sampled = {
        "num_samples": samples, "split": split and split.value, "length": length and length.value, "seed": seed,
        "teacher": teacher, "oracle": oracle, "temperature": temperature, "tries": tries, "batch_size": batch_size,
    }  # fmt: skip
    if task is e.Task.perplexity:
        flags = {"families": families or None, "keep_prompt": keep_prompt or None, "tuned": tuned or None, "free": free}
        _refuse({**sampled, **flags, "resume": resume or None}, "the testbed, not to --task perplexity")
        if text is None:
            raise UsageError("--task perplexity needs a text: --text FILE")
        with _told(out, out, "to judge the rest choose another --out"):
            rows = judging.perplexity(text, max_tokens, out)
    else:
        _refuse({"text": text, "max_tokens": max_tokens}, "--task perplexity")
        fields = {name: value for name, value in sampled.items() if value is not None}
        plan = judging.plan(names(families), free={None: "full", True: "all", False: "none"}[free], **fields)
        with _told(out, out and journal_path(out), "the same command with --resume goes on"):
            rows = judging.testbed(plan, out, resume)
    _print(rows, as_json)
    if out is not None and not special(out):
        say(f"{len(read_rows(out))} rows are in {out}; table and plot: learnevict report {out} --out DIR")


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if not as_json:
        _show(rows)
        return
    for row in rows:
        tell(json.dumps(row))


FLAGS = {
    "num_samples": "--samples", "teacher": "--teacher/--no-teacher", "oracle": "--oracle/--no-oracle",
    "free": "--free/--no-free",
}  # fmt: skip


def _refuse(values: dict[str, Any], whose: str) -> None:
    """Options that this task would ignore."""
    flags = [FLAGS.get(name, "--" + name.replace("_", "-")) for name, value in values.items() if value is not None]
    if flags:
        raise UsageError(f"{' and '.join(flags)} {'belong' if len(flags) > 1 else 'belongs'} to {whose}")


@contextmanager
def _told(out: Path | None, kept: Path | None, remedy: str) -> Generator[None]:
    """Say what an interruption leaves behind."""
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
    """Words between commas, each once; says which were given more often."""
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
