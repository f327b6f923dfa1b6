"""Golden eviction: roll block labels into a trace.

After each complete block a head forgets the tokens whose largest future label is smallest, greedily, with labels of the
full-attention map (attention is not renormalised over survivors): a strong reference, not a bound.

Departures from ForesightKV's code (arXiv 2602.03203): budgets need not divide into blocks; guards are honoured; every
row keeps its own time, so padding changes nothing; candidates are all tokens but guards and the fresh block, where the
paper takes the oldest `budget` (an option; the two differ at the first event only, if the budget is no multiple of the
block); of equal scores the older token goes, where torch.topk leaves the choice open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from learnevict.errors import BudgetError, LabelError, UsageError
from learnevict.oracle.reducers import horizon
from learnevict.signals import NEVER, Trace

Labels = Sequence[Float[Tensor, "B H T M"] | None] | Float[Tensor, "L B H T M"]


@runtime_checkable
class Protection(Protocol):
    """What may never be evicted: `learnevict.policy.Guard`, or anything with these three attributes."""

    @property
    def sinks(self) -> int:
        """First real tokens of a row."""
        ...

    @property
    def recent(self) -> int:
        """Last tokens read."""
        ...

    @property
    def prompt(self) -> bool:
        """Keep the whole prompt and count the budget on the rest."""
        ...


class RollRule(TypedDict, total=False):
    """Optional arguments of `golden`.

    Keys:
        horizon: how labels of blocks after the event become one score: "max" (default), "sum" or "discounted".
        discount: weight per block in (0, 1], for horizon="discounted".
        candidates: "all" (default): every held token but guards and the fresh block; "oldest": the oldest `budget` held
            tokens but guards, ForesightKV's form, which may reach into the fresh block.
    """

    horizon: Literal["max", "sum", "discounted"]
    discount: float | None
    candidates: Literal["all", "oldest"]


@torch.no_grad()
def golden(
    labels: Labels,
    *,
    budget: int,
    block: int,
    guard: Protection,
    valid: Bool[Tensor, "B T"] | None = None,
    prompt_length: int | Sequence[int] | Int[Tensor, "B"] | None = None,
    **rule: Unpack[RollRule],
) -> Trace:
    """Evict with hindsight: the history that keeps what the recorded future attends to most.

    In each row's own time (first real token = 0), after block m is complete: if more than `budget` slots are held, the
    candidates with the lowest score over blocks m+1, m+2, ... go until `budget` are held. A partial last block has no
    event. With block = 1 (slack 0) an event leaves budget - 1, because the victim's slot is overwritten before the next
    token attends: never budget + 1 slots.

    Args:
        labels: per layer [B, H, T, M] of `future_attention` with the same block and valid; None for a stock layer.
        budget: slots per (layer, kv head) after an event, guards and fresh block included; with a protected prompt,
            slots beside the prompt.
        block: tokens between events.
        guard: tokens that stay: first `sinks`, last `recent`, the prompt.
        valid: real tokens; default all.
        prompt_length: real prompt tokens, for all rows or each; used only if the guard protects the prompt.
        **rule: see `RollRule`.

    Returns:
        Trace with expiry [L, B, H, T] in columns of the padded input: one past the last query that attended; NEVER for
        tokens not evicted, padding and stock layers.

    Raises:
        BudgetError: the budget cannot hold guards and a fresh block.
        LabelError: labels of another block or shape, or with NaN or infinity.
        UsageError: a protected prompt of unknown length; an argument that would be ignored.

    Source: section 3.1 of arXiv:2602.03203; horizon and candidates are options here.
    """
    layers = list(labels)
    like = _check_labels(layers, block)
    rows = _rows(like, valid, prompt_length if guard.prompt else 0)
    _check_grid(like, rows, block)
    plan = _plan(budget, block, guard, rows, rule)
    kind, discount = rule.get("horizon", "max"), rule.get("discount")
    if kind not in ("max", "sum", "discounted"):
        raise UsageError(f"golden scores the future by max, sum or discounted, not {kind!r}")
    expiry = torch.full((len(layers), *like.shape[:3]), NEVER, dtype=torch.int32, device=like.device)
    for index, layer in enumerate(layers):
        if layer is not None:
            _roll(horizon(layer.to(like.device), kind, discount=discount), rows, plan, expiry[index])
    return Trace(expiry, source="golden", budget=budget, period=block, guard=(guard.sinks, guard.recent, guard.prompt))


@dataclass(frozen=True)
class _Rows:
    """The batch in row time: columns int64 [B, T + 1] by rank (real tokens first, then padding, then T: nothing)."""

    columns: Tensor
    lengths: list[int]
    prompts: list[int]


@dataclass(frozen=True)
class _Plan:
    """How many tokens go at each event, the same for all heads of a row.

    Attributes:
        evictions: [m][b], tokens of row b that go after block m.
        widths: [m], most slots a row that goes on holds after block m, prompt included.
    """

    block: int
    target: int
    sinks: int
    recent: int
    oldest: bool
    evictions: list[list[int]]
    widths: list[int]


def _check_labels(layers: list[Tensor | None], block: int) -> Tensor:
    """One of the layers, after all were found to agree."""
    given = [layer for layer in layers if layer is not None]
    if not given or block < 1:
        raise UsageError(f"golden needs labels of at least one layer and a block of at least 1 token, not {block}")
    for layer in given:
        num_tokens, num_blocks = layer.shape[2:]
        expected = math.ceil(num_tokens / block)
        if num_blocks != expected:
            raise LabelError(
                f"labels of another block: {num_tokens} tokens in blocks of {block} make {expected} label blocks, but "
                f"{num_blocks} were given; compute labels with block={block}"
            )
        if layer.shape != given[0].shape:
            raise LabelError(
                f"layers disagree: labels [B, H, T, M] of {tuple(given[0].shape)} and {tuple(layer.shape)}"
            )
        if not bool((layer < torch.inf).all()):
            raise LabelError("labels contain NaN or +infinity; were queries or keys of a diverged model recorded?")
    return given[0]


def _check_grid(like: Tensor, rows: _Rows, block: int) -> None:
    """Labels of another block can have the right shape. But attention is causal, which shows what they were made for."""
    length, num_blocks = rows.lengths[0], like.shape[-1]
    part = like[0].index_select(1, rows.columns[0, :length].to(like.device)).amax(0)
    seen = part > (-torch.inf if bool((like == -torch.inf).any()) else 0.0)
    if _made_for(seen, block) or length * num_blocks < 64:  # a few labels can look like anything
        return
    others = [other for other in range(1, 2 * block) if other != block and -(-like.shape[2] // other) == num_blocks]
    other = next((other for other in others if _made_for(seen, other)), None)
    if other is not None:
        raise LabelError(f"labels of another block: of {other} tokens, not {block}; compute labels with block={block}")


def _made_for(seen: Tensor, block: int) -> bool:
    """Whether no key is seen before its own block, and keys are seen in it: bool [T, M] in row time."""
    own = torch.arange(seen.shape[0], device=seen.device) // block
    if not len(own):
        return True
    early = torch.arange(seen.shape[1], device=seen.device) < own.unsqueeze(-1)
    ends = torch.arange(min(block, seen.shape[0]), seen.shape[0] + 1, block, device=seen.device) - 1
    return not bool((early & seen).any()) and bool(seen[ends, own[ends]].any())


def _rows(like: Tensor, valid: Tensor | None, prompt_length: int | Sequence[int] | Tensor | None) -> _Rows:
    batch, _, num, _ = like.shape
    real = torch.ones(batch, num, dtype=torch.bool) if valid is None else valid.cpu()
    if prompt_length is None:
        raise UsageError("the guard protects the prompt, but its length is unknown: give prompt_length")
    lengths = real.sum(-1)
    prompts = torch.as_tensor(prompt_length).cpu().expand(batch)
    if bool((prompts < 0).any()) or bool((prompts > lengths).any()):
        raise UsageError(f"prompt_length {prompts.tolist()} must lie within the rows' real tokens {lengths.tolist()}")
    columns = torch.cat([(~real).to(torch.int8).argsort(dim=-1, stable=True), torch.full((batch, 1), num)], -1)
    return _Rows(columns.to(like.device), lengths.tolist(), prompts.tolist())


def _plan(budget: int, block: int, guard: Protection, rows: _Rows, rule: RollRule) -> _Plan:
    """Count evictions per event, having checked that there will always be enough candidates."""
    reserve = 1 if block == 1 else 0
    smallest = max(max(guard.sinks - prompt, 0) for prompt in rows.prompts) + max(guard.recent, block) + reserve
    if budget < smallest:
        raise BudgetError(
            f"budget {budget} cannot hold {guard.sinks} sinks, {guard.recent} recent tokens and a fresh block of "
            f"{block}; the smallest that works is {smallest}"
        )
    candidates = rule.get("candidates", "all")
    if candidates not in ("all", "oldest"):
        raise UsageError(f"candidates {candidates!r} is unknown; choose all or oldest")
    target = budget - reserve
    held, evictions, widths = [0] * len(rows.lengths), list[list[int]](), list[int]()
    for seen in range(block, max(rows.lengths) + 1, block):
        excess, width = [0] * len(held), 0
        for row, (length, prompt) in enumerate(zip(rows.lengths, rows.prompts, strict=True)):
            if seen <= length:
                held[row] += min(block, max(seen - prompt, 0))
                excess[row] = max(held[row] - target, 0)
                held[row] -= excess[row]
                width = max(width, held[row] + min(prompt, seen))
        evictions.append(excess)
        widths.append(width)
    return _Plan(block, target, guard.sinks, guard.recent, candidates == "oldest", evictions, widths)


def _roll(future: Tensor, rows: _Rows, plan: _Plan, expiry: Tensor) -> None:
    """Fill expiry [B, H, T] of one layer. future [B, H, T, M]: entry m is the score over blocks m, m+1, ...

    Survivors are ranks in ascending order, with T (an empty place) where a head holds fewer; all heads step together.
    """
    batch, heads, num, num_blocks = future.shape
    columns = rows.columns.unsqueeze(1).expand(-1, heads, -1)
    prompts = torch.tensor(rows.prompts, device=future.device).view(-1, 1, 1)
    held = torch.empty(batch, heads, 0, dtype=torch.int64, device=future.device)
    ends = torch.full((batch, heads, num + 1), NEVER, dtype=torch.int32, device=future.device)
    for m, counts in enumerate(plan.evictions):
        fresh = torch.arange(m * plan.block, (m + 1) * plan.block, device=future.device)
        held = torch.cat([held, fresh.expand(batch, heads, -1)], -1)
        if not any(counts):
            continue
        candidate = _candidates(held, m, num, prompts, plan)
        wanted = (
            _scores(future, held, columns, m + 1) if m + 1 < num_blocks else torch.zeros_like(held, dtype=future.dtype)
        )
        order = wanted.masked_fill(~candidate, torch.inf).argsort(dim=-1, stable=True)
        goes = torch.arange(held.shape[-1], device=future.device) < torch.tensor(counts, device=future.device).view(
            -1, 1, 1
        )
        victim = torch.zeros_like(candidate).scatter_(-1, order, goes.expand_as(order))
        end = columns[:, :, (m + 1) * plan.block - 1, None].to(torch.int32) + 1
        ends.scatter_(-1, held.where(victim, num), end.expand_as(held).contiguous())
        held = held.masked_fill(victim, num).sort(-1).values[..., : plan.widths[m]]
    expiry.scatter_(-1, columns[..., :num], ends[..., :num])


def _scores(future: Tensor, held: Tensor, columns: Tensor, m: int) -> Tensor:
    """Future score of held ranks [B, H, N] from block m on; anything for empty places."""
    where = columns.gather(-1, held).clamp(max=future.shape[2] - 1)
    return future[..., m].gather(-1, where)


def _candidates(held: Tensor, m: int, num: int, prompts: Tensor, plan: _Plan) -> Tensor:
    """Which held ranks [B, H, N] may go after block m, bool; `num` marks an empty place."""
    seen = (m + 1) * plan.block
    counted = (held >= prompts) & (held < num)
    free = counted & (held >= plan.sinks) & (held < seen - plan.recent)
    if plan.oldest:
        return free & (counted.cumsum(-1) <= plan.target)
    return free & (held < m * plan.block)
