"""learnevict report: rows of evaluations as a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import learnevict.cli.options as o
from learnevict.cli.output import say, tell


def run(
    rows: Annotated[list[Path], typer.Argument(help="JSONL files of `learnevict eval`, or report.json of the demo.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for table.md, table.csv and accuracy.png.", rich_help_panel=o.OUTPUT),
    ] = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Make a Markdown table, a CSV file and a plot of accuracy against budget.

    Examples:

        learnevict report rows.jsonl --out report

        learnevict report checkpoints/demo/report.json

    Without --out only the table is printed. An earlier report in the folder is replaced.
    """
    from learnevict.evals.records import read_rows
    from learnevict.evals.report import markdown, write_report

    found = [row for path in rows for row in read_rows(path)]
    if out is None:
        tell(markdown(found).rstrip("\n"))
        return
    for path in write_report(found, out, overwrite=overwrite):
        say(f"wrote {path}")
