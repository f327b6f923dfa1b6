"""The command line of a training recipe: its own flags, those of the method's trainer and gate, and TrainingArguments.

    python recipes/distill.py --method NAME [flags]          --help shows the flags of that method
    python recipes/distill.py config.yaml [flags]            flags win over the file, the file over the method's defaults

A name that several parts know (the event period, say) is one flag, and all of them get its value.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from math import inf
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from learnevict.errors import UsageError
from learnevict.train.run.ranges import GATE, check_numbers, check_training
from learnevict.train.run.registry import TrainableMethod, required, trainable_method

TRAINING_FIELDS = {one.name for one in fields(TrainingArguments) if one.init}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, the description is left as it is written."""


@dataclass
class Arguments:
    """What a command line says.

    Attributes:
        common: the recipe's own config.
        course: method, mode, and the names of the gate's settings.
        mode: the mode's config.
        settings: of the gate, for its `build`.
        training: of the Trainer.
        given: names that the file or the command line mentions.
    """

    common: Any
    trainable_method: TrainableMethod
    mode: Any
    settings: dict[str, Any]
    training: TrainingArguments
    given: set[str]

    def asked(self, name: str) -> bool:
        """Whether the user has set this flag."""
        return name in self.given


def parse(
    arguments: Sequence[str],
    common: type,
    defaults: dict[str, Any],
    description: str | None = None,
    program: str | None = None,
) -> Arguments:
    """Read a command line.

    Args:
        arguments: words after the program's name; the first may be a YAML file of flags, or the method.
        common: dataclass of the recipe's own flags; has `method`.
        defaults: the recipe's, for any flag; the method's TRAINING wins over them. "{method}" in text is its name.
        description, program: shown by --help; None: no text, and the name of this process.

    Raises:
        UsageError: an unknown method, flag of the file, or default.
        SystemExit: from argparse, after --help or an unknown flag.
    """
    words = list(arguments)
    written: dict[str, Any] = {}
    if words and words[0].lower().endswith((".yaml", ".yml")):
        written = read_yaml(Path(words.pop(0)))
    elif words and not words[0].startswith("-"):
        words.insert(0, "--method")
    method = str(_early(words, ["method"]).get("method", written.get("method", vars(common)["method"])))
    early = {**written, **_early(words, required(method))}
    teaching = trainable_method(method, **{name: literal(early[name]) for name in required(method) if name in early})
    groups = _groups(common, teaching)
    kinds: Any = [*(group for group in groups if fields(group)), TrainingArguments]
    usage = "%(prog)s [config.yaml | METHOD] [flags]"
    parser: Any = HfArgumentParser(
        kinds, prog=program, usage=usage, description=description, formatter_class=_Help, allow_abbrev=False
    )
    parser._action_groups.sort(key=lambda group: group.title == "options")  # TrainingArguments come last
    known = {action.dest for action in parser._actions} - {"help"}
    _refuse_unknown(written, known, "the configuration file")
    _refuse_unknown(teaching.defaults, known, f"TRAINING of {method!r}")
    own = {name: text.format(method=method) if isinstance(text, str) else text for name, text in defaults.items()}
    preset = {**own, **teaching.defaults, **dict(_as_defaults(written, parser, kinds))}
    parser.set_defaults(**preset)
    for action in parser._actions:
        action.required = action.required and action.dest not in preset
    *parts, training = _parsed(parser, words, f"of method {method!r}")
    values = {**vars(training), **{name: value for part in parts for name, value in vars(part).items()}}
    settings = {name: values[name] for name in teaching.settings}
    check_numbers(settings, GATE, otherwise=-inf)
    mode = teaching.config(**dict(_for_config(teaching.config, values)))
    check_numbers(mode, otherwise=0)
    return Arguments(
        common(**{one.name: values[one.name] for one in fields(common)}),
        teaching,
        mode,
        settings,
        training,
        set(written) | {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")},
    )


def parse_parts(
    arguments: Sequence[str],
    parts: dict[str, type],
    training: type,
    defaults: dict[str, Any],
    description: str | None = None,
    program: str | None = None,
) -> list[Any]:
    """Read the command line of a recipe without a choice of methods, likewise from a YAML file and flags.

    Args:
        arguments: words after the program's name; the first may be a YAML file of flags.
        parts: dataclasses of flags, by the title that --help shows; attributes of their docstrings are the help.
        training: TrainingArguments or a kind of them.
        defaults: the recipe's, for any flag.
        description, program: shown by --help; None: no text, and the name of this process.

    Returns:
        one of each part, and of `training`.

    Raises:
        UsageError: an unknown flag, here or in the file, or arguments that contradict each other.
    """
    words = list(arguments)
    written = read_yaml(Path(words.pop(0))) if words and words[0].lower().endswith((".yaml", ".yml")) else {}
    kinds: Any = [*(_group(title, list(_typed(one))) for title, one in parts.items()), training]
    usage = "%(prog)s [config.yaml] [flags]"
    parser: Any = HfArgumentParser(
        kinds, prog=program, usage=usage, description=description, formatter_class=_Help, allow_abbrev=False
    )
    parser._action_groups.sort(key=lambda group: group.title == "options")
    _refuse_unknown(written, {action.dest for action in parser._actions} - {"help"}, "the configuration file")
    parser.set_defaults(**{**defaults, **dict(_as_defaults(written, parser, kinds))})
    *found, settled = _parsed(parser, words, "here")
    made = zip(parts.values(), found, strict=True)
    return [*(one(**dict(_for_config(one, vars(values)))) for one, values in made), settled]


def _parsed(parser: Any, words: Sequence[str], where: str) -> list[Any]:
    """One of each dataclass of the parser, training arguments last and checked."""
    try:
        *found, unknown = parser.parse_args_into_dataclasses(words, True, look_for_args_file=False)
    except (ValueError, TypeError, AttributeError, ArithmeticError, OSError) as error:
        # training arguments that contradict each other, or that nobody has looked at before using them
        raise UsageError(f"these flags do not work together: {' '.join(str(error).split())}") from error
    if unknown:
        raise UsageError(f"{' '.join(unknown)} is no flag {where}; see --help")
    check_training(found[-1])
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Arguments of a file: one mapping of names to values.

    Raises:
        UsageError: it cannot be read, or is no mapping.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read flags from {str(path)!r}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{str(path)!r} holds no flags; write one a line, as in `learning_rate: 0.001`")
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def literal(text: Any) -> Any:
    """What a flag without a type means: 16 is a number, true a truth value, anything else text."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "none", "null") else text)
    except ValueError:
        return None if text.lower() == "none" else text


def _groups(common: type, teaching: TrainableMethod) -> list[type]:
    """Dataclasses of flags without a name twice, one for each part of --help."""
    taken = set(TRAINING_FIELDS)
    groups = []
    for title, one in (("what to learn, and from what", common), (f"trainer ({teaching.mode.name})", teaching.config)):
        groups.append(_group(title, [part for part in _typed(one) if part[0] not in taken]))
        taken |= {part.name for part in fields(one)}
    needed = required(teaching.method)
    gate = [
        (name, *_setting(value, needed=name in needed))
        for name, value in teaching.settings.items()
        if name not in taken
    ]
    return [*groups, _group(f"gate of {teaching.method}", gate)]


def _group(title: str, parts: list[tuple[str, Any, Field]]) -> type:
    return make_dataclass(
        re.sub(r"\W+", "_", title).title(), parts, namespace={"_argument_group_name": title}, kw_only=True
    )


def _typed(config: type) -> Iterator[tuple[str, Any, Field]]:
    """Fields of a dataclass as HfArgumentParser takes them: tuples become lists, help comes from the docstring."""
    hints, told = get_type_hints(config), _attributes(inspect.getdoc(config) or "")
    for one in fields(config):
        kind = hints[one.name]
        help_text = {"help": one.metadata.get("help", told.get(one.name, " "))}
        flag: Any = field(default=one.default, metadata=help_text)
        if get_origin(kind) is tuple:
            kind, start = list[kind.__args__[0]], [] if one.default is MISSING else list(one.default)
            flag = field(default_factory=start.copy, metadata=help_text)
        elif one.default_factory is not MISSING:
            flag = field(default_factory=one.default_factory, metadata=help_text)
        yield one.name, kind, flag


def _setting(value: Any, *, needed: bool) -> tuple[Any, Field]:
    """Type and field of a gate's setting, from its default."""
    kind: Any = type(value) if isinstance(value, bool | int | float | str) else literal
    flag: Any = field(default=MISSING if needed else value, metadata={"help": " "})
    return kind, flag


def _attributes(text: str) -> dict[str, str]:
    """What the "Attributes" of a docstring say, by name."""
    section = text.partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+(?:, \w+)*): (.+(?:\n {8}.+)*)", section, re.MULTILINE)
    joined = {name: " ".join(said.split()).replace("%", "%%") for names, said in found for name in names.split(", ")}
    return {name: said[0].lower() + said[1:] for name, said in joined.items()}


