"""The options every method shares, in one place: so that a comparison can force the same protection on all of them.

`sinks=4` is the default of every method, also where its paper protects none (H2O, TOVA, KNorm, KeyDiff, SnapKV):
without sinks a streaming evaluation measures little else. Give `sinks=0` for the paper's letter.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypedDict

from typing_extensions import Unpack

from learnevict.config import Budget
from learnevict.errors import UsageError
from learnevict.parts.allocation import POOLED, Shares, allocator_for
from learnevict.policy import Allocator, Guard, Policy, Schedule, Scorer, Uniform


class ScheduleOptions(TypedDict, total=False):
    """When events fall and what they never touch, for methods with a recent window of their own.

    Keys:
        sinks: first tokens of a row that stay, default 4.
        prompt: keep the whole prompt and count the budget on the rest, default False.
        slack: tokens between events, default 128; 0 evicts at every step.
        schedule: "blocks" (default) runs events inside the prompt too; "prefill_end" compresses the prompt once, when
            it has been read; "prefill_only" does that and then lets the cache grow (not bounded).
        allocation: "equal" gives every layer and head the budget, "pooled" lets all of them compete by score, a file of
            `learnevict profile` gives them fixed shares; by default the method decides.
    """

    sinks: int
    prompt: bool
    slack: int
    schedule: Literal["blocks", "prefill_end", "prefill_only"]
    allocation: str | Path | Shares


class Options(ScheduleOptions, total=False):
    """All that every method takes.

    Keys:
        recent: last tokens that stay; the default is the method's.
    """

    recent: int


def compose(
    name: str,
    budget: int | str | Budget,
    scorer: Scorer,
    *,
    recent: int = 8,
    recent_share: float = 0.0,
    allocator: Allocator | None = None,
    scope: Literal["layer", "model"] = "layer",
    **options: Unpack[ScheduleOptions],
) -> Policy:
    """Returns the policy of one method; arguments as of Policy, Guard and ScheduleOptions.

    Raises:
        UsageError: an unknown option or schedule, or an allocation beside the method's own.
        DataError: a file that holds no allocation.
        BudgetError: a budget that is not understood or cannot hold the guards.
    """
    unknown = sorted(set(options) - Options.__optional_keys__)
    if unknown:
        taken = ", ".join(sorted(Options.__optional_keys__))
        raise UsageError(f"{name} has no option {', '.join(unknown)}; all methods take {taken}")
    slack, when = options.get("slack", 128), options.get("schedule", "blocks")
    if when == "blocks":
        schedule = Schedule(slack)
    elif when in ("prefill_end", "prefill_only"):
        schedule = Schedule(slack, prompt="end", decode=when == "prefill_end")
    else:
        raise UsageError(f"schedule {when!r} is unknown; choose blocks, prefill_end or prefill_only")
    guard = Guard(options.get("sinks", 4), recent, options.get("prompt", False), recent_share)
    own = allocator or Uniform()
    if "allocation" in options and (options["allocation"], scope) != (POOLED, "model"):  # it competes already
        own, scope = allocator_for(options["allocation"], own)
    return Policy(Budget.parse(budget), scorer, own, schedule, guard, name=name, scope=scope)


def unknown_variant(name: str, variant: str, variants: Iterable[str]) -> UsageError:
    """Returns the error for a variant that a method does not have."""
    return UsageError(f"{name} has no variant {variant!r}; choose {', '.join(sorted(variants))}")
