"""learnevict train and refine: the gates of a learned method, for any model, and gates that score slots by GRPO."""

from __future__ import annotations

from typing import Annotated

import typer

SETTINGS = {"ignore_unknown_options": True, "help_option_names": []}
"""All words are read by the program's own parser, --help too."""


Words = Annotated[list[str] | None, typer.Argument(metavar="[METHOD | CONFIG.YAML] [FLAGS]", show_default=False)]


def run(words: Words = None) -> None:
    """Train the gates of a learned method; [bold]learnevict train METHOD --help[/bold] shows its flags."""
    from learnevict.train.distill import main, parse

    main(parse(words or [], "learnevict train"))


def refine(words: Words = None) -> None:
    """Refine trained gates by reinforcement; [bold]learnevict refine --help[/bold] shows the flags."""
    from learnevict.rl.refine import main, parse

    main(*parse(words or [], "learnevict refine"))