def _for_config(config: type, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values of a config's fields, lists as the tuples that it wants."""
    hints = get_type_hints(config)
    for one in fields(config):
        wanted = get_origin(hints[one.name]) is tuple
        yield one.name, tuple(values[one.name]) if wanted else values[one.name]


def _early(words: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Values of a few flags, before all of them are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, default=argparse.SUPPRESS)
    return vars(parser.parse_known_args(list(words))[0])


def _as_defaults(written: dict[str, Any], parser: Any, kinds: Sequence[type]) -> Iterator[tuple[str, Any]]:
    """Values of a file as argparse reads words: text is converted and checked.

    Raises:
        UsageError: a list or nothing where a value is wanted, or a list of something else.
    """
    actions = {action.dest: action for action in parser._actions}
    typed = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for name, value in written.items():
        many, kind = actions[name].nargs in ("+", "*"), actions[name].type
        if (isinstance(value, list) and not many) or (value is None and not _takes_nothing(typed[name])):
            raise UsageError(
                f"the configuration file sets {name} to {json.dumps(value)}; give it a value, or leave it out"
            )
        try:
            many_values = [kind(str(one)) if kind else str(one) for one in value] if isinstance(value, list) else None
            plain = json.dumps(value) if isinstance(value, dict) else str(value)
        except (ValueError, TypeError, RecursionError, argparse.ArgumentTypeError) as error:
            raise UsageError(
                f"the configuration file sets {name} to something else than its values: {error}"
            ) from error
        yield name, None if value is None else plain if many_values is None else many_values


def _takes_nothing(hint: Any) -> bool:
    """Whether None is a value of this type; those of functions that read words have none to ask."""
    return not isinstance(hint, type) and (not get_args(hint) or type(None) in get_args(hint))


def _refuse_unknown(names: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(names) - known):
        own = ", ".join(sorted(known - TRAINING_FIELDS))
        raise UsageError(
            f"{where} sets {', '.join(unknown)}, which nobody here knows; known are {own}, and the fields of "
            "transformers.TrainingArguments"
        )
