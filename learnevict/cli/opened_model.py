"""A model that is open, with the policy that governs its cache, and the answers it gives."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learnevict.cli.options import EvictionOptions, ModelOptions
from learnevict.errors import GateError, UsageError

if TYPE_CHECKING:
    from learnevict.cli.prompts import Request
    from learnevict.evals.methods import EvaluationSettings
    from learnevict.infer.generate import Completion
    from learnevict.policy import Policy

TESTBED = "testbed"
COMPARISON = {"sinks": 4, "recent": 8, "slack": 16}
"""Settings for the testbed's texts of some 350 tokens; those of papers assume thousands."""


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to run, and what governs its cache.

    Attributes:
        name: what the user called it.
        model, tokenizer: what was loaded.
        eviction: what the user said about eviction.
        policy: of the cache; None for a full one, and for golden, whose policy is made for each text.
    """

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    eviction: EvictionOptions = field(default_factory=EvictionOptions)
    policy: Policy | None = None

    @property
    def speaks_testbed(self) -> bool:
        """Whether its vocabulary is the testbed's, so that task prompts make sense to it."""
        return self.name == TESTBED or self.tokenizer.get_vocab() == _testbed_vocabulary()

    @property
    def method(self) -> str:
        """Name of the method that evicts."""
        if self.eviction.golden:
            return "golden"
        return "full" if self.policy is None else self.policy.name

    @property
    def options(self) -> dict[str, Any]:
        """Options of the policy: what was given, over what suits the model."""
        return {**(COMPARISON if self.speaks_testbed else {}), **self.eviction.given}

    @property
    def golden(self) -> tuple[str, EvaluationSettings]:
        """The budget and the settings under which the oracle evicts."""
        from learnevict.evals.methods import EvaluationSettings

        options: dict[str, Any] = {"slack": 128, "sinks": None, "recent": None, **self.options}
        return self.eviction.budget or "", EvaluationSettings(**options)

    def under(self, eviction: EvictionOptions) -> OpenedModel:
        """Returns the same model with the policy that was asked for; `attach` then compares it with the base of the gates.

        Raises:
            UsageError: a budget without a method, or an option that the method does not have.
            GateError: gates missing, or of another method.
            BudgetError: a budget that cannot be held.
        """
        opened = replace(self, eviction=eviction, policy=None)
        if eviction.full or eviction.golden:
            return opened
        make = opened._maker()
        # What suits the model is left out where a method has no such option; what was given never.
        parameters = inspect.signature(make).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        options = {
            option: value
            for option, value in opened.options.items()
            if takes_all or option in parameters or option in eviction.given
        }
        try:
            return replace(opened, policy=make(eviction.budget, **options))
        except TypeError as error:
            raise UsageError(f"the method does not take these options: {error}") from error

    def policy_for(self, ids: list[int]) -> Policy:
        """Returns the policy for a text that is there already; golden reads it beforehand."""
        if self.policy is not None:
            return self.policy
        import torch

        from learnevict.evals.methods import golden_policy

        rows = torch.tensor([ids], device=self.model.device)
        return golden_policy(self.model, rows, *self.golden)

    def begins_early(self, request: Request, record: dict[str, Any]) -> bool:
        """Returns whether the cache evicted what a chat asks about before it had read the question, which stands at the end."""
        if self.policy is None or not request.chat:
            return False
        schedule = self.policy.schedule
        early = schedule.active and schedule.prompt == "blocks" and not self.policy.guard.prompt
        return early and record["prompt_tokens"] > record["budget_tokens"] + schedule.slack

    def _maker(self) -> Any:
        """Returns the function that makes the policy: of a method, or of the gates that were given or that ship."""
        from learnevict import methods
        from learnevict.hub import Gates

        method, source = self.eviction.method, self.eviction.checkpoint
        if method is None and source is None:
            if not self.speaks_testbed:
                raise UsageError(
                    "a budget needs a method that evicts: give --method (see `learnevict list`) or --ckpt with gates"
                )
            method = "foresightkv"
        if source is None and method is not None:
            module = methods.load(method)
            if module.PAPER.kind != "learned":
                return module.policy
            if not self.speaks_testbed or (source := shipped(method)) is None:
                raise GateError(
                    f"method {method!r} is learned and there are no gates for {self.name!r}; give --ckpt with a folder "
                    "or Hub id, or train some: `learnevict train NAME`"
                )
        gates = Gates.load(source or "")
        given = self.eviction.checkpoint is not None  # dbtrimkv ships as gates of trimkv that are tied
        if given and method not in (None, gates.method):
            raise GateError(f"the gates in {source!r} are of method {gates.method!r}, not {method!r}; drop --method")
        return partial(gates.policy, allow_other_base=self.eviction.allow_other_base)

    def answer(
        self, requests: Sequence[Request], *, streamer: Any = None, **sampling: Any
    ) -> list[tuple[Completion, dict[str, Any]]]:
        """Generates answers to requests, as one batch, each with the row of figures that --json and --batch write.

        Args:
            requests: prompts.
            streamer: is given the text of a single answer as it comes.
            **sampling: as in `infer.generate.generate`: seed, max_new_tokens, temperature, record.
        """
        from learnevict.evals.generation import generate_golden
        from learnevict.infer.generate import generate

        prompts = [request.ids for request in requests]
        if not self.eviction.golden:
            found = generate(
                self.model, self.tokenizer, self.policy, prompts, batch_size=len(prompts), streamer=streamer, **sampling
            )
            return [(one, self._record(request, one)) for request, one in zip(requests, found, strict=True)]
        found, agreed = generate_golden(
            self.model, self.tokenizer, prompts, *self.golden, streamer=streamer, **sampling
        )
        return [
            (one, self._record(request, one, runs=2, agreement=round(share, 4)))
            for request, one, share in zip(requests, found, agreed, strict=True)
        ]

    def _record(self, request: Request, one: Completion, **golden: Any) -> dict[str, Any]:
        flat = [count for layer in one.kept for count in layer]
        return {
            "id": request.name,
            "text": one.text,
            "finished": one.finished,
            **request.checked(self.tokenizer.decode(one.tokens)),
            **golden,
            "model": self.name,
            "method": self.method,
            "budget": self.eviction.budget,
            "budget_tokens": one.budget,
            "prompt_tokens": len(one.prompt),
            "tokens_generated": len(one.tokens),
            "tokens_per_second": round(one.tokens_per_second, 2),
            "prompt_seconds": round(one.prompt_seconds, 4),
            "kept": {"mean": round(sum(flat) / len(flat), 2), "min": min(flat), "max": max(flat)},
            "kv_bytes_end": one.kv_bytes,
            "kv_bytes_peak": one.kv_bytes_peak,
            "kv_bytes_full": one.kv_bytes_full,
        }


def shipped(name: str) -> str | None:
    """Returns the folder of the testbed's own gates for a learned method or its stage before refinement ("NAME-sl")."""
    from learnevict.hub import GATES_FOLDER

    folder = GATES_FOLDER / f"{TESTBED}-{name}"
    return str(folder) if Path(name).name == name and folder.is_dir() else None


@cache
def _testbed_vocabulary() -> dict[str, int]:
    from learnevict.testbed import build_tokenizer

    return build_tokenizer().get_vocab()


def open_model(options: ModelOptions, *, bars: bool = True) -> OpenedModel:
    """Loads a model by name; "testbed" is the bundled one.

    Raises:
        ModelError: it cannot be loaded.
        UsageError: no such device.
    """
    from learnevict import testbed
    from learnevict.infer.load import load, quiet

    bundled = options.model == TESTBED
    quiet(bars=bars and not bundled and sys.stderr.isatty())
    source, dtype = options.model, options.dtype.value
    if bundled:
        source, dtype = str(testbed.path()), "fp32" if dtype == "auto" else dtype
    pickle = options.allow_pickle and not bundled
    return OpenedModel(options.model, *load(source, device=options.device, dtype=dtype, allow_pickle=pickle))
