"""learnevict refine: gates that score slots, by GRPO over their own evictions."""

from __future__ import annotations

from learnevict.cli.train import SETTINGS as SETTINGS
from learnevict.cli.train import Words


def run(words: Words = None) -> None:
    """Refine trained gates by reinforcement; [bold]learnevict refine --help[/bold] shows the flags."""
    from learnevict.rl.refine import main, parse

    main(*parse(words or [], "learnevict refine"))
