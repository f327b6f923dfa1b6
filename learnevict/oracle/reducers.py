"""How attention becomes one number per token. Every paper reduces in another order, so each step is a field:

    per-query value -> query reduce (within a block) -> group reduce -> horizon reduce (over blocks)

`future_attention` does all but the horizon, so that one set of block labels serves every event of a trace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from learnevict.errors import LabelError, UsageError

Value = Literal["prob", "logit", "contribution"]
Pool = Literal["mean", "sum", "max"]
GroupPool = Literal["mean", "sum", "max", "none"]
Horizon = Literal["max", "sum", "discounted", "softmax", "past"]


@dataclass(frozen=True)
class Reducers:
    """The reductions of one paper's target; the default is ForesightKV's golden label.

    Attributes:
        value: per query and key: "prob" attention, "logit" the number before the softmax (scaled and softcapped),
            "contribution" attention x value norm, divided by the query's hidden norm if that is given.
        query: over the counted queries of a block. Queries that cannot see a key count as 0 in a mean of "prob".
        group: over the query heads of one kv head; "none" leaves [B, Hq, T, M].
        horizon: over blocks, done by `target` or `golden`.
        group_last: the group is reduced after the horizon; `future_attention` then leaves [B, Hq, T, M].
        log: logarithm of the label, last of all within a block (it commutes with every maximum).
        needs_queries, needs_keys: only some queries count, or the softmax runs over some keys only: a mask must be given.

    Raises:
        UsageError: a combination without meaning (logits that are averaged, the logarithm of a logit).
    """

    value: Value = "prob"
    query: Pool = "mean"
    group: GroupPool = "mean"
    horizon: Horizon = "max"
    group_last: bool = False
    log: bool = False
    needs_queries: bool = False
    needs_keys: bool = False

    def __post_init__(self) -> None:
        if self.value == "logit" and (self.query != "max" or self.log):
            raise UsageError(
                f"logits are reduced by their maximum and without a logarithm, not by query={self.query!r} and "
                f"log={self.log}: a block's queries see different keys; use value='prob'"
            )
        if self.group_last and self.group == "none":
            raise UsageError("group_last=True asks for a group reduction after the horizon, but group='none' has none")

    @property
    def per_query_head(self) -> bool:
        """Returns True if block labels are left per query head, [B, Hq, T, M]."""
        return self.group == "none" or self.group_last

    @property
    def empty(self) -> float:
        """Returns the label of a key that no counted query sees: 0, or minus infinity for logits and logarithms."""
        return -torch.inf if self.value == "logit" or self.log else 0.0


GOLDEN = Reducers()
"""ForesightKV (arXiv 2602.03203): mean over a block's queries, mean over the group, max over future blocks."""

KVP = Reducers(query="sum", group="max", group_last=True, horizon="sum")
"""KVP (arXiv 2602.10238): attention summed over the future t > cut, then max over the group."""

KVZIP = Reducers(query="max", group="max", needs_queries=True, needs_keys=True)
"""KVzip (arXiv 2505.23416): max over the repeat probe and the group; softmax over {sink, chunk, repeat} only."""

KVZIP_PLUS = replace(KVZIP, value="contribution")
"""KVzip+ (KVzap, arXiv 2601.07891): KVzip's probability x |W_O v| / |h|."""

KVZAP = replace(KVZIP_PLUS, log=True)
"""KVzap's regression target (arXiv 2601.07891): the logarithm of KVzip+."""

JUDGE_Q = Reducers(group="none", needs_queries=True)
"""Judge Q (arXiv 2509.10798): mean attention of the model's own response, per query head."""

LOOKAHEAD_KV = replace(JUDGE_Q, needs_keys=True)
"""LookaheadKV (arXiv 2603.10899): the same over at most 512 response tokens, renormalised over the prompt (`keys`)."""

LOCRET = Reducers(value="logit", query="max", group="max", needs_queries=True)
"""Locret (arXiv 2410.01805): largest logit over the answer's queries and the group."""

INDEX_MEM = Reducers(query="max", group="none", horizon="softmax")
"""IndexMem (arXiv 2605.25475): softmax over keys of the largest attention; indexer heads pool query heads later."""

H2O = Reducers(query="sum", group="mean", horizon="past")
"""H2O (arXiv 2306.14048): attention received so far; use replace(H2O, group="none") for one sum per query head."""

PRESETS: dict[str, Reducers] = {
    "golden": GOLDEN, "kvp": KVP, "kvzip": KVZIP, "kvzip+": KVZIP_PLUS, "kvzap": KVZAP, "judgeq": JUDGE_Q,
    "lookaheadkv": LOOKAHEAD_KV, "locret": LOCRET, "indexmem": INDEX_MEM, "h2o": H2O,
}  # fmt: skip


