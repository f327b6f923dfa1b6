"""A model that is open, with the policy that governs its cache, and the answers it gives."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from learnevict.cli.options import EvictionOptions, ModelOptions
from learnevict.cli.prompts import Answer, Request
from learnevict.config import Budget
from learnevict.errors import GateError, UsageError

if TYPE_CHECKING:
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
    def golden(self) -> bool:
        """Whether the oracle governs the cache, which has to see a text in full first."""
        return self.eviction.method == "golden" and self.eviction.checkpoint is None

    @property
    def method(self) -> str:
        """Name of the method that evicts."""
        if self.golden:
            return "golden"
        return "full" if self.policy is None else self.policy.name

    @property
    def options(self) -> dict[str, Any]:
        """Options of the policy: what was given, over what suits the model."""
        return {**(COMPARISON if self.speaks_testbed else {}), **self.eviction.given}

    def under(self, eviction: EvictionOptions) -> OpenedModel:
        """Returns the same model with the policy that was asked for.

        Raises:
            UsageError: options that make no sense together.
            GateError: gates missing, or of another method.
            BudgetError: a budget that cannot be held.
        """
        opened = replace(self, eviction=eviction, policy=None)
        method = choose_method(opened)
        if opened.golden:
            golden_budget(eviction)
            return opened
        return replace(opened, policy=make_policy(opened, method))

    def golden_policy(self, ids: Any, mask: Any, prompts: list[int]) -> Policy:
        """Returns the policy that follows the golden trace of a text, which the model reads in full.

        Args:
            ids: int64 [B, T], prompts and answers as generation laid them out.
            mask: [B, T], 0 = padding.
            prompts: real tokens of each prompt.
        """
        import torch

        from learnevict.methods import golden
        from learnevict.oracle.collect import golden_trace
        from learnevict.policy import Guard

        options: dict[str, Any] = {"slack": 128, **self.options}
        guard = Guard(**{name: options[name] for name in ("sinks", "recent", "prompt") if name in options})
        budget, block = golden_budget(self.eviction), max(options["slack"], 1)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        length = torch.tensor(prompts)
        trace = golden_trace(self.model, ids, mask, budget=budget, block=block, guard=guard, prompt_length=length)
        return golden.policy(budget, trace=trace, text=ids, **options)

    def answer(self, requests: Sequence[Request], *, seed: int, streamer: Any = None, **sampling: Any) -> list[Answer]:
        """Generates answers to requests, as one batch.

        Args:
            requests: prompts.
            seed: of the draws.
            streamer: is given the text of a single answer as it comes.
            **sampling: as in `infer.generate.generate`: max_new_tokens, temperature, record.
        """
        from learnevict.infer.generate import generate

        call: Any = partial(
            generate, self.model, self.tokenizer, prompts=[request.ids for request in requests],
            batch_size=len(requests), seed=seed, **sampling,
        )  # fmt: skip
        if not self.golden:
            found = call(policy=self.policy, streamer=streamer)
            return [self._answer(request, one) for request, one in zip(requests, found, strict=True)]
        from learnevict.evals.generation import agreement, padded

        first = call(policy=None)
        ids, mask = padded(first, self.tokenizer.pad_token_id or 0)
        policy = self.golden_policy(ids, mask, [len(request.ids) for request in requests])
        return [
            self._answer(request, after, runs=2, agreement=round(agreement(before.tokens, after.tokens), 4))
            for request, before, after in zip(requests, first, call(policy=policy, streamer=streamer), strict=True)
        ]

    def _answer(self, request: Request, one: Any, **golden: Any) -> Answer:
        """An answer with the row of figures that --json and --batch write."""
        flat = [count for layer in one.kept for count in layer]
        record = {
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
        return Answer(request, one, record)


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

    name, dtype, bundled = options.model, options.dtype.value, options.model == TESTBED
    quiet(bars=bars and not bundled and sys.stderr.isatty())
    source = str(testbed.path()) if bundled else name
    kind = "fp32" if bundled and dtype == "auto" else dtype
    model, tokenizer = load(
        source, device=options.device, dtype=kind, allow_pickle=options.allow_pickle and not bundled
    )
    return OpenedModel(name, model, tokenizer)


def choose_method(opened: OpenedModel) -> str | None:
    """Returns the method's name; None for a full cache, or for that of the checkpoint.

    Raises:
        UsageError: a budget without a method, a method without a budget, or options of an eviction that was not asked for.
    """
    eviction = opened.eviction
    if eviction.method in (None, "full") and eviction.checkpoint is None and eviction.budget is None:
        if eviction.flags:
            raise UsageError(
                f"{' and '.join(eviction.flags)} without --budget: the cache would stay full; give --budget 48, and "
                "--method or --ckpt to choose who evicts"
            )
        return None
    if eviction.method == "full":
        raise UsageError(
            "method full keeps everything, so a budget means nothing to it; drop --budget or name another method"
        )
    if eviction.budget is None:
        raise UsageError("say how much may be kept: --budget 512 (tokens), 25%, 1/4 or 64MiB")
    if eviction.method is None and eviction.checkpoint is None and not opened.speaks_testbed:
        raise UsageError(
            "a budget needs a method that evicts: give --method (see `learnevict list`) or --ckpt with gates"
        )
    return eviction.method or (None if eviction.checkpoint is not None else "foresightkv")


def make_policy(opened: OpenedModel, method: str | None) -> Policy | None:
    """Returns the policy of a method or of a checkpoint; `attach` then compares the model with that of the gates."""
    from learnevict import methods
    from learnevict.hub import GATES_FOLDER, Gates

    eviction = opened.eviction
    module = None if method is None else methods.load(method)  # of one's own: imported, so gates may name it
    source: Any = eviction.checkpoint
    if source is None and module is None:
        return None
    if source is None and module is not None and module.PAPER.kind == "learned":
        source = GATES_FOLDER / f"testbed-{method}"
        if not opened.speaks_testbed or not source.is_dir():
            raise GateError(
                f"method {method!r} is learned and there are no gates for {opened.name!r}; give --ckpt with a folder "
                "or Hub id, or train some: `learnevict train NAME`"
            )
    make: Any
    if source is None:
        assert module is not None
        make, name = module.policy, method
    else:
        gates = Gates.load(source)
        if method is not None and gates.method != method:
            raise GateError(
                f"the gates in {str(source)!r} are of method {gates.method!r}, not {method!r}; drop --method"
            )
        make, name = partial(gates.policy, allow_other_base=eviction.allow_other_base), gates.method
    # What suits the model is left out where a method has no such option; what was given never.
    parameters = inspect.signature(make).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    options = {
        option: value
        for option, value in opened.options.items()
        if takes_all or option in parameters or option in eviction.given
    }
    try:
        return make(eviction.budget, **options)
    except TypeError as error:
        raise UsageError(f"method {name!r} does not take these options: {error}") from error


def golden_budget(eviction: EvictionOptions) -> int:
    """Returns the budget of a golden trace, in tokens.

    Raises:
        UsageError: a share or bytes.
    """
    budget = Budget.parse(eviction.budget or "")
    if budget.unit != "tokens":
        raise UsageError("golden is rolled for one budget in tokens; give --budget 64 rather than a share or bytes")
    return int(budget.amount)
