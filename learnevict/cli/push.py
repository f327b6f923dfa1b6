"""learnevict push: share gates on the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from learnevict.cli.output import say, tell

CARD = "The card"
Method = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE",
        help="Where the gates are of a method of your own: its import path. None is imported otherwise.",
    ),
]


def run(
    gates: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Gates: a folder, or testbed-foresightkv and others that ship here.")
    ],
    repo: Annotated[
        str, typer.Argument(metavar="USER/REPO", help="Where to; made if it does not exist. user/repo@branch is fine too.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to commit to. [dim]main[/dim]")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    method: Method = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results", metavar="ROWS", help="JSONL of `learnevict eval --out`, for the card; may be given again. The "
            "card shows rows of these very gates, and compares them with rows of other methods.",
            rich_help_panel=CARD,
        ),
    ] = None,
) -> None:  # fmt: skip
    """Share gates on the Hub: config.json, model.safetensors, run.json if there is one, and a model card, as one commit.

    Examples:

        learnevict push runs/foresightkv me/my-gates --private

        learnevict push runs/foresightkv me/my-gates --results rows.jsonl --message "with measurements"

        learnevict push testbed-foresightkv me/testbed-gates --results docs/results/main/program.jsonl

    Nothing else in the folder is sent, and of paths of this machine only the last part; the folder is only read. Log in
    with `hf auth login`, or set HF_TOKEN. If the connection breaks, give the same command again: what has arrived is not
    sent twice, and nothing shows before all of it is there. The card is made from the gates' record and from --results;
    without it, it says that nothing was measured. A README.md that you wrote yourself goes up as it is.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    from learnevict import methods
    from learnevict.hub import push_folder
    from learnevict.infer.load import quiet

    if method is not None:
        methods.load(method)
    rows = [row for path in results or [] for row in read(path)]
    quiet(bars=False)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    pushed = push_folder(gates, repo, private=private, revision=revision, message=message, rows=rows)
    if not pushed.changed:
        say(f"{pushed.address} has all of it already; nothing was committed")
    else:
        kind = "a new repository" if pushed.created else "a new commit of a repository that exists"
        say(f"{', '.join(pushed.files)} in {pushed.address}: {kind}; card {measured(len(rows))}")
    tell(pushed.url)


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of an evaluation; evals is imported only if there are some."""
    from learnevict.evals.records import read_rows

    return read_rows(path)


def measured(num_rows: int) -> str:
    """Returns how many rows the card is made from."""
    return f"from {num_rows} rows" if num_rows else "without measurements (--results gives some)"