def pool(values: Tensor, kind: Pool, dim: int) -> Tensor:
    """Returns mean, sum or maximum over one dimension."""
    if kind == "mean":
        return values.mean(dim)
    return values.sum(dim) if kind == "sum" else values.amax(dim)


def pool_groups(labels: Float[Tensor, "*B Hq T M"], num_heads: int, kind: Pool) -> Float[Tensor, "*B H T M"]:
    """Reduces labels per query head, of which h*G .. (h+1)*G-1 share kv head h, to labels per kv head.

    Raises:
        LabelError: Hq is not a multiple of num_heads.
    """
    if labels.shape[-3] % num_heads:
        raise LabelError(f"{labels.shape[-3]} query heads cannot be shared out to {num_heads} kv heads")
    return pool(labels.unflatten(-3, (num_heads, -1)), kind, -3)


def horizon(
    labels: Float[Tensor, "*B T M"],
    kind: Horizon = "max",
    *,
    discount: float | None = None,
    window: int | None = None,
    valid: Bool[Tensor, "b T"] | None = None,
) -> Float[Tensor, "*B T M"]:
    """Reduces block labels over time: entry m says what blocks m, m+1, ... want (or, for "past", blocks 0 .. m gave).

    Args:
        labels: block labels; float64 stays, everything else is reduced in float32.
        kind: "max" (golden), "sum" (KVP), "discounted" (sum with weight discount**j, j blocks ahead),
            "softmax" (over keys, of "max": IndexMem), "past" (cumulative sum, block m included: H2O).
        discount: weight per block in (0, 1], for "discounted" only.
        window: look at `window` blocks only, for "max" and "sum" (default: to the end).
        valid: real tokens [B, T], for "softmax" only; labels must then be [B, H, T, M].

    Raises:
        UsageError: an argument that `kind` would ignore, or a missing or impossible one.
    """
    _check_horizon(kind, discount, window, valid)
    labels = labels.double() if labels.dtype == torch.float64 else labels.float()
    if kind == "past":
        return labels.cumsum(-1)
    if window is not None:
        neutral = -torch.inf if kind == "max" else 0.0
        ahead = pad(labels, (0, window - 1), value=neutral).unfold(-1, window, 1)
        return ahead.amax(-1) if kind == "max" else ahead.sum(-1)
    future = labels.clone()
    for m in range(labels.shape[-1] - 2, -1, -1):
        if kind in ("max", "softmax"):
            torch.maximum(future[..., m], future[..., m + 1], out=future[..., m])
        else:
            future[..., m].add_(future[..., m + 1], alpha=discount or 1.0)
    if kind == "softmax" and valid is not None:
        hidden = ~valid[:, None, :, None]
        return future.masked_fill(hidden, -torch.inf).softmax(-2).masked_fill(hidden, 0.0)
    return future.softmax(-2) if kind == "softmax" else future


def target(
    labels: Float[Tensor, "B heads T M"],
    reduce: Reducers,
    num_heads: int,
    *,
    window: int | None = None,
    valid: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B out T M"]:
    """Returns the target of `future_attention(..., reduce=reduce)` labels: the horizon, then the group if that comes last.

    Entry [..., m] is the target of a cut before block m; `window` and `valid` are those of `horizon`.
    """
    future = horizon(labels, reduce.horizon, window=window, valid=valid if reduce.horizon == "softmax" else None)
    if reduce.group_last and reduce.group != "none":
        return pool_groups(future, num_heads, reduce.group)
    return future


def _check_horizon(kind: Horizon, discount: float | None, window: int | None, valid: Tensor | None) -> None:
    if kind not in ("max", "sum", "discounted", "softmax", "past"):
        raise UsageError(f"horizon {kind!r} is unknown; choose max, sum, discounted, softmax or past")
    if (discount is not None) != (kind == "discounted") or (discount is not None and not 0 < discount <= 1):
        raise UsageError(
            f"horizon={kind!r} with discount={discount}: 'discounted' takes one in (0, 1], the others take none"
        )
    if window is not None and (window < 1 or kind not in ("max", "sum")):
        raise UsageError(
            f"horizon={kind!r} with window={window}: 'max' and 'sum' take at least 1 block, the others none"
        )
    if valid is not None and kind != "softmax":
        raise UsageError(f"horizon={kind!r} ignores `valid`: padded keys are already 0 in block labels")
