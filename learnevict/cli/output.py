"""Output of commands: lines, tables, bars, and a file of answers that survives an interruption."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from learnevict.errors import DataError, UsageError
from learnevict.files import Lines, check, special
from learnevict.untrusted import printable

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
START = b'{"id": "'
"""How every row begins."""


class ResultsFile:
    """Writes rows as JSON lines, in a file that a later run goes on with, or on standard output.

    Args:
        path: the file; None: standard output.

    Raises:
        DataError: it cannot be written, or holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.keys: dict[str, str] = {}
        self.num_shown = 0
        if path is None:
            return
        self.lines = Lines(path, START)
        check(path, START)
        try:
            self.keys = {row["id"]: row["key"] for row in self.lines.rows}
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} holds something else than rows of `learnevict infer`; choose another --out"
            ) from error
        self.lines.mend()

    def has(self, name: str, key: str) -> bool:
        """Returns whether this row is finished.

        Raises:
            UsageError: it is, but for another prompt, of other weights or under other settings.
        """
        found = self.keys.get(name)
        if found is not None and found != key:
            raise UsageError(
                f"{self.path} holds row {name!r} for another prompt, of other weights or under other settings; choose another "
                "--out to keep both"
            )
        return found is not None

    def add(self, row: dict[str, Any], key: str) -> None:
        """Writes one row to the disk."""
        self.num_shown += 1
        if self.path is not None:
            self.lines.append({**row, "key": key})
            return
        tell(json.dumps({**row, "key": key}, ensure_ascii=False))

    @property
    def num_rows(self) -> int:
        """The number of rows in the file, those of earlier runs too."""
        if self.path is None or special(self.path):
            return self.num_shown
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def __str__(self) -> str:
        return "standard output" if self.path is None else str(self.path)


def for_tables() -> Any:
    """Returns a rich console on standard output: as wide as the terminal, and 200 columns in a pipe or a file."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=200)


def say(line: str) -> None:
    """Writes a line to standard error, control characters written out, as in `tell`."""
    sys.stdout.flush()
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


def tell(text: str) -> None:
    """Writes a result to standard output."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()


def cell(text: object) -> Any:
    """Returns a cell of a rich table that holds text, not markup."""
    from rich.text import Text

    return Text(printable(str(text)))


@contextmanager
def progress(total: int) -> Generator[Any]:
    """Shows a bar on standard error, if that is a terminal; yields a function of a description and a number of samples."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda label, number: bar.update(task, advance=number, description=printable(label))


def show_rows(rows: list[dict[str, Any]]) -> None:
    """Prints rows of an evaluation as a table; only columns with something in them."""
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


def _budget(row: dict[str, Any]) -> str:
    if row["budget"] is None:
        return "full"
    return f"{row['budget_share']} = {row['budget']}" if row.get("budget_share") else str(row["budget"])


def _shown(form: str, *names: str) -> Callable[[dict[str, Any]], str]:
    """Returns what shows some figures of a row; what stands in brackets is left out where the second is unknown."""

    def show(row: dict[str, Any]) -> str:
        found = [row.get(name) for name in names]
        if found[0] is None:
            return ""
        return (form.partition(" [")[0] if None in found else form).format(*found)

    return show


def _kib(row: dict[str, Any]) -> str:
    peak, full = row.get("kv_bytes_peak"), row.get("kv_bytes_full")
    return "" if peak is None or full is None else f"{peak / 1024:.0f} / {full / 1024:.0f}"


_EXACT = _shown("{:.3f} [{:.3f}, {:.3f}]", "exact_match", "exact_low", "exact_high")
_ADDED = _shown("{:+.4f} [{:+.4f}, {:+.4f}]", "added_nats", "added_low", "added_high")
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "family": lambda row: row["family"],
    "method": lambda row: row["method"],
    "budget": _budget,
    "step accuracy": _shown("{:.3f} [{:.3f}, {:.3f}]", "step_accuracy", "ci_low", "ci_high"),
    "exact match": lambda row: "" if "exact_after" in row else _EXACT(row),
    "exact after": _shown("{:.3f} [{:.3f}, {:.3f}]", "exact_after", "after_low", "after_high"),
    "exact known": _shown("{:.3f} [{:.3f}, {:.3f}]", "exact_known", "known_low", "known_high"),
    "score": _shown("{:.3f} [{:.3f}, {:.3f}]", "score", "score_low", "score_high"),
    "nats": _shown("{:.3f}", "nats"),
    "added nats": lambda row: "" if row["budget"] is None else _ADDED(row),
    "perplexity": _shown("{:.3f}", "perplexity"),
    "ratio": _shown("{:.3f}", "perplexity_ratio"),
    "loss ratio": _shown("{:.3g}", "loss_ratio"),
    "loss recovered": _shown("{:.3f}", "oracle_gap_closed"),
    "recall": _shown("{:.3f}", "top_recall"),
    "regret": _shown("{:.3f}", "regret"),
    "attention kept (min)": _shown("{:.3f} ({:.3f})", "attention_kept", "attention_kept_min"),
    "tokens": _shown("{:.0f}", "tokens_generated"),
    "tokens/s": _shown("{:.0f}", "tokens_per_second"),
    "KiB peak / full": _kib,
    "samples": _shown("{:d}", "samples"),
}


def quieten() -> None:
    """Silences what transformers and the Hub's client say, and their bars where nobody sees them."""
    seen = sys.stderr.isatty()
    if not seen:
        os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported: some bars nothing else stops
    from huggingface_hub.utils import disable_progress_bars, logging

    from learnevict.infer.load import quiet

    quiet(bars=seen)
    logging.set_verbosity_error()
    if not seen:
        disable_progress_bars()
