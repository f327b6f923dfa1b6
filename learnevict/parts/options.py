"""The options every method shares, in one place: so that a comparison can force the same protection on all of them.

`sinks=4` is the default of every method, also where its paper protects none (H2O, TOVA, KNorm, KeyDiff, SnapKV):
without sinks a streaming evaluation measures little else. Give `sinks=0` for the paper's letter.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypedDict

from typing_extensions import Unpack

from learnevict.config import AnyBudget, Budget
from learnevict.errors import UsageError
from learnevict.parts.allocators import Together
from learnevict.parts.shares import Shares, read_shares
from learnevict.policy import Above, Allocator, Guard, Policy, Probe, Schedule, Scorer, Store, TopK, Uniform, read_store

EQUAL, POOLED = "equal", "pooled"
DROP = "drop"
SCHEDULES: dict[str, dict[str, Any]] = {
    "blocks": {}, "prefill_end": {"prompt": "end"}, "prefill_only": {"prompt": "end", "decode": False},
}  # fmt: skip


class ScheduleOptions(TypedDict, total=False):
    """When events fall and what they never touch, for methods with a recent window of their own.

    Keys:
        sinks: first tokens of a row that stay, default 4.
        prompt: keep the whole prompt and count the budget on the rest, default False.
        slack: tokens between events, default 128; 0 evicts at every step.
        schedule: "blocks" (default) runs events inside the prompt too; "prefill_end" compresses the prompt once, when
            it has been read; "prefill_only" does that and then lets the cache grow (not bounded).
        allocation: "equal" gives every layer and head the budget, "pooled" lets all of them compete by score, a file of
            `learnevict profile` gives them fixed shares; by default the method decides. Where slots go and which tokens hold
            them are two questions, so that a comparison can hold one of them fixed.
    """

    sinks: int
    prompt: bool
    slack: int
    schedule: Literal["blocks", "prefill_end", "prefill_only"]
    allocation: str | Path | Shares
    store: str | Store


class Options(ScheduleOptions, total=False):
    """All that every method takes.

    Keys:
        recent: last tokens that stay; the default is the method's.
    """

    recent: int


def compose(
    name: str,
    budget: AnyBudget,
    scorer: Scorer,
    *,
    recent: int = 8,
    recent_share: float = 0.0,
    allocator: Allocator | None = None,
    scope: Literal["layer", "model"] = "layer",
    threshold: float | None = None,
    probe: Probe | None = None,
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Returns the policy of one method; arguments as of Policy, Guard and ScheduleOptions.

    Args:
        allocator, scope: the method's own, where `allocation` says nothing else.
        threshold: of scores, below which slots go even where the budget would hold them; None: the budget alone decides.

    Raises:
        UsageError: an unknown option, schedule or store, or an allocation beside the method's own.
        DataError: a file that holds no allocation.
        BudgetError: a budget that is not understood or cannot hold the guards.
    """
    if unknown := sorted(set(options) - Options.__optional_keys__):
        taken = ", ".join(sorted(Options.__optional_keys__))
        raise UsageError(f"{name} has no option {', '.join(unknown)}; all methods take {taken}")
    if (when := options.get("schedule", "blocks")) not in SCHEDULES:
        raise UsageError(f"schedule {when!r} is unknown; choose blocks, prefill_end or prefill_only")
    schedule = Schedule(options.get("slack", 128), **SCHEDULES[when])
    guard = Guard(options.get("sinks", 4), recent, options.get("prompt", False), recent_share)
    own, given = allocator or Uniform(), options.get("allocation")
    if given == EQUAL:
        own, scope = Uniform(), "layer"
    elif given is not None and (given, scope) != (POOLED, "model"):  # then they compete already
        if type(own) is not Uniform:
            raise UsageError(
                f"this method shares its budget out itself ({type(own).__name__}); give allocation only to methods that do not"
            )
        if given == POOLED:
            own, scope = Together(0.0), "model"
        else:
            own, scope = given if isinstance(given, Shares) else read_shares(Path(given)), "layer"
    draw = TopK() if threshold is None else Above(threshold)
    store = read_store(options.get("store", DROP))
    return Policy(Budget.parse(budget), scorer, own, schedule, guard, name, None, scope, probe, store, draw=draw)


def unknown_variant(name: str, variant: str, variants: Iterable[str]) -> UsageError:
    """Returns the error for a variant that a method does not have."""
    return UsageError(f"{name} has no variant {variant!r}; choose {', '.join(sorted(variants))}")
