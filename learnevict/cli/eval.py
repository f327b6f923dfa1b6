"""learnevict eval and report: how much accuracy a small cache costs, on the testbed's tasks or on your own text."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

import learnevict.cli.options as o
from learnevict.cli.output import INTERRUPTED, say, show_rows, tell
from learnevict.cli.tasks import ANSWERS, TESTBED, WITHOUT, SampleOptions, TaskOptions, listed, refuse
from learnevict.config import Budget
from learnevict.errors import DataError, UsageError
from learnevict.files import special
from learnevict.infer.model.catalogue import GATES_FOLDER, folder_of_gates
from learnevict.infer.prompts import read_file

KEPT = "+prompt"
"""The end of the name of a method that never evicts the prompt."""


OPTIONS: dict[str, Any] = {
    "methods": o.option(o.POLICY, "Who evicts, separated by commas; NAME+prompt never evicts the prompt, beside which "
        "the budget counts. [dim]full, random, random+prompt, lexical, some heuristics, golden, foresightkv[/dim]",
        "--methods", "--method"),
    "budgets": o.option(o.POLICY, "Slots per layer and kv head, separated by commas: 1/4 (of the mean length), 64 "
        "(tokens) or 25% (of the tokens read so far).", "--budgets", "--budget", "-b"),
    "ckpt": o.option(o.POLICY, "Trained gates: a folder or a Hub id; may be repeated. The testbed brings its own.",
        "--ckpt"),
    "tuned": o.option(o.POLICY, "Heuristics with settings tuned on validation samples of the testbed.", "--tuned"),
    "allocation": o.option(o.POLICY, "How budgets are shared out, separated by commas: equal, pooled (all layers and "
        "heads compete by score), files of [bold]learnevict profile[/bold]. Every method is measured under each, "
        "golden too, except those that share budgets out themselves. [dim]the method's own[/dim]"),
    "store": o.option(o.POLICY, "In what slots are held, separated by commas: drop (full precision), int8, int4, 50%+int4; "
        "see [bold]learnevict infer --help[/bold]. Every method is measured with each, at equal bytes, but full and golden. "
        "[dim]the method's own[/dim]"),
    "keep_prompt": o.option(o.POLICY, "Never evict the prompt; budgets count the rest, and 1/4 is of the mean answer.",
        "--keep-prompt", "--prompt-protect"),
    "free": o.option(ANSWERS, "Exact match of the model's own answers. [dim]of the full cache only[/dim]",
        "--free/--no-free"),
    "as_json": o.option(o.OUTPUT, "Rows as JSON lines on standard output.", "--json"),
    "evaluate.out": o.option(o.OUTPUT, "JSONL file for rows; per-sample numbers go beside it.", "--out", "-o"),
    "resume": o.option(o.OUTPUT, "Go on with --out: skip what is finished, add what is new.", "--resume"),
    "rows": typer.Argument(help="JSONL files of `learnevict eval`, or report.json of the demo."),
    "report.out": o.option(o.OUTPUT, "Folder for table.md, table.csv and pictures.", "--out", "-o"),
}  # fmt: skip


@dataclass(frozen=True)
class MethodOptions:
    """The methods to compare and their settings.

    Raises:
        UsageError: no such method, except for names of gates that ship with the testbed.
        BudgetError: a budget that is not understood.
    """

    methods: str = ""
    budgets: str = "1/4"
    ckpt: list[str] | None = None
    tuned: bool = False
    allow_other_base: bool = False
    sinks: int | None = None
    recent: int | None = None
    slack: int | None = None
    schedule: o.When | None = None
    allocation: str | None = None
    store: str | None = None
    keep_prompt: bool = False

    def __post_init__(self) -> None:
        for budget in listed(self.budgets):
            Budget.parse(budget)
        for source in self.ckpt or ():
            folder_of_gates(source)
        for name in listed(self.methods):
            plain = name.removesuffix(KEPT)
            if not (GATES_FOLDER / f"testbed-{plain}").is_dir():
                o.check_method(plain)
        for allocation in listed(self.allocation or ""):
            o.check_allocation(allocation)
        for store in listed(self.store or ""):
            o.check_store(store)

    @property
    def keeps_prompts(self) -> bool:
        """Returns whether any method never evicts the prompt."""
        return self.keep_prompt or any(name.endswith(KEPT) for name in listed(self.methods))


def evaluate(
    *,
    tasks: TaskOptions,
    samples: SampleOptions,
    methods: MethodOptions,
    free: bool | None = None,
    model: o.ModelOptions,
    kernels: o.KernelUse = o.KernelUse.auto,
    as_json: bool = False,
    out: Path | None = None,
    resume: bool = False,
) -> None:
    """Evaluate methods under small caches: accuracy with intervals, exact match, loss, nearness to the oracle, bytes.

    Examples:

        learnevict eval --methods full

        learnevict eval --families program --methods random,h2o,golden --budgets 1/4,1/8 --samples 48 --out r.jsonl

        learnevict eval --tasks perplexity --text book.txt --model Qwen/Qwen3-0.6B --method snapkv --budget 512

        learnevict eval --tasks needle,multi_key --text book.txt --length 1000 --model smollm2 --methods full,snapkv,keydiff

        learnevict eval --tasks needle --text book.txt --model smollm2 --methods random,keydiff,golden --allocation equal,pooled

        learnevict eval --tasks gsm8k --data test.jsonl --examples train.jsonl --model smollm2 --methods full,h2o --budget 512

    Retrieval asks twice: "exact after" compresses a context once, before any question is known, as a cache that is kept does;
    "exact known" reads the question with the context.

    An interrupted run goes on with --resume. `learnevict report r.jsonl` makes a table and a plot.

    "Loss recovered" is 0 where a method loses as much as random eviction and 1 where it loses as little as golden. (The
    recovery of docs/results.md is another: of step accuracy, from the best heuristic.)
    """
    given, content = samples.given, ("",)
    for words in (tasks.tasks, tasks.families, methods.methods, methods.budgets):
        _warn_of_doubles(words)
    said = {**given, "free": free, "keep_prompt": methods.keeps_prompts or None}
    if tasks.group != TESTBED:
        refuse({"split": given.get("split"), "tuned": methods.tuned or None}, f"the testbed, not to {tasks.tasks}")
    if tasks.streamed:
        refuse(
            {**said, "resume": resume or None},
            "tasks of several samples; perplexity reads one text as a whole, unless --length cuts it into some",
        )
    refuse({name: said.get(name) for name in WITHOUT[tasks.group]}, f"other tasks than {tasks.tasks}")
    if tasks.text is not None:
        content = read_texts(tasks.text)
        if tasks.streamed and content[1:]:
            raise UsageError(
                f"{str(tasks.text)!r} holds {len(content)} texts: give --length, the tokens to read of each"
            )
    if resume and out is None:
        raise UsageError("--resume needs the --out of the run to go on with")
    from learnevict.cli.evaluation import compare, compare_on_text
    from learnevict.evals.records import read_rows
    from learnevict.evals.sample_log import log_path

    if tasks.streamed:
        with _told(out, out, "to evaluate the rest choose another --out", kernels):
            rows = compare_on_text(
                model, methods, (str(tasks.text and tasks.text.name), content[0]), tasks.max_tokens, out
            )
    else:
        given["free"] = {None: "full" if tasks.group == TESTBED else "all", True: "all", False: "none"}[free]
        with _told(out, out and log_path(out), "the same command with --resume goes on", kernels):
            rows = compare(model, methods, tasks, content, given, out, resume)
    if as_json:
        for row in rows:
            tell(json.dumps(row))
    else:
        show_rows(rows)
    if out is not None and not special(out):
        say(f"{len(read_rows(out))} rows are in {out}; table and plot: learnevict report {out} --out DIR")


def check_rows(paths: Sequence[Path]) -> None:
    """Raises a DataError for files of rows that are not there."""
    if lost := [path for path in paths if not path.exists()]:
        raise DataError(f"cannot read rows from {str(lost[0])!r}: there is no such file")


def read_texts(path: Path) -> tuple[str, ...]:
    """Returns the text of the user's file, or those of the .txt and .md files in a folder, by name.

    Raises:
        DataError: no such file, not UTF-8, or empty.
    """
    files = [path]
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix in (".txt", ".md") and one.name[0] != ".")
    texts = tuple(map(read_file, files))
    if not texts or not all(text.strip() for text in texts):
        raise DataError(f"{str(path)!r} is empty, or a text in it; give texts of at least a few words")
    return texts


@contextmanager
def _told(out: Path | None, kept: Path | None, remedy: str, kernels: o.KernelUse) -> Generator[None]:
    """Runs what is inside with or without kernels, and says what an interruption leaves behind."""
    from learnevict.ops import using_kernels

    try:
        with using_kernels(kernels.value):
            yield
    except KeyboardInterrupt as error:
        if out is None:
            say("interrupted: nothing is kept; with --out FILE what is finished would be")
        elif kept is None or not kept.exists():
            say("interrupted before anything was finished")
        else:
            say(f"interrupted: what is finished is kept in {kept}; {remedy}")
        raise typer.Exit(INTERRUPTED) from error


def _warn_of_doubles(text: str) -> None:
    given = [word.strip() for word in text.split(",") if word.strip()]
    if again := [word for word in dict.fromkeys(given) if given.count(word) > 1]:
        say(f"warning: {', '.join(again)} named more than once; counted once")


def report(
    rows: list[Path],
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Make Markdown tables, a CSV file, plots against budget, and of needles a heat map of length and depth.

    With golden eviction or several allocations among the methods, the tables begin with what is there to be learned.

    Examples:

        learnevict report rows.jsonl --out report

        learnevict report checkpoints/demo/report.json

    Without --out only the table is printed. An earlier report in the folder is replaced.
    """
    check_rows(rows)
    from learnevict.evals.heat_map import heat_map, read_needles
    from learnevict.evals.margin import margin_tables
    from learnevict.evals.records import read_rows
    from learnevict.evals.report import markdown, write_report

    found, margin = [row for path in rows for row in read_rows(path)], margin_tables(rows)
    if out is None:
        tell(f"{margin}\n{markdown(found)}".strip("\n"))
        return
    written = write_report(found, out, margin, overwrite=overwrite)
    if needles := read_needles(rows):
        written.append(heat_map(needles, out / "needles.png", overwrite=overwrite))
    for path in written:
        say(f"wrote {path}")
