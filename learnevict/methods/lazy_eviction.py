"""LazyEviction: a token that was attended to again after a pause may be so again (arXiv 2506.15969).

TS is the step at which a token was last active (attention of at least alpha), MRI the longest pause between two such steps.
With s(x) = 1 / (1 + exp(-x)), and t - TS the pause so far:

    I = H1 + H2,   H1 = 2 s(-(t - TS) / MRI),   H2 = 0 if MRI = 0 else 2 s(1 - MRI)

The last W tokens always stay and eviction comes every W tokens, so that a pause shows before it is judged: W is the slack here.

Variants:
    gap    (default) H2 = 2 s(1 - max(MRI, t - TS)): it fades for tokens that fall silent
    paper  as above. A token active only when it was written has MRI = 1, keeps H2 = 1 for ever and outranks recurring ones
    code   H1 = 2 s(-1 - (t - TS) / MRI), as the authors' code has it, and H2 as in the paper

Departures: one TS and MRI for a kv head, active if any query head of the group is (the authors expand keys to query heads);
int32 (theirs are float16, exact up to 2048); attention inside the prompt counts too; events also inside the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose, unknown_variant
from learnevict.policy import Policy, Scorer
from learnevict.signals import Signals, StateColumn

PAPER = Paper(
    "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning",
    "2506.15969",
    2025,
)
VARIANTS = ("gap", "paper", "code")
NEW = -2
"""`active` of a slot just taken: it becomes the step before its token."""


@dataclass(frozen=True)
class Recurrence(Scorer):
    """The pause since the last activity against the longest one."""

    variant: str = "gap"
    alpha: float = 5e-4
    relative: bool = False
    columns = (StateColumn("active", dtype=torch.int32, fill=NEW), StateColumn("pause", dtype=torch.int32))
    observes = True

    def observe(self, signals: Signals) -> dict[str, Tensor]:
        """Notes which slots the fresh queries made active, one query after the other."""
        assert signals.fresh_attention is not None
        seen = signals.visible(signals.query_position).squeeze(2).sum(-1, keepdim=True)  # [B, H, S, 1]
        least = self.alpha / (seen if self.relative else torch.ones_like(seen))
        now = signals.rows.place(signals.query_position)
        active, pause = signals.state["active"], signals.state["pause"]
        active = torch.where(active == NEW, signals.place - 1, active)
        for step, weights in enumerate(signals.fresh_attention.amax(2).unbind(2)):  # over the group; [B, H, N]
            here = torch.where(weights >= least[:, :, step], now[:, step, None, None], active)
            active, pause = here, torch.maximum(pause, here - active)
        return {"active": active, "pause": pause}

    def score(self, signals: Signals) -> Tensor:
        longest = signals.state["pause"].float()
        since = (signals.rows.seen.view(-1, 1, 1) - 1 - signals.state["active"]).float()
        late = -since / (longest + 1e-5) - float(self.variant == "code")
        often = 1 - (torch.maximum(longest, since) if self.variant == "gap" else longest)
        return 2 * late.sigmoid() + (2 * often.sigmoid()).masked_fill(longest == 0, 0.0)


def policy(
    budget: AnyBudget,
    *,
    variant: str = "gap",
    alpha: float = 5e-4,
    relative: bool = False,
    **options: Unpack[Options],
) -> Policy:
    """Keep what is attended to again and again.

    Args:
        variant: see above.
        alpha: attention that makes a token active (5e-4 or 1e-4, by model: the authors' scripts).
        relative: alpha is a multiple of the average, 1 / slots held; an absolute one is below it for short caches, where every
            token is then always active.
    """
    if variant not in VARIANTS:
        raise unknown_variant("lazy_eviction", variant, VARIANTS)
    return compose("lazy_eviction", budget, Recurrence(variant, alpha, relative), **options)
