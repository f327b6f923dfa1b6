"""The command line of a program whose settings are one dataclass: every field is a flag."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from learnevict.errors import UsageError
from learnevict.train.run.ranges import check_numbers

Config = TypeVar("Config")


def read_flags(
    config: type[Config],
    description: str | None,
    arguments: Sequence[str] | None = None,
    *,
    smoke: Mapping[str, Any] | None = None,
    kinds: Mapping[str, Callable[[str], Any]] | None = None,
) -> Config:
    """Settings from a command line; --a-name and --a_name are the same flag.

    Args:
        config: a dataclass with defaults; truth values are False by default. Metadata "help" says what a flag is for.
        description: shown by --help.
        arguments: words after the program's name; default those of this process.
        smoke: what --smoke sets where nothing else is said.
        kinds: what makes a value of a word, where the type of the default does not.

    Raises:
        UsageError: a number that makes no sense, or a folder or file without a name.
        SystemExit: from argparse, after --help or a mistake.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parts: Any = config
    for one in fields(parts):
        names = dict.fromkeys((f"--{one.name.replace('_', '-')}", f"--{one.name}"))
        said = one.metadata.get("help", "")
        if isinstance(one.default, bool):
            parser.add_argument(*names, action="store_true", help=said)
        else:
            kind = (kinds or {}).get(one.name, type(one.default))
            shown = f"{said} (default: {one.default})" if str(one.default) else said
            parser.add_argument(*names, dest=one.name, type=kind, help=shown.replace("%", "%%").strip())
    given = vars(parser.parse_args(arguments))
    preset = smoke if smoke is not None and given.get("smoke") else {}
    made = config(**{**preset, **given})
    check_numbers(made)
    for one in fields(parts):
        if one.default and getattr(made, one.name) == "":
            raise UsageError(f"--{one.name} is empty; give it a value, or leave it out")
    return made
