"""The trainable methods: MODES maps the `mode` that a gate names to the trainer that trains it.

So methods stay free of transformers and of each other, and a method of yours (an import path) is trained like ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, make_dataclass
from importlib import import_module
from math import inf
from typing import Any

from learnevict import methods
from learnevict.config import Layout
from learnevict.errors import GateError, UsageError
from learnevict.policy import Gate
from learnevict.train.run.flags import MOST, check_fields, flag, literal

MODES = {
    "replay": ("pairwise", "RankingTrainer"),
    "stream": ("regression", "StreamTrainer"),
    "soft": ("soft_gate", "SoftTrainer"),
    "probe": ("probe", "ProbeTrainer"),
}
"""Trainers of learnevict.train.trainers by mode: module and class. They are imported on use."""
ANY_LAYOUT = Layout(
    num_layers=1, num_heads=2, num_query_heads=4, head_dim=32, value_dim=32, hidden_size=128, vocab_size=64
)
"""The layout of no model, for gates that are only asked for their mode and their settings."""
LEAST = {
    **dict.fromkeys(("hidden", "window", "rank", "num_tokens", "state", "period"), 1),
    **dict.fromkeys(("num_sinks", "noise", "dropout", "alpha"), 0),
}
"""The least of gates' settings; a method of yours may give other names any meaning."""


@dataclass(frozen=True)
class TrainableMethod:
    """A method that can be trained, and how.

    Attributes:
        method: its name or import path.
        mode: of its gate.
        settings: what its `build` takes besides the layout, with the defaults.
        defaults: the method's TRAINING: values for the trainer's config, the gate's settings and TrainingArguments.
    """

    method: str
    mode: str
    settings: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def trainer(self) -> Any:
        """The trainer class, a GateTrainer; its `config_type` is the dataclass of its settings."""
        module, name = MODES[self.mode]
        return getattr(import_module(f"learnevict.train.trainers.{module}"), name)

    def gate_flags(self) -> type:
        """Returns a dataclass of the gate's settings; those that `build` has no default for are required."""
        needed, made = required(self.method), list[Any]()
        for name, value in self.settings.items():
            kind: Any = type(value) if isinstance(value, bool | int | float | str) else literal
            most = 1 - 1e-9 if name == "dropout" else MOST
            start = MISSING if name in needed else value
            made.append((name, kind, flag(start, least=LEAST.get(name, -inf), most=most)))
        return make_dataclass("GateSettings", made, namespace={"__post_init__": check_fields}, kw_only=True)


def trainable_method(method: str, given: Mapping[str, Any]) -> TrainableMethod:
    """Returns how a method is trained.

    Args:
        method: a name of learnevict.methods or an import path.
        given: settings of its gate, at least those for which `build` has no default.

    Raises:
        UsageError: no such method, or nothing trains its gate.
        GateError: it has no gate.
    """
    module = methods.load(method)
    if "build" not in vars(module):
        raise GateError(f"method {method!r} has no gate to train; learned methods have `build`")
    needed = required(method)
    if missing := [name for name in needed if name not in given]:
        raise UsageError(f"method {method!r} needs {', '.join('--' + name for name in missing)}; there is no default")
    try:
        gate: Gate = module.build(ANY_LAYOUT, **{name: given[name] for name in needed})
    except Exception as error:  # what a method raises is its own business
        raise UsageError(f"method {method!r} cannot be built: {error}") from error
    if gate.mode == "":
        raise UsageError(
            f"the gate of {method!r} is not trained by gradient steps (its mode is empty): tables are fitted with "
            "recipes/tables.py"
        )
    if gate.mode not in MODES:
        raise UsageError(f"the gate of {method!r} names mode {gate.mode!r}; there are {', '.join(sorted(MODES))}")
    return TrainableMethod(method, gate.mode, gate.settings(), dict(vars(module).get("TRAINING", {})))


def required(method: str) -> list[str]:
    """Returns the settings of a method's gate that have no default."""
    build = vars(methods.load(method)).get("build")
    parameters = list(inspect.signature(build).parameters.values())[1:] if build else []
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.default is one.empty and one.kind in plain]
