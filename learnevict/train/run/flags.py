"""The command line of a program: the fields of its dataclasses are flags, over those of a YAML file.

A name that several dataclasses have (the event period, say) is one flag, and all of them get its value.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from learnevict.errors import UsageError

MOST = 2**32 - 1
"""The largest number that a flag takes unless it says so: the largest seed of numpy."""
LITTLE = 1e-30
TRAINING = {
    **dict.fromkeys(("max_steps", "local_rank"), -1),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "temperature"), LITTLE),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit",
         "eval_accumulation_steps", "torch_empty_cache_steps", "ddp_timeout", "ddp_bucket_cap_mb", "num_generations",
         "num_generations_eval", "num_iterations", "steps_per_generation", "generation_batch_size"),
        1,
    ),
}  # fmt: skip
"""The least of TrainingArguments and trl.GRPOConfig, whose fields are not ours; 0 for all others."""
TRAINING_MOST = {
    "dataloader_num_workers": 1024, "ddp_timeout": 10**6, "adam_beta1": 1 - 1e-9, "adam_beta2": 1 - 1e-9,
    "label_smoothing_factor": 1, "top_p": 1,
}  # fmt: skip
REPORTERS = ("wandb", "tensorboard", "trackio")
"""Packages that TrainingArguments does not miss before training begins."""


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, the description is left as it is written."""


