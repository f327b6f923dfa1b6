"""How close a policy comes to the oracle, in figures that need no task.

top recall        share of the tokens the oracle would keep, of those that may go at an event, that the policy keeps
                  (ForesightKV, arXiv 2602.03203)
regret            attention lost over all budgets by following the policy's scores, over the best ranking's; 1 is best
                  (KVP, arXiv 2602.10238)
attention kept    full-cache attention that falls on tokens still held; mean over queries, and the worst block
loss ratio        loss under eviction over that with the full cache
recovered loss    (loss of random - loss) / (loss of random - loss of golden) under the same budget, period and guards;
                  its key is oracle_gap_closed
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.errors import UsageError
from learnevict.infer.attach import attach
from learnevict.infer.teacher_forcing import prefill
from learnevict.ops.select import eviction_order, highest
from learnevict.oracle.reference import EventScores, Reference, losses, recording
from learnevict.oracle.traces import evictable
from learnevict.policy import AnyPolicy, Governor, Guard, governor
from learnevict.signals import NEVER, Trace


def top_recall(
    scores: Float[Tensor, "*B N"],
    targets: Float[Tensor, "*B N"],
    candidates: Bool[Tensor, "*B N"],
    count: Int[Tensor, "*B"],
) -> Float[Tensor, "*B"]:
    """Returns which share of the `count` candidates with the highest targets is among the `count` with the highest scores.

    Of equal ones the older is left out. NaN where count is 0."""
    chosen, wanted = (highest(values.masked_fill(~candidates, -torch.inf), count) for values in (scores, targets))
    return (chosen & wanted & candidates).sum(-1) / count.minimum(candidates.sum(-1))


def ranking_cost(
    scores: Float[Tensor, "*B N"], targets: Float[Tensor, "*B N"], candidates: Bool[Tensor, "*B N"]
) -> Float[Tensor, "*B"]:
    """Returns the targets lost over all budgets by evicting from the lowest score up: sum over r = 1, 2, ... of (r - 1) I_r.

    Section 4 of arXiv:2602.10238, in closed form. The regret is its ratio to `ranking_cost(targets, targets, candidates)`.
    """
    order = eviction_order(scores.masked_fill(~candidates, -torch.inf))
    return ((scores.shape[-1] - 1 - order) * targets.masked_fill(~candidates, 0)).sum(-1)


def kept_attention(
    labels: Float[Tensor, "*L B H T M"], expiry: Int[Tensor, "*L B H T"], position: Int[Tensor, "B T"], block: int
) -> Float[Tensor, "*L B H M"]:
    """Returns the share of the full-cache attention of every block of queries that falls on tokens still held.

    Exact for tokens that go between blocks; one that goes inside a block counts for the part of it that saw it. NaN for blocks
    without queries.

    Args:
        labels: mean attention of each block's queries to each key.
        expiry: columns.
        position: each real token's unpadded position, -1 for padding.
        block: queries per block.
    """
    seen = (position >= 0).cumsum(-1).unsqueeze(1).expand(expiry.shape)
    before = seen.gather(-1, (expiry.clamp(1, expiry.shape[-1]) - 1).long())  # real tokens until it goes
    before = torch.where(before == seen[..., -1:], NEVER, before)
    start = torch.arange(labels.shape[-1], device=labels.device) * block
    held = ((before.unsqueeze(-1) - start) / block).clamp(0, 1)
    return (labels * held).sum(-2) / labels.sum(-2)


def recovered_loss(random: float, method: float, golden: float) -> float:
    """Returns how much of the loss from random eviction (0) to golden (1) a method recovers; NaN where these do not differ."""
    return (random - method) / (random - golden) if random != golden else float("nan")


@dataclass(frozen=True)
class KeptSlots:
    """What a policy kept beside what the oracle would have kept, float64 [B]; figures are ratios of sums.

    Attributes:
        wanted_kept, wanted: tokens that the oracle would keep, over heads and events, and how many of them are kept.
        cost, least_cost: see `ranking_cost`; summed over heads and events, NaN if the policy has no scores.
        attention_kept, queries: share of attention kept summed over queries, heads and layers, and their number.
        attention_least: share kept of the block, head and layer that keeps least; 1 if nothing was evicted.
    """

    wanted_kept: Tensor
    wanted: Tensor
    cost: Tensor
    least_cost: Tensor
    attention_kept: Tensor
    queries: Tensor
    attention_least: Tensor


@dataclass(frozen=True)
class PolicyMetrics:
    """What a policy kept and what that cost: losses summed over the tokens of the loss mask, float64 [B]."""

    choices: KeptSlots
    loss: Tensor
    full_loss: Tensor
    random_loss: Tensor
    golden_loss: Tensor

    def figures(self) -> dict[str, float]:
        """Returns the figures over all texts by name, without those that are undefined (nothing was evicted, no scores)."""
        chosen = self.choices
        loss, chance, best = (float(part.sum()) for part in (self.loss, self.random_loss, self.golden_loss))
        found = {
            "loss": loss / len(self.loss),
            "loss_ratio": _over(self.loss, self.full_loss),
            "oracle_gap_closed": recovered_loss(chance, loss, best),
            "top_recall": _over(chosen.wanted_kept, chosen.wanted),
            "regret": _over(chosen.cost, chosen.least_cost),
            "attention_kept": _over(chosen.attention_kept, chosen.queries),
            "attention_kept_min": float(chosen.attention_least.min()),
        }
        return {name: value for name, value in found.items() if value == value}


@torch.no_grad()
def measure(model: PreTrainedModel, policy: AnyPolicy, reference: Reference) -> PolicyMetrics:
    """Runs a policy teacher-forced over the texts of a reference and compares it, text by text.

    Raises:
        UsageError: the policy has events at another period than the labels have blocks.
    """
    policy = governor(policy)
    recorded, scores = recording(policy)
    with attach(model, recorded, record=True, prompt_length=reference.prompt.tolist()) as cache:
        logits = prefill(model, cache, reference.input_ids, reference.attention_mask)
    trace = cache.trace()
    chance, golden = reference.losses_between(model, reference.roll(trace.expiry[reference.layers], guard_of(policy)))
    loss = losses(logits, reference.input_ids, reference.loss_mask)
    return PolicyMetrics(compare(policy, reference, trace, scores), loss, reference.loss, chance, golden)


def compare(policy: Governor, reference: Reference, trace: Trace, scores: list[EventScores]) -> KeptSlots:
    """Returns what was kept in a run over the texts of a reference, from its trace and its recorded scores.

    Raises:
        UsageError: the policy has events at another period than the labels have blocks.
    """
    if policy.schedule.active and policy.schedule.period != reference.block:
        raise UsageError(
            f"{policy.name} has an event every {policy.schedule.period} tokens, but the labels have blocks of "
            f"{reference.block}; make the reference with block={policy.schedule.period}"
        )
    expiry, guard = trace.expiry[reference.layers], guard_of(policy)
    return KeptSlots(
        *recalled(reference, expiry, guard),
        *ranked(reference, expiry, guard, scores),
        *attended(reference, expiry),
    )


def guard_of(policy: Governor) -> Guard:
    """Returns the part of a policy's guard that holds for all: a window that grows with the budget is the policy's choice."""
    return Guard(policy.guard.sinks, policy.guard.recent, policy.guard.prompt)


def recalled(reference: Reference, expiry: Int[Tensor, "L B H T"], guard: Guard) -> tuple[Tensor, Tensor]:
    """Returns how many of the tokens that the oracle would keep are kept, and how many it would keep: [B] each."""
    roll, position = reference.roll(expiry, guard), reference.position
    hits, total = position.new_zeros(len(position)), position.new_zeros(len(position))
    for m in range((int(position.max()) + 1) // reference.block):
        seen = (m + 1) * reference.block
        end = ((position == seen - 1).int().argmax(-1) + 1)[:, None, None]
        there = (position == seen - 1).any(-1)[:, None, None]
        held = (expiry >= end) & roll.candidates(position.unsqueeze(1), m) & there
        goes = held & (expiry == end)
        count = (held & ~goes).sum(-1) * goes.any(-1)
        best = highest(reference.future[..., m + 1].masked_fill(~held, -torch.inf), count)
        hits, total = hits + (best & held & ~goes).sum((0, 2, 3)), total + count.sum((0, 2))
    return hits.double(), total.double()


def ranked(
    reference: Reference, expiry: Int[Tensor, "L B H T"], guard: Guard, scores: list[EventScores]
) -> tuple[Tensor, Tensor]:
    """Returns costs of the scores' rankings and of the best ones, summed over heads and events that evicted: [B] each."""
    cost, least = torch.full((2, len(reference.position)), 0.0 if scores else torch.nan).double()
    for event in scores:
        layer, where = reference.layers.index(event.layer), event.position.clamp_min(0).long()
        now = event.now.clamp_min(0).long()
        seen = reference.position.gather(1, now[:, None]) + 1
        position = reference.position.unsqueeze(1).expand(-1, where.shape[1], -1).gather(-1, where)
        prompt = (reference.prompt * guard.prompt).view(-1, 1, 1)
        free = evictable(position, seen.unsqueeze(-1), prompt, guard, reference.block) & (event.position >= 0)
        block = (-(-seen // reference.block)).clamp(max=reference.labels.shape[-1]).view(-1, 1, 1, 1)
        future = reference.future[layer]
        wanted = future.gather(-1, block.expand(*future.shape[:3], 1)).squeeze(-1).gather(-1, where)
        went = (expiry[layer] == (now + 1).view(-1, 1, 1)).any(-1).cpu()
        cost += (ranking_cost(event.scores, wanted, free).double().cpu() * went).sum(-1)
        least += (ranking_cost(wanted, wanted, free).double().cpu() * went).sum(-1)
    return cost, least


def attended(reference: Reference, expiry: Int[Tensor, "L B H T"]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns attention kept summed over queries after a row's first eviction, their number, and the least share: [B] each."""
    share = kept_attention(reference.labels, expiry, reference.position, reference.block)
    blocks = torch.arange(share.shape[-1], device=share.device) * reference.block
    queries = (reference.position.amax(-1, keepdim=True) + 1 - blocks).clamp(0, reference.block)
    first = expiry.amin((0, 2, 3))
    seen = (reference.position >= 0).cumsum(-1).gather(1, (first.clamp(1, expiry.shape[-1]) - 1).long()[:, None])
    queries = queries * ((first != NEVER).unsqueeze(-1) & (blocks >= seen))
    weight = queries[None, :, None].expand(share.shape)
    total = (share.nan_to_num() * weight).double().sum((0, 2, 3))
    worst = share.masked_fill(weight == 0, 1.0).amin((0, 2, 3)).double()
    return total, weight.double().sum((0, 2, 3)), worst


def _over(above: Tensor, below: Tensor) -> float:
    return float(above.sum() / below.sum()) if float(below.sum()) else float("nan")
