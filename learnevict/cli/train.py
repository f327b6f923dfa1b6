"""learnevict train: the gates of a learned method, for any model."""

from __future__ import annotations

import typer

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""All words are read by the program's own parser, --help too."""


def run(context: typer.Context) -> None:
    """Train the gates of a learned method; [bold]learnevict train METHOD --help[/bold] shows its flags."""
    from learnevict.train.distill import main, parse

    main(parse(context.args, "learnevict train"))
