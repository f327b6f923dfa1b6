"""learnevict refine: gates that score slots, by GRPO over their own evictions."""

from __future__ import annotations

import typer

from learnevict.cli.train import SETTINGS as SETTINGS


def run(context: typer.Context) -> None:
    """Refine trained gates by reinforcement; [bold]learnevict refine --help[/bold] shows the flags."""
    from learnevict.rl.refine import main, parse

    main(*parse(context.args, "learnevict refine"))
