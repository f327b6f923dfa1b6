"""A store of two tiers a second time, in float64 and plain loops: see tests/brute_force.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.brute_force import INF, NEVER, Moment, Rule, ranked


def rounded(vector: list[float], bits: int) -> list[float]:
    """One group of channels."""
    low, high = min(vector), max(vector)
    step = (high - low) / (2**bits - 1)
    return [low + step * round((x - low) / step) if step else x for x in vector]


class Tiers:
    """What one row holds in full precision, and how a key is put into few bits."""

    def __init__(self, at: Moment, bits: int, full: int, low: int) -> None:
        self.at, self.bits, self.room, self.low = at, bits, full, low
        self.full: list[set[int]] = [set() for _ in at.held]
        self.units: list[tuple[Any, Any]] | None = None

    def crowded(self) -> bool:
        return len(self.full[0]) > self.room or len(self.at.held[0]) > self.room + self.low

    def measure(self) -> None:
        units = []
        for head, full in enumerate(self.full):
            keys = torch.stack([self.at.k[head, j] for j in sorted(full)])
            reach = (keys.amax(0) - keys.amin(0)) / 2
            units.append(((keys.amax(0) + keys.amin(0)) / 2, reach.clamp_min(0.1 * float(reach.mean()))))
        self.units = units

    def demote(self, head: int, j: int) -> None:
        at, (middle, reach) = self.at, (self.units or [])[head]
        units = rounded(((at.k[head, j] - middle) / reach).tolist(), self.bits)
        at.k[head, j] = torch.tensor(units, dtype=torch.float64) * reach + middle
        at.v[head, j] = torch.tensor(rounded(at.v[head, j].tolist(), self.bits), dtype=torch.float64)
        for member in range(head * at.group, (head + 1) * at.group):
            for time in range(at.q.shape[1]):
                at.products[member][time][j] = at.scaling * float(at.q[member, time] @ at.k[head, j])


def history(
    row: Any, rule: Rule, score: Callable[[Moment, int], dict[int, float]], bits: int, full: int, low: int
) -> tuple[Any, Any]:
    """expiry int32 [H, T] and the outputs of attention [Hq, T, d] of one unpadded stream; `full` and `low`: slots of a head."""
    q, k, v = (part[0].double().clone() for part in (row.query, row.key, row.value))
    heads, length = k.shape[:2]
    held: list[list[int]] = [[] for _ in range(heads)]
    period = max(rule.slack, 1)
    at = Moment(
        q, k, v, row.attention.scaling, (), row.tokens[0].tolist(), held, [{} for _ in range(heads)], softcap=INF,
        period=period, target=full + low,
    )  # fmt: skip
    tiers = Tiers(at, bits, full, low)
    expiry, out = torch.full((heads, length), NEVER, dtype=torch.int32), torch.zeros_like(q)
    for time in range(length):
        at.now = time
        for head in range(heads):
            held[head].append(time)
            tiers.full[head].add(time)
            at.mass[head][time] = 0.0
            for member in range(head * at.group, (head + 1) * at.group):
                for j, weight in at.attention(member, time, held[head]).items():
                    at.mass[head][j] += weight / at.group
                    out[member, time] += weight * at.v[head, j]
        if (time + 1) % period or not tiers.crowded():
            continue
        block = time // period * period
        safe = {j for j in range(time + 1) if j < rule.sinks or j > time - rule.recent or j >= block}
        orders = [ranked(held[head], safe, score(at, head)) for head in range(heads)]
        for head, order in enumerate(orders):
            for j in order[full + low :]:
                expiry[head, j] = time + 1
            held[head][:] = sorted(order[: full + low])
            tiers.full[head] &= set(held[head])
        if tiers.units is None:
            tiers.measure()
        for head, order in enumerate(orders):
            losers = [j for j in order if j in tiers.full[head]][full:]
            for j in losers:
                tiers.demote(head, j)
            tiers.full[head] -= set(losers)
    return expiry, out
