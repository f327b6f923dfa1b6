"""learnevict pull: gates from the Hub into a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from learnevict.cli.output import say, tell
from learnevict.cli.push import Method


def run(
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", help="Gates on the Hub; user/repo@revision is fine too.")],
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit. [dim]main[/dim]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder: new, empty, or pulled from there before. [dim]./REPO[/dim]"),
    ] = None,
    method: Method = None,
) -> None:
    """Bring gates from the Hub into a folder; `infer --ckpt FOLDER` then needs no network.

    Examples:

        learnevict pull me/my-gates

        learnevict pull me/my-gates --revision v1 --out gates-v1

    `infer --ckpt me/my-gates@v1` does without: it keeps what it fetches in the cache of the Hub. Which model the gates
    belong to is checked when they are used (--allow-other-base accepts another). The same command again brings a pulled
    folder up to date, or finishes a pull that broke off; what you changed in it is never overwritten.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    from learnevict import methods
    from learnevict.hub import pull_folder
    from learnevict.infer.load import quiet

    if method is not None:
        methods.load(method)
    quiet(bars=False)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    pulled = pull_folder(repo, out, revision=revision)
    news = ", ".join(pulled.changed) if pulled.changed else "nothing new"
    say(f"{news} from {repo} at commit {pulled.commit[:8]}")
    tell(str(pulled.folder))
