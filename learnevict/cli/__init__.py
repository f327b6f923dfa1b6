"""The command line. Every command is one file; what is heavy is imported when a command runs."""

from learnevict.cli.console import app, main

__all__ = ["app", "main"]
