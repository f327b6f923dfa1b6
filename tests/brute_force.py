"""Eviction written a second time, from the formulas: one row, plain loops, float64, nothing of learnevict's methods.

A row is a stream without padding, so positions are unpadded. `history` evicts by the rules of budget and slack and returns
one expiry per (kv head, token); what a method adds is a function of `Moment` that gives every held token of a head a
number. One that has `watch(moment)` is shown every token as it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

NEVER = 2**31 - 1
INF = math.inf


@dataclass
class Moment:
    """One row at one event. q [Hq, T, d], k and v [H, T, d], float64; held: positions per kv head, oldest first."""

    q: Any
    k: Any
    v: Any
    scaling: float
    frequencies: tuple[float, ...]
    tokens: list[int]
    held: list[list[int]]
    mass: list[dict[int, float]]
    now: int = -1
    layer: int = 1
    softcap: float = INF
    sinks: list[float] | None = None
    period: int = 1
    prompt: int = 0
    target: int = 0
    products: list[list[list[float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Logits of every query with every key, [Hq][T][T]: looked up here, never masked or blocked."""
        keys = [self.k[h // self.group] for h in range(len(self.q))]
        for q, k in zip(self.q, keys, strict=True):
            logits = (self.scaling * (q @ k.T)).tolist()
            if self.softcap < INF:
                logits = [[self.softcap * math.tanh(x / self.softcap) for x in row] for row in logits]
            self.products.append(logits)

    @property
    def group(self) -> int:
        return len(self.q) // len(self.k)

    def attention(self, query_head: int, time: int, among: list[int]) -> dict[int, float]:
        """Softmax of one query over the tokens of `among` it can see; its head's sink is one more of them, then dropped."""
        seen = [j for j in among if j <= time]
        row = self.products[query_head][time]
        sink = [] if self.sinks is None else [self.sinks[query_head]]
        return dict(zip(seen, softmax([row[j] for j in seen] + sink), strict=False))

    def last(self, window: int) -> list[int]:
        return list(range(max(0, self.now - window + 1), self.now + 1))


@dataclass
class Rule:
    """When and how many: the terms of a policy, as plain numbers."""

    budget: int
    sinks: int
    recent: int
    slack: int
    at_prompt_end: bool = False
    counts: Callable[[Moment, list[dict[int, float]], list[set[int]], int], list[int]] | None = None


def softmax(logits: list[float]) -> list[float]:
    top = max(logits, default=0.0)
    weights = [math.exp(x - top) for x in logits]
    total = sum(weights)
    return [w / total for w in weights]


def history(row: Any, prompt: int, rule: Rule, score: Callable[[Moment, int], dict[int, float]]) -> Any:
    """expiry int32 [H, T] of one unpadded stream."""
    q, k, v = (part[0].double() for part in (row.query, row.key, row.value))
    heads, length = k.shape[:2]
    attention = row.attention
    frequencies = tuple(attention.frequencies.double().tolist())
    sinks = None if attention.sinks is None else attention.sinks.tolist()
    cap = INF if attention.softcap is None else attention.softcap
    held: list[list[int]] = [[] for _ in range(heads)]
    mass: list[dict[int, float]] = [{} for _ in range(heads)]
    tokens = row.tokens[0].tolist()
    period, target = max(rule.slack, 1), rule.budget - (rule.slack == 0)
    at = Moment(
        q, k, v, attention.scaling, frequencies, tokens, held, mass, softcap=cap, sinks=sinks, period=period, prompt=prompt,
        target=target,
    )  # fmt: skip
    watch = getattr(score, "watch", lambda at: None)
    expiry = torch.full((heads, length), NEVER, dtype=torch.int32)
    for time in range(length):
        at.now = time
        for head in range(heads):
            held[head].append(time)
            mass[head][time] = 0.0
            for query_head in range(head * at.group, (head + 1) * at.group):
                for j, weight in at.attention(query_head, time, held[head]).items():
                    mass[head][j] += weight / at.group
        watch(at)
        grid = (time + 1) % period == 0
        due = grid if time >= prompt or not rule.at_prompt_end else time == prompt - 1
        if not due or sum(map(len, held)) <= heads * target:
            continue
        block = time // period * period
        safe = [
            {j for j in held[head] if j < rule.sinks or j > time - rule.recent or j >= block} for head in range(heads)
        ]
        scores = [score(at, head) for head in range(heads)]
        counts = [target] * heads if rule.counts is None else rule.counts(at, scores, safe, target)
        for head in range(heads):
            best = ranked(held[head], safe[head], scores[head])
            for j in best[counts[head] :]:
                expiry[head, j] = time + 1
            held[head][:] = sorted(best[: counts[head]])
    return expiry


def ranked(held: list[int], safe: set[int], scores: dict[int, float]) -> list[int]:
    """Guarded tokens first, then by score; of equal scores the newer comes first."""
    return sorted(held, key=lambda j: (j in safe, scores[j], j), reverse=True)


# --- scores ---


def recency(at: Moment, head: int) -> dict[int, float]:
    return {j: float(j) for j in at.held[head]}


def key_norm(at: Moment, head: int) -> dict[int, float]:
    return {j: -math.sqrt(sum(float(x) ** 2 for x in at.k[head, j])) for j in at.held[head]}


def hashed(seed: int) -> Callable[[Moment, int], dict[int, float]]:
    """SplitMix64 in Python's integers."""
    full = 2**64

    def mix(word: int) -> int:
        word = (word + 0x9E3779B97F4A7C15) % full
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % full
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % full
        return word ^ (word >> 31)

    def score(at: Moment, head: int) -> dict[int, float]:
        start = mix(mix(seed ^ 0x5EED) + (at.layer << 20) + head)
        return {j: float(mix((start + j) % full) >> 40) for j in at.held[head]}

    return score


def mass(at: Moment, head: int) -> dict[int, float]:
    return {j: at.mass[head][j] for j in at.held[head]}


def mean_mass(at: Moment, head: int) -> dict[int, float]:
    return {j: at.mass[head][j] / (at.now - j + 1) for j in at.held[head]}


def last_attention(at: Moment, head: int) -> dict[int, float]:
    rows = [at.attention(query_head, at.now, at.held[query_head // at.group]) for query_head in range(len(at.q))]
    return {j: sum(row[j] for row in rows) / len(rows) for j in at.held[head]}


def pooled(values: list[float], kind: str, kernel: int) -> list[float]:
    half, out = kernel // 2, []
    for i in range(len(values)):
        around = [values[j] for j in range(i - half, i + half + 1) if 0 <= j < len(values)]
        out.append(max(around) if kind == "max" else sum(around) / kernel)
    return out


def snap(variant: str, window: int) -> Callable[[Moment, int], dict[int, float]]:
    """SnapKV as three repositories have it, and Ada-KV's ("ada")."""

    def score(at: Moment, head: int) -> dict[int, float]:
        times = at.last(window)
        candidates = [j for j in at.held[head] if j < times[0]]
        mine = range(head * at.group, (head + 1) * at.group)
        if variant == "rkv":
            votes = group_logit_votes(at, head, times, candidates)
            values = pooled(votes, "max", 7)
        else:
            per_head = []
            for query_head in mine:
                rows = [at.attention(query_head, t, at.held[head]) for t in times]
                per_head.append([sum(row[j] for row in rows) for j in candidates])
            mean = [sum(column) / at.group for column in zip(*per_head, strict=True)]
            if variant == "paper":
                pools = [pooled(one, "max", 7) for one in per_head]
                values = [sum(column) / at.group for column in zip(*pools, strict=True)]
            elif variant == "kvpress":
                values = pooled([x / len(times) for x in mean], "avg", 5)
            else:
                values = pooled([x / len(times) for x in mean], "max", 7)
        return {**dict.fromkeys(at.held[head], 1e30), **dict(zip(candidates, values, strict=True))}

    return score


def group_logit_votes(at: Moment, head: int, times: list[int], candidates: list[int]) -> list[float]:
    """R-KV: largest logit of the group, softmax over candidates and nothing else, mean over the window."""
    mine = range(head * at.group, (head + 1) * at.group)
    total = [0.0] * len(candidates)
    for time in times:
        top = [max(at.products[h][time][j] for h in mine) for j in candidates]
        total = [old + new for old, new in zip(total, softmax(top), strict=True)]
    return [x / len(times) for x in total]


def redundancy(at: Moment, head: int) -> dict[int, float]:
    """The dense N x N form of R-KV's R."""
    held = at.held[head]
    unit = torch.stack([at.k[head, j] / (at.k[head, j].norm() + 1e-8) for j in held])
    alike = (unit @ unit.T).tolist()
    for i, row in enumerate(alike):
        row[i] = 0.0
        near = [j for j, x in enumerate(row) if x > 0.5]
        if near:
            row[near[-1]] = 0.0
    means = [sum(row[j] for row in alike) / len(held) for j in range(len(held))]
    return dict(zip(held, softmax(means), strict=True))


def important_and_new(mix: float, window: int) -> Callable[[Moment, int], dict[int, float]]:
    attended = snap("rkv", window)

    def score(at: Moment, head: int) -> dict[int, float]:
        votes, same = attended(at, head), redundancy(at, head)
        return {j: mix * x - (1 - mix) * same[j] if x < 1e29 else x for j, x in votes.items()}

    return score


def unlikeness(at: Moment, head: int) -> dict[int, float]:
    keys = {j: at.k[head, j] for j in at.held[head]}
    anchor = sum(k / k.norm() for k in keys.values()) / len(keys)
    return {j: -float(k @ anchor / (k.norm() * anchor.norm())) for j, k in keys.items()}


@cache
def rotation(frequencies: tuple[float, ...], position: int) -> Any:
    """R_p as a dense matrix: pairs (f, f + d / 2)."""
    half = len(frequencies)
    out = torch.eye(2 * half, dtype=torch.float64)
    for f, w in enumerate(frequencies):
        c, s = math.cos(w * position), math.sin(w * position)
        out[f, f], out[f, f + half], out[f + half, f], out[f + half, f + half] = c, -s, s, c
    return out


def query_statistics(at: Moment, query_head: int, window: int, future: int) -> tuple[Any, Any]:
    """Mean and covariance of future queries: statistics without RoPE, rotated by the average of the next positions."""
    times = [t for t in at.last(window) if t >= 4]
    if not times:
        width = at.q.shape[-1]
        return torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    plain = torch.stack([rotation(at.frequencies, t).T @ at.q[query_head, t] for t in times])
    mean = plain.mean(0)
    covariance = (plain - mean).T @ (plain - mean) / len(times)
    average = sum(rotation(at.frequencies, at.now + t) for t in range(1, future + 1)) / future
    return average @ mean, average @ covariance @ average.T


def expected_attention(window: int, future: int) -> Callable[[Moment, int], dict[int, float]]:
    def score(at: Moment, head: int) -> dict[int, float]:
        scored = [j for j in at.held[head] if j >= 4]
        share = dict.fromkeys(scored, 0.0)
        for query_head in range(head * at.group, (head + 1) * at.group):
            mean, covariance = query_statistics(at, query_head, window, future)
            keys = [at.k[head, j] for j in scored]
            logits = [at.scaling * float(mean @ k) + at.scaling**2 * float(k @ covariance @ k) / 2 for k in keys]
            for j, x in zip(scored, softmax(logits), strict=True):
                share[j] += x / at.group
        sized = {j: x * float(at.v[head, j].norm()) for j, x in share.items()}
        return {**dict.fromkeys(at.held[head], 1e30), **sized}

    return score


def worth(table: Any, bonus: float) -> Callable[[Moment, int], dict[int, float]]:
    def score(at: Moment, head: int) -> dict[int, float]:
        return {j: float(table[at.layer, head, at.tokens[j]]) - bonus * math.log(1 + at.now - j) for j in at.held[head]}

    return score


def clause_worth(table: Any, places: int, separator: int) -> Callable[[Moment, int], dict[int, float]]:
    """Walk back from each token to where its clause begins."""

    def score(at: Moment, head: int) -> dict[int, float]:
        found = {}
        for j in at.held[head]:
            start = j
            while start > 0 and int(at.tokens[start - 1]) != separator:
                start -= 1
            found[j] = float(table[at.layer, head, int(at.tokens[start]) * places + min(j - start, places - 1)])
        return found

    return score


# --- budgets ---


def ada_counts(alpha: float) -> Callable[[Moment, list[dict[int, float]], list[set[int]], int], list[int]]:
    """Ada-KV's heads: pool, count, mix with the equal share in exact fractions, largest remainder."""

    def counts(at: Moment, scores: list[dict[int, float]], safe: list[set[int]], target: int) -> list[int]:
        rooms = [[x for j, x in scores[h].items() if j not in safe[h]] for h in range(len(scores))]
        return split(rooms, [len(s) for s in safe], target, alpha)

    return counts


def split(rooms: list[list[float]], kept: list[int], target: int, alpha: float) -> list[int]:
    """Slots per head, given the scores of candidates and the number of protected slots of every head."""
    heads = len(rooms)
    free = min(max(heads * target - sum(kept), 0), sum(map(len, rooms)))
    pool = sorted((-x, h) for h in range(heads) for x in rooms[h])[:free]
    found = [sum(h == head for _, h in pool) for head in range(heads)]
    mille = round(1000 * alpha)
    exact = [(1000 - mille) * heads * f + mille * free for f in found]
    share = [x // (1000 * heads) for x in exact]
    order = sorted(range(heads), key=lambda h: (-(exact[h] % (1000 * heads)), h))
    for h in order[: free - sum(share)]:
        share[h] += 1
    share = [min(s, len(room)) for s, room in zip(share, rooms, strict=True)]
    rest = [(-x, h) for h in range(heads) for x in sorted(rooms[h], reverse=True)[share[h] :]]
    for _, h in sorted(rest)[: free - sum(share)]:
        share[h] += 1
    return [k + s for k, s in zip(kept, share, strict=True)]
