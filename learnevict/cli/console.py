"""The commands of the console, and how their errors reach the user."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer

from learnevict import __version__
from learnevict.cli.options import prepared
from learnevict.cli.output import say, tell
from learnevict.errors import BudgetError, LearnevictError, UsageError, debugging, unforeseen, unusable

COMMANDS = {
    "infer": "infer.infer",
    "list": "first_steps.list_methods",
    "oracle": "oracle.run",
    "profile": "oracle.profile",
    "train": "gates.train",
    "refine": "gates.refine",
    "eval": "eval.evaluate",
    "report": "eval.report",
    "viz": "infer.viz",
    "push": "gates.push",
    "pull": "gates.pull",
    "import": "gates.import_weights",
    "doctor": "first_steps.doctor",
    "model": "model.group",
    "demo": "first_steps.demo",
}
"""The function, or the group of functions, behind each command."""
PROGRAM = {"ignore_unknown_options": True, "help_option_names": []}
PROGRAMS: dict[str, Any] = {"train": PROGRAM, "refine": PROGRAM}
"""Commands whose words, --help too, are read by a parser of their own."""
USAGE, RUNTIME = 2, 1

_Problem: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="learnevict",
    help="Learned KV-cache eviction: generate, evaluate and look inside under a small cache.\n\n"
    "Start here, on any machine: [bold]learnevict demo[/bold]",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        tell(f"learnevict {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def learnevict(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error; may stand anywhere. Or set LEARNEVICT_DEBUG=1."),
    ] = False,
) -> None:
    """Options of all commands."""


for _name, _place in COMMANDS.items():
    _module = import_module(f"learnevict.cli.{_place.partition('.')[0]}")
    _found = getattr(_module, _place.partition(".")[2])
    if isinstance(_found, typer.Typer):
        app.add_typer(_found, name=_name)
    else:
        app.command(_name, context_settings=PROGRAMS.get(_name))(prepared(_found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code: 0, 1 (it failed), 2 (it made no sense) or 130 (interrupted).

    An unexpected error is one line too; with --debug or LEARNEVICT_DEBUG=1 it is raised.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or debugging()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with warnings.catch_warnings(), _methods_here():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            words = [word for word in words if word != "--debug"]
            code: Any = app(args=words, prog_name="learnevict", standalone_mode=False)
            return code if isinstance(code, int) else 0
        except BrokenPipeError:
            # The reader of our output has gone (`| head`); nothing may be written at interpreter exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return RUNTIME
        except (LearnevictError, OSError, _Problem) as error:
            if debug:
                say(traceback.format_exc().rstrip())
            code, message = _explain(error)
            say(f"error: {message}")
            return code
        except SystemExit as end:  # of a parser of flags, which has said why
            return end.code if isinstance(end.code, int) else RUNTIME
        except Exception as error:  # whatever it is
            if debug:
                raise
            if type(error).__name__ == "OutOfMemoryError":
                said = "the device is out of memory; use a smaller --batch-size, --budget or --dtype bf16"
            else:
                said = unforeseen(error, "--debug (or LEARNEVICT_DEBUG=1)")
            say(f"error: {said}")
            return RUNTIME


@contextmanager
def _methods_here() -> Generator[None]:
    """Lets methods be imported from the current folder too, which a console script does not have on its path."""
    try:
        here = os.getcwd()
    except OSError:  # it has been removed under our feet
        here = ""
    added = bool(here) and not {"", here} & set(sys.path)
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _explain(error: Exception) -> tuple[int, str]:
    """Returns the exit code and one line."""
    if isinstance(error, _Problem):
        context: Any = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "learnevict"
        said = str(getattr(error, "format_message", error.__str__)()).strip().rstrip(".")
        return USAGE, f"{said}; see `{command} --help`"
    if isinstance(error, OSError) and not isinstance(error, LearnevictError):
        place = f"{error.filename!r}: " if error.filename else ""
        return RUNTIME, place + unusable(error, "choose a file or folder that can be used")
    return USAGE if isinstance(error, UsageError | BudgetError) else RUNTIME, " ".join(str(error).split())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {' '.join(str(message).split())}")
