"""Block labels: how much each block of later queries attends to each key, in tiles of G x 128 queries by T keys, never [T, T].

Departures from ForesightKV's code (arXiv 2602.03203): block means are over real query rows, so a partial last block is not
diluted by zero rows; the block grid of each row starts at its first real token, so padding changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from learnevict.errors import LabelError, UsageError
from learnevict.oracle.reducers import GOLDEN, Reducers, pool

TILE = 128
"""Query rows per head and tile."""


class LayerInputs(TypedDict, total=False):
    """Optional inputs of `future_attention`, all keyword arguments that default to None.

    Keys:
        scaling: multiplies logits; default 1 / sqrt(d).
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
        sinks: learned attention-sink logits per query head, in the softmax's denominator only, as in GPT-OSS.
        value: values, for value="contribution".
        output_weight: output projection per query head, for value="contribution" with |W_O v| instead of |v|.
        hidden_norm: norm of each query's hidden state, for value="contribution": divides.
        queries: which queries count; default all real tokens.
        keys: over which keys the softmax runs, for all query blocks or for each; the other keys get an empty label.
    """

    scaling: float | None
    softcap: float | None
    sinks: Float[Tensor, "Hq"] | None
    value: Float[Tensor, "B H T dv"] | None
    output_weight: Float[Tensor, "Hq E dv"] | None
    hidden_norm: Float[Tensor, "B T"] | None
    queries: Bool[Tensor, "B T"] | None
    keys: Bool[Tensor, "B T"] | Bool[Tensor, "B M T"] | None


@torch.no_grad()
def future_attention(
    query: Float[Tensor, "B Hq T d"],
    key: Float[Tensor, "B H T d"],
    *,
    block: int = 128,
    valid: Bool[Tensor, "B T"] | None = None,
    reduce: Reducers = GOLDEN,
    out_dtype: torch.dtype = torch.float32,
    **inputs: Unpack[LayerInputs],
) -> Float[Tensor, "B heads T M"]:
    """Returns labels of one layer: entry [b, h, i, m] reduces the attention that the queries of block m pay to key i.

    Block m of row b holds its real tokens number m*block .. (m+1)*block-1. The default is section 3.1 of arXiv:2602.03203.

    Args:
        query, key: post-RoPE; query heads h*G .. (h+1)*G-1 belong to kv head h.
        block: queries per label block. A target over one set of queries takes block >= T and `queries`.
        valid: real tokens; padding may stand anywhere. Default all.
        reduce: per-query value, query reduction and group reduction.
        out_dtype: of the labels; float64 inputs are computed in float64, everything else in float32.
        **inputs: see `LayerInputs`.

    Returns:
        Hq heads for reducers that leave query heads apart, otherwise H. Padded keys, keys that no counted query of the
        block sees, and blocks past a row's end hold `reduce.empty`.

    Raises:
        UsageError: an input the reducers need is missing, or one is given that they would ignore.
    """
    layer = _Layer(query, key, block, valid, reduce, **inputs)
    layer.check()
    heads = query.shape[1] if reduce.per_query_head else key.shape[1]
    num_blocks = math.ceil(query.shape[2] / block)
    shape = (query.shape[0], heads, query.shape[2], num_blocks)
    labels = torch.full(shape, reduce.empty, dtype=out_dtype, device=key.device)
    size = layer.group * min(TILE, block) * (query.shape[2] + layer.drains)
    buffer = torch.empty(2, size, dtype=layer.dtype, device=key.device)
    for row in range(query.shape[0]):
        columns, blocks = layer.cut(row)
        for head, part in enumerate(labels[row].unflatten(0, (key.shape[1], -1))):
            _Head(layer, row, head, columns, buffer).write(blocks, part)
    return labels


def per_head_output_weight(weight: Float[Tensor, "E HqD"], num_query_heads: int) -> Float[Tensor, "Hq E dv"]:
    """Returns a view of an o_proj weight as one matrix per query head, for `output_weight`."""
    return weight.unflatten(1, (num_query_heads, -1)).movedim(1, 0)


@dataclass(frozen=True)
class _Block:
    """One label block of one row: unpadded positions of its real tokens, int64 on the host."""

    index: int
    rows: Tensor
    support: Tensor | None


@dataclass(frozen=True)
class _Layer:
    """All inputs of one layer, under the names of the public function."""

    query: Tensor
    key: Tensor
    block: int
    valid: Tensor | None
    reduce: Reducers
    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    value: Tensor | None = None
    output_weight: Tensor | None = None
    hidden_norm: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None

    @property
    def group(self) -> int:
        """Returns G, the query heads per kv head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def drains(self) -> int:
        """Returns 1 if attention may flow elsewhere than to keys: to sinks, or nowhere where the keys are restricted."""
        return int(self.sinks is not None or self.keys is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of all arithmetic: float32, or float64 for float64 inputs."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def check(self) -> None:
        """Raises a UsageError for inputs that would be used wrongly or ignored."""
        weighted = self.reduce.value == "contribution"
        if self.block < 1 or self.query.shape[1] % self.key.shape[1]:
            raise UsageError(
                f"block={self.block} must be at least 1, and {self.query.shape[1]} query heads a multiple of "
                f"{self.key.shape[1]} kv heads"
            )
        if weighted != (self.value is not None):
            raise UsageError(
                f"value={self.reduce.value!r} {'needs' if weighted else 'ignores'} the values; see Reducers.value"
            )
        if not weighted and (self.output_weight is not None or self.hidden_norm is not None):
            raise UsageError(
                "output_weight and hidden_norm weigh contributions only; use Reducers(value='contribution')"
            )
        if self.reduce.needs_queries and self.queries is None:
            raise UsageError(
                "this target counts some queries only (a response, an answer, a probe): give queries=[B, T]"
            )
        if self.reduce.needs_keys and self.keys is None:
            raise UsageError("this target's softmax runs over some keys only: give keys=[B, T] or [B, M, T]")

    def cut(self, row: int) -> tuple[Tensor, list[_Block]]:
        """Returns columns of the row's real tokens, int64 [n] on the device, and its label blocks."""
        length = self.query.shape[2]
        columns = torch.arange(length) if self.valid is None else self.valid[row].cpu().nonzero().flatten()
        counted = torch.ones(length, dtype=torch.bool) if self.queries is None else self.queries[row].cpu()
        blocks: list[_Block] = []
        for index, ranks in enumerate(torch.arange(len(columns)).split(self.block)):
            support = None
            if self.keys is not None:
                mask = self.keys[row] if self.keys.ndim == 2 else self.keys[row, index]
                support = mask.cpu()[columns].nonzero().flatten()
            blocks.append(_Block(index, ranks[counted[columns[ranks]]], support))
        return columns.to(self.key.device), blocks


class _Head:
    """One kv head of one row: its real keys, and tiles of its attention."""

    def __init__(self, layer: _Layer, row: int, head: int, columns: Tensor, buffer: Tensor) -> None:
        self.layer, self.row, self.columns, self.buffer = layer, row, columns, buffer
        self.heads = slice(head * layer.group, (head + 1) * layer.group)
        self.keys = layer.key[row, head].index_select(0, columns).to(layer.dtype)
        self.scaling = layer.query.shape[-1] ** -0.5 if layer.scaling is None else layer.scaling
        self.sinks = None if layer.sinks is None else layer.sinks[self.heads].to(layer.dtype).unsqueeze(1)
        self.norms = None if layer.value is None else self._value_norms(layer.value[row, head].index_select(0, columns))

    def _value_norms(self, values: Tensor) -> Tensor:
        """Returns |v| [1, n] or |W_O v| [G, n], in chunks of keys."""
        if self.layer.output_weight is None:
            return values.to(self.layer.dtype).norm(dim=-1).unsqueeze(0)
        weight = self.layer.output_weight[self.heads].to(self.layer.dtype).mT
        parts = [(part.to(self.layer.dtype) @ weight).norm(dim=-1) for part in values.split(1024)]
        return torch.cat(parts, -1)

    def write(self, blocks: list[_Block], out: Tensor) -> None:
        """Writes the labels of all blocks into out [1 or G, T, M]."""
        reduce = self.layer.reduce
        for block in blocks:
            if len(block.rows) == 0:
                continue
            ranks = torch.arange(int(block.rows[-1]) + 1) if block.support is None else block.support
            device_ranks = ranks.to(self.columns.device)
            keys = self.keys[: len(ranks)] if block.support is None else self.keys.index_select(0, device_ranks)
            labels = self.pooled(block, ranks, keys)
            if self.norms is not None:
                labels *= self.norms[:, device_ranks]
            if not reduce.per_query_head and reduce.group != "none":
                labels = pool(labels, reduce.group, 0).unsqueeze(0)
            if reduce.log:
                labels = labels.log()
            out[:, :, block.index].index_copy_(1, self.columns[device_ranks], labels.to(out.dtype))

    def pooled(self, block: _Block, ranks: Tensor, keys: Tensor) -> Tensor:
        """Reduces one block over its queries: [G, n] for keys of the given ranks (host, ascending)."""
        reduce = self.layer.reduce
        empty = -torch.inf if reduce.value == "logit" else 0.0
        pooled = torch.full((self.layer.group, len(ranks)), empty, dtype=self.layer.dtype, device=keys.device)
        for rows in block.rows.split(TILE):
            seen = int(torch.searchsorted(ranks, rows[-1], right=True))
            tile = self.tile(rows, ranks[:seen], keys[:seen])
            if reduce.query == "max":
                torch.maximum(pooled[:, :seen], tile, out=pooled[:, :seen])
            else:
                pooled[:, :seen] += tile
        if reduce.query == "mean":
            pooled /= max(len(block.rows), 1)
        return pooled

    def tile(self, rows: Tensor, ranks: Tensor, keys: Tensor) -> Tensor:
        """Returns values of some queries over the keys they see, reduced over the queries (a mean as a sum): [G, n]."""
        where = self.columns[rows.to(self.columns.device)]
        logits = self._logits(where, keys)
        some = int(torch.searchsorted(ranks, rows[0], right=True))
        hidden = ranks[some:] > rows.unsqueeze(1)
        logits[..., some : len(ranks)].masked_fill_(hidden.to(logits.device), -torch.inf)
        if self.layer.reduce.value == "logit":
            return logits[..., : len(ranks)].amax(1)
        mass = torch.softmax(logits, -1, out=self.buffer[1, : logits.numel()].view_as(logits))[..., : len(ranks)]
        weight = torch.ones(len(rows), dtype=mass.dtype, device=mass.device)
        if self.layer.hidden_norm is not None:
            weight /= self.layer.hidden_norm[self.row, where]
        if self.layer.reduce.query == "max":
            return mass.mul_(weight.unsqueeze(-1)).amax(1)
        return torch.bmm(weight.expand(len(mass), 1, -1), mass).squeeze(1)

    def _logits(self, where: Tensor, keys: Tensor) -> Tensor:
        """Returns scaled, softcapped products [G, R, n], or [G, R, n + 1] with a last column that stands for no key.

        It is the attention sink, or the lowest finite number, which gets all attention of a query that may see no key and none
        of any other.
        """
        query = self.layer.query[self.row, self.heads].index_select(1, where).to(self.layer.dtype) * self.scaling
        group, num, width = len(query), len(where), len(keys) + self.layer.drains
        logits = self.buffer[0, : group * num * width].view(group, num, width)
        torch.mm(query.flatten(0, 1), keys.T, out=logits.flatten(0, 1)[:, : len(keys)])
        if self.layer.softcap is not None:
            logits.div_(self.layer.softcap).tanh_().mul_(self.layer.softcap)
        if self.layer.drains:
            logits[..., -1] = torch.finfo(logits.dtype).min if self.sinks is None else self.sinks
        return logits


def check_block(like: Float[Tensor, "B H T M"], real: Bool[Tensor, "T"], block: int) -> None:
    """Raises a LabelError if labels of the right shape are of another block: attention is causal, which shows what they were
    made for. `real` are the real tokens of the first row."""
    num_blocks = like.shape[-1]
    part = like[0][:, real.to(like.device)].amax(0)
    seen = part > (-torch.inf if bool((like == -torch.inf).any()) else 0.0)
    if _made_for(seen, block) or seen.numel() < 64:  # a few labels can look like anything
        return
    others = [other for other in range(1, 2 * block) if other != block and -(-like.shape[2] // other) == num_blocks]
    other = next((other for other in others if _made_for(seen, other)), None)
    if other is not None:
        raise LabelError(f"labels of another block: of {other} tokens, not {block}; compute labels with block={block}")


def _made_for(seen: Tensor, block: int) -> bool:
    """Returns whether no key is seen before its own block, and keys are seen in it: bool [T, M] of real tokens."""
    own = torch.arange(seen.shape[0], device=seen.device) // block
    if not len(own):
        return True
    early = torch.arange(seen.shape[1], device=seen.device) < own.unsqueeze(-1)
    ends = torch.arange(min(block, seen.shape[0]), seen.shape[0] + 1, block, device=seen.device) - 1
    return not bool((early & seen).any()) and bool(seen[ends, own[ends]].any())
