"""From what a user names to what runs: a model, and the policy that governs its cache."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from learnevict.config import Budget
from learnevict.errors import GateError, UsageError

if TYPE_CHECKING:
    from learnevict.policy import Policy

TESTBED = "testbed"
COMPARISON = {"sinks": 4, "recent": 8, "slack": 16}
"""What the testbed's texts of some 350 tokens are judged under; papers' settings assume thousands."""


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to run. `speaks_testbed`: its vocabulary is the testbed's, so task prompts make sense to it."""

    name: str
    model: Any
    tokenizer: Any
    speaks_testbed: bool


@dataclass(frozen=True)
class PolicyChoice:
    """What the user said about eviction; None where nothing was said.

    Raises:
        BudgetError: a budget that cannot be parsed.
    """

    method: str | None = None
    checkpoint: str | None = None
    budget: str | None = None
    allow_other_base: bool = False
    sinks: int | None = None
    recent: int | None = None
    slack: int | None = None
    schedule: str | None = None
    prompt: bool | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            Budget.parse(self.budget)

    @property
    def given(self) -> dict[str, Any]:
        """Arguments for the method's `policy` that the user gave."""
        names = ("sinks", "recent", "slack", "schedule", "prompt", "variant")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def flags(self) -> list[str]:
        """The same as they are written, and whose gates are accepted: ["--slack"]."""
        written = {"prompt": "--keep-prompt"}
        other = ["--allow-other-base"] * self.allow_other_base
        return [written.get(name, f"--{name}") for name in self.given] + other

    def options(self, opened: OpenedModel) -> dict[str, Any]:
        """What was given, over what suits the model."""
        return {**(COMPARISON if opened.speaks_testbed else {}), **self.given}


def open_model(
    name: str, device: str = "auto", dtype: str = "auto", *, bars: bool = True, allow_pickle: bool = False
) -> OpenedModel:
    """Load a model by name; "testbed" is the bundled one. `allow_pickle`: as `infer.load.load`.

    Raises:
        ModelError: it cannot be loaded.
        UsageError: no such device.
    """
    from learnevict import testbed
    from learnevict.infer.load import load, quiet

    quiet(bars=bars and name != TESTBED and sys.stderr.isatty())
    if name == TESTBED:
        model, tokenizer = load(str(testbed.path()), device=device, dtype="fp32" if dtype == "auto" else dtype)
    else:
        model, tokenizer = load(name, device=device, dtype=dtype, allow_pickle=allow_pickle)
    same = tokenizer.get_vocab() == testbed.build_tokenizer().get_vocab()
    return OpenedModel(name, model, tokenizer, same)


def choose_method(choice: PolicyChoice, opened: OpenedModel) -> str | None:
    """The method's name; None for a full cache.

    Raises:
        UsageError: a budget for nobody, a method without a budget, or terms of an eviction that nobody asked for.
    """
    if choice.method in (None, "full") and choice.checkpoint is None and choice.budget is None:
        if choice.flags:
            raise UsageError(
                f"{' and '.join(choice.flags)} without --budget: the cache would stay full; give --budget 48, and "
                "--method or --ckpt to choose who evicts"
            )
        return None
    if choice.method == "full":
        raise UsageError(
            "method full keeps everything, so a budget means nothing to it; drop --budget or name another method"
        )
    if choice.budget is None:
        raise UsageError("say how much may be kept: --budget 512 (tokens), 25%, 1/4 or 64MiB")
    if choice.method is not None or choice.checkpoint is not None:
        return choice.method
    if not opened.speaks_testbed:
        raise UsageError(
            "a budget needs somebody who evicts: give --method (see `learnevict list`) or --ckpt with gates"
        )
    return "foresightkv"


def choose_policy(choice: PolicyChoice, opened: OpenedModel) -> Policy | None:
    """The policy the user asked for; None for a full cache.

    Raises:
        UsageError: options that make no sense together.
        GateError: gates missing, or made for another model.
        BudgetError: a budget that cannot be parsed or held.
    """
    from learnevict import methods
    from learnevict.hub import GATES_FOLDER, Gates

    method = choose_method(choice, opened)
    if method is None and choice.checkpoint is None:
        return None
    source: Any = choice.checkpoint
    kind = None if method is None else methods.load(method).PAPER.kind  # of one's own: imported, so gates may name it
    if source is None and kind == "learned":
        source = GATES_FOLDER / f"testbed-{method}"
        if not opened.speaks_testbed or not source.is_dir():
            raise GateError(
                f"method {method!r} is learned and there are no gates for {opened.name!r}; give --ckpt with a folder "
                "or Hub id, or train some: recipes/distill.py"
            )
    if source is None:
        assert method is not None
        return build(methods.load(method).policy, method, choice, opened)
    gates = Gates.load(source, opened.model, allow_other_base=choice.allow_other_base)
    if method is not None and gates.method != method:
        raise GateError(f"the gates in {str(source)!r} are of method {gates.method!r}, not {method!r}; drop --method")
    make = partial(gates.policy, allow_other_base=choice.allow_other_base)
    return build(make, gates.method, choice, opened)


def build(make: Any, method: str, choice: PolicyChoice, opened: OpenedModel) -> Policy:
    """Call a method's `policy`. What suits the model is left out where a method has no such option; what was given never.

    Raises:
        UsageError: an option that the method does not have.
    """
    parameters = inspect.signature(make).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    options = choice.options(opened)
    fitting = {name: options[name] for name in options if takes_all or name in parameters or name in choice.given}
    try:
        return make(choice.budget, **fitting)
    except TypeError as error:
        raise UsageError(f"method {method!r} does not take these options: {error}") from error