def flag(default: Any = MISSING, said: str = " ", *, least: float | None = None, most: float = MOST) -> Any:
    """Returns a dataclass field that is a flag.

    Args:
        default: of the field; a list is copied.
        said: what --help says of it.
        least, most: of a number; None: 1 where the default is a positive integer, above 0 where it is another positive number,
            otherwise 0.
    """
    if least is None:
        positive = isinstance(default, int | float) and default > 0
        least = 0 if not positive else 1 if isinstance(default, int) else LITTLE
    metadata = {"help": said, "least": least, "most": most}
    if isinstance(default, list):
        return field(default_factory=list[Any](default).copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Refuses numbers that are NaN or out of their flag's range, and texts that are empty; for a dataclass's __post_init__.

    Raises:
        UsageError: naming the flag.
    """
    for one in fields(config):
        value, said = getattr(config, one.name), one.metadata
        for number in value if isinstance(value, list | tuple) else (value,):
            check_number(one.name, number, said.get("least", 0), said.get("most", MOST))
        if one.default and value == "":
            raise UsageError(f"--{one.name} is empty; give it a value, or leave it out")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Refuses a number that is NaN or out of its range; what is no number is passed over."""
    if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value <= most:
        said = "a number above 0" if least == LITTLE else f"{max(least, -MOST):.10g} or more"
        raise UsageError(f"--{name} {value}: give {said}, and at most {most:.10g}")


@dataclass
class Flags:
    """The values of all flags by name, and the names that the file or the command line mentions."""

    values: dict[str, Any]
    given: set[str]

    def of(self, config: Any) -> Any:
        """Returns one of these dataclasses, made of the values.

        Raises:
            UsageError: values out of range, or TrainingArguments that contradict each other.
        """
        hints = get_type_hints(config)
        own: dict[str, Any] = {one.name: self.values[one.name] for one in fields(config) if one.init}
        own |= {name: tuple(value) for name, value in own.items() if get_origin(hints[name]) is tuple}
        made: Any = config
        if not issubclass(config, TrainingArguments):
            return made(**own)
        try:
            made = made(**own)
        except (ValueError, TypeError, AttributeError, ArithmeticError, OSError) as error:
            raise UsageError(f"these flags do not work together: {' '.join(str(error).split())}") from error
        check_training(made)
        return made


def read_flags(
    parts: Mapping[str, type],
    arguments: Sequence[str] | None,
    description: str | None,
    *,
    defaults: Mapping[str, Any] | None = None,
    smoke: Mapping[str, Any] | None = None,
    program: str | None = None,
    whose: str = "here",
) -> Flags:
    """Reads a command line; --a-name and --a_name are the same flag.

    Args:
        parts: dataclasses of flags, by the titles that --help shows; kinds of TrainingArguments are shown last.
        arguments: words after the program's name, of which the first may be a YAML file of flags; None: this process's.
        description, program: shown by --help; without a program the name of this process.
        defaults: in place of those of the dataclasses.
        smoke: defaults under --smoke.
        whose: flags these are, for errors.

    Raises:
        UsageError: an unknown flag, here or in the file, or values that a flag of the file cannot have.
        SystemExit: from argparse, after --help or a mistake.
    """
    words, written = read_file(sys.argv[1:] if arguments is None else arguments)
    refuse_unknown(written, parts.values(), "the configuration file")
    kinds: Any = list(_groups(parts))
    usage = "%(prog)s [config.yaml] [flags]"
    parser: Any = HfArgumentParser(
        kinds, prog=program, usage=usage, description=description, formatter_class=_Help, allow_abbrev=False
    )
    parser._action_groups.sort(key=lambda group: group.title == "options")
    words = [*_as_words(written, parser), *words]
    preset = dict(defaults or {})
    if smoke is not None and parser.parse_known_args(words)[0].smoke:
        preset |= smoke
    parser.set_defaults(**{**preset, **{name: None for name, value in written.items() if value is None}})
    found, unknown = parser.parse_known_args(words)
    if unknown:
        raise UsageError(f"{' '.join(unknown)} is no flag {whose}; see --help")
    given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return Flags(vars(found), given | set(written))


def is_file(word: str = "") -> bool:
    """Returns whether a word is the name of a file of flags."""
    return word.lower().endswith((".yaml", ".yml"))


def read_file(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Returns the words without a YAML file in front, and its flags; a UsageError if it cannot be read or is no mapping."""
    import yaml

    words = list(arguments)
    if not is_file(*words[:1]):
        return words, {}
    path = Path(words.pop(0))
    try:
        found, node = (read(path.read_text(encoding="utf-8")) for read in (yaml.safe_load, yaml.compose))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read flags from {str(path)!r}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{str(path)!r} holds no flags; write one a line, as in `learning_rate: 0.001`")
    names = [str(name.value).replace("-", "_") for name, _ in node.value] if node else []
    if twice := ", ".join(sorted({name for name in names if names.count(name) > 1})):
        raise UsageError(f"{str(path)!r} sets {twice} more than once; leave one of them")
    return words, {str(name).replace("-", "_"): value for name, value in found.items()}


def refuse_unknown(names: Iterable[str], parts: Iterable[type], where: str) -> None:
    """Raises UsageError if a name is no field of any of these dataclasses."""
    own = [one for one in parts if not issubclass(one, TrainingArguments)]
    known = {one.name for part in own for one in fields(part)}
    training = {one.name for part in parts if part not in own for one in fields(part)}
    if unknown := sorted(set(names) - known - training):
        also = ", and the fields of transformers.TrainingArguments" if training else ""
        raise UsageError(
            f"{where} sets {', '.join(unknown)}, which nobody here knows; known are {', '.join(sorted(known))}{also}"
        )


def literal(text: Any) -> Any:
    """Returns what a word without a type means: 16 is a number, true a truth value, anything else text."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "none", "null") else text)
    except ValueError:
        return None if text.lower() == "none" else text


def _groups(parts: Mapping[str, type]) -> Iterator[type]:
    """Yields the dataclasses as HfArgumentParser takes them: no name twice, lists for tuples, only help as metadata."""
    training = [part for part in parts.values() if issubclass(part, TrainingArguments)]
    taken = {one.name for part in training for one in fields(part)}
    for title, part in parts.items():
        hints, made = get_type_hints(part), list[Any]()
        for one in fields(part):
            if part in training or one.name in taken:
                continue
            start: Any = one.default
            hint, said = hints[one.name], {"help": one.metadata.get("help", " ").replace("%", "%%")}
            if get_origin(hint) is tuple:
                hint, start = list[hint.__args__[0]], list[Any]() if start is MISSING else list(start)
            elif one.default_factory is not MISSING:
                start = one.default_factory()
            many = isinstance(start, list)
            own: Any = field(default_factory=start.copy, metadata=said) if many else field(default=start, metadata=said)
            made.append((one.name, hint, own))
        taken |= {one.name for one in fields(part)}
        if made:
            name = re.sub(r"\W+", "_", title).title()
            yield make_dataclass(name, made, namespace={"_argument_group_name": title}, kw_only=True)
    yield from training


def _as_words(written: Mapping[str, Any], parser: Any) -> Iterator[str]:
    """Yields the flags of a file as a command line has them.

    Raises:
        UsageError: a list, or nothing, where a value is wanted.
    """
    many = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    for name, value in written.items():
        empty = (
            name == "output_dir"
            or isinstance(hints[name], type)
            or (get_args(hints[name]) and type(None) not in get_args(hints[name]))
        )
        if (isinstance(value, list) and (name not in many or not value)) or (value is None and empty):
            raise UsageError(
                f"the configuration file sets {name} to {json.dumps(value)}; give it a value, or leave it out"
            )
        if isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        elif value is not None:
            yield f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"


def check_training(training: TrainingArguments) -> None:
    """Refuses TrainingArguments with which training would end in an error, or in something else than was asked for.

    Raises:
        UsageError: naming the flag.
    """
    for name, value in ((one.name, getattr(training, one.name)) for one in fields(training) if one.init):
        check_number(name, value, TRAINING.get(name, 0), TRAINING_MOST.get(name, MOST))
        if name.endswith("_kwargs") and value is not None and not isinstance(value, dict):
            raise UsageError(f'--{name} {value!r} is no object of JSON; write {{"name": value}}')
    if training.max_steps == 0:
        raise UsageError("--max_steps 0: give 1 or more, or -1 to count epochs")
    if not str(training.output_dir or ""):
        raise UsageError("--output_dir is empty; name a folder")
    _check_optimizer(training)
    wanted = [training.report_to] if isinstance(training.report_to, str) else training.report_to or []
    if unknown := [name for name in wanted if name not in (*INTEGRATION_TO_CALLBACK, "all", "none")]:
        raise UsageError(
            f"--report_to {' '.join(unknown)}: nobody reports there; choose from none, {', '.join(REPORTERS)}"
        )
    missing = [name for name in wanted if name in REPORTERS and importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--report_to {' '.join(missing)}: not installed; pip install {' '.join(missing)}, or drop it")


def _check_optimizer(training: TrainingArguments) -> None:
    """Makes an optimizer and a schedule as training will, for one weight. A few kinds of optimizer need the model: those not.

    Raises:
        UsageError: they cannot be made.
    """
    from transformers import Trainer, get_scheduler  # which programs that do not train need not import

    name, kind = str(training.optim), str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    given = f"--optim {getattr(training.optim, 'value', name)} --optim_args {training.optim_args!r}"
    try:
        if not any(one in name.lower() for one in ("galore", "lomo", "apollo")):
            made, options = Trainer.get_optimizer_cls_and_kwargs(training)
            optimizer = made([torch.nn.Parameter(torch.zeros(1))], **options)
            more: Any = training.lr_scheduler_kwargs
            given = f"--lr_scheduler_type {kind} --lr_scheduler_kwargs {json.dumps(more)}"
            get_scheduler(kind, optimizer, 0, 10, scheduler_specific_kwargs=more)
    except Exception as error:  # each raises what it likes
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"{given} cannot be used ({said}); write names and values that these know") from error
