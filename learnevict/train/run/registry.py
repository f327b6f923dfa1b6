"""What a method's gate is taught by: MODES maps its `mode` to a trainer, a config, and what the documents must offer.

A gate names a mode, not a trainer, so methods stay free of transformers and of each other; a method of yours (an import
path) is taught by the trainer of the mode that its gate names. The table is data: a trainer is imported when it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from math import inf
from types import ModuleType
from typing import Any

from learnevict import methods
from learnevict.config import Layout
from learnevict.errors import GateError, UsageError
from learnevict.policy import Gate
from learnevict.train.run.ranges import GATE, check_numbers

ANY_LAYOUT = Layout(
    num_layers=1, num_heads=2, num_query_heads=4, head_dim=32, value_dim=32, hidden_size=128, vocab_size=64
)
"""Of no model: gates are made for it only to be asked for their mode and their settings."""


@dataclass(frozen=True)
class Mode:
    """A way of teaching gates.

    Attributes:
        name: what `Gate.mode` says.
        module: where the trainer is; imported on use.
        trainer, config: names of the trainer class and of its frozen config dataclass in the module.
        argument: the trainer's keyword for its config.
        shortest: tokens that a document needs at least, given the config.
        stored_labels: it can learn from a label store (recipes/oracle.py).
        responses: documents need a prompt and a response of their own.
    """

    name: str
    module: str
    trainer: str
    config: str
    argument: str
    shortest: Callable[[Any], int]
    stored_labels: bool = False
    responses: bool = False

    def load(self, name: str) -> Any:
        """The trainer or config class of this name.

        Raises:
            UsageError: this installation has no such trainer.
        """
        try:
            return getattr(import_module(self.module), name)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"mode {self.name!r} is taught by {self.module}.{name}, which cannot be loaded: {error}"
            ) from error


MODES: dict[str, Mode] = {
    "replay": Mode(
        "replay", "learnevict.train.trainers.pairwise", "RankingTrainer", "RankingConfig", "ranking",
        shortest=lambda config: config.budgets[0] + config.period + 1, stored_labels=True,
    ),
    "stream": Mode(
        "stream", "learnevict.train.trainers.regression", "StreamTrainer", "StreamConfig", "stream",
        shortest=lambda config: config.guard.reserved(config.period) + 2 * config.period, stored_labels=True,
    ),
    "soft": Mode("soft", "learnevict.train.trainers.soft_gate", "SoftTrainer", "SoftConfig", "soft", shortest=lambda _: 2),
    "probe": Mode(
        "probe", "learnevict.train.trainers.probe", "ProbeTrainer", "ProbeConfig", "probe",
        shortest=lambda config: config.period + 1, responses=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TrainableMethod:
    """A method that can be taught, and how.

    Attributes:
        method: its name or import path.
        mode: its gate's.
        settings: what its `build` takes besides the layout, with the defaults.
        defaults: the method's TRAINING: values for the mode's config, the gate's settings and training arguments.
    """

    method: str
    mode: Mode
    settings: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def trainer(self) -> Any:
        """The mode's trainer class, a GateTrainer."""
        return self.mode.load(self.mode.trainer)

    @property
    def config(self) -> Any:
        """The mode's config dataclass."""
        return self.mode.load(self.mode.config)


def trainable_method(method: str, **given: Any) -> TrainableMethod:
    """How a method is taught.

    Args:
        method: a name of learnevict.methods or an import path.
        **given: settings of its gate, where `build` has some without a default.

    Raises:
        UsageError: no such method, or nothing teaches its gate.
        GateError: it has no gate.
    """
    module = methods.load(method)
    if "build" not in vars(module):
        raise GateError(f"method {method!r} has no gate to train; learned methods have `build`")
    gate = _sample_gate(module, method, given)
    if gate.mode == "":
        raise UsageError(
            f"the gate of {method!r} is not taught by steps of gradient (its mode is empty): tables are fitted with "
            "recipes/tables.py"
        )
    if gate.mode not in MODES:
        raise UsageError(
            f"the gate of {method!r} wants to be taught in mode {gate.mode!r}; there are {', '.join(sorted(MODES))}"
        )
    return TrainableMethod(method, MODES[gate.mode], gate.settings(), dict(vars(module).get("TRAINING", {})))


def required(method: str) -> list[str]:
    """Settings of a method's gate that have no default."""
    module = methods.load(method)
    parameters = (
        list(inspect.signature(vars(module)["build"]).parameters.values())[1:] if "build" in vars(module) else []
    )
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.default is one.empty and one.kind in plain]


def _sample_gate(module: ModuleType, method: str, given: dict[str, Any]) -> Gate:
    """A gate for no model."""
    missing = [name for name in required(method) if name not in given]
    if missing:
        raise UsageError(f"method {method!r} needs {', '.join('--' + name for name in missing)}; there is no default")
    check_numbers(given, GATE, otherwise=-inf)
    try:
        return module.build(ANY_LAYOUT, **given)
    except Exception as error:  # what a method raises is its own business
        raise UsageError(f"method {method!r} cannot be built: {error}") from error
