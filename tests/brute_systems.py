"""Scores of the systems that remember, draw or ask what the output loses, a second time: see tests/brute_force.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.brute_force import Moment, pooled, redundancy, softmax

Score = Callable[[Moment, int], dict[int, float]]
KEPT = 1e30
FULL = 2**64


def mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) % FULL
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % FULL
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % FULL
    return word ^ (word >> 31)


def random_key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = mix((key + part) % FULL)
    return key


def uniform(key: int) -> float:
    return (key >> 40) / 2**24


def gumbel(key: int) -> float:
    return -math.log(max(-math.log1p(-uniform(key)), 2**-25))


def normal(key: int) -> float:
    return math.sqrt(-2 * math.log(max(uniform(key), 2**-25))) * math.cos(2 * math.pi * uniform(mix(key)))


def group(at: Moment, head: int) -> range:
    return range(head * at.group, (head + 1) * at.group)


def before(at: Moment, head: int, window: int) -> list[int]:
    return [j for j in at.held[head] if j < at.last(window)[0]]


def and_window(at: Moment, head: int, scores: dict[int, float]) -> dict[int, float]:
    return {**dict.fromkeys(at.held[head], KEPT), **scores}


def redrawn(seed: int) -> Score:
    return lambda at, head: {j: uniform(random_key(j, head, at.now + 1, at.layer, seed)) for j in at.held[head]}


class Remembering:
    """A score with a number per (head, token) that is forgotten with the row."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], float] = {}

    def watch(self, at: Moment) -> None:
        if at.now == 0:
            self.kept.clear()
        for head in range(len(at.held)):
            self.see(at, head)

    def see(self, at: Moment, head: int) -> None:
        raise NotImplementedError

    def __call__(self, at: Moment, head: int) -> dict[int, float]:
        return {j: self.kept[head, j] for j in at.held[head]}


class NoisyMass(Remembering):
    """Keyformer's f."""

    def __init__(self, noise: float, rise: float, seed: int) -> None:
        super().__init__()
        self.noise, self.rise, self.seed = noise, rise, seed

    def see(self, at: Moment, head: int) -> None:
        held = at.held[head]
        tau = 1 + self.rise * max(at.now - at.prompt + 1, 0)
        for member in group(at, head):
            keys = [random_key(j, at.now, member, at.layer, self.seed) for j in held]
            logits = [
                (at.products[member][at.now][j] + self.noise * gumbel(key)) / tau
                for j, key in zip(held, keys, strict=True)
            ]
            for j, weight in zip(held, softmax(logits), strict=True):
                self.kept[head, j] = self.kept.get((head, j), 0.0) + weight / at.group


class Recurrence(Remembering):
    """LazyEviction's TS and MRI."""

    def __init__(self, variant: str, alpha: float, relative: bool = False) -> None:
        super().__init__()
        self.variant, self.alpha, self.relative = variant, alpha, relative
        self.active: dict[tuple[int, int], int] = {}
        self.longest: dict[tuple[int, int], int] = {}

    def see(self, at: Moment, head: int) -> None:
        now, held = at.now, at.held[head]
        self.active[head, now], self.longest[head, now] = now - 1, 0
        rows = [at.attention(member, now, held) for member in group(at, head)]
        for j in held:
            if max(row[j] for row in rows) >= self.alpha / (len(held) if self.relative else 1):
                pause = now - self.active[head, j]
                self.longest[head, j] = max(self.longest[head, j], pause)
                self.active[head, j] = now

    def __call__(self, at: Moment, head: int) -> dict[int, float]:
        return {j: self.worth(at.now - self.active[head, j], self.longest[head, j]) for j in at.held[head]}

    def worth(self, since: int, longest: int) -> float:
        def sigmoid(x: float) -> float:
            return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

        late = 2 * sigmoid(-since / (longest + 1e-5) - (self.variant == "code"))
        often = 1 - (max(longest, since) if self.variant == "gap" else longest)
        return late + (2 * sigmoid(often) if longest else 0.0)


def worst_case(window: int) -> Score:
    """DefensiveKV, token by token."""

    def score(at: Moment, head: int) -> dict[int, float]:
        candidates = before(at, head, window)
        most = dict.fromkeys(candidates, 0.0)
        for time in at.last(window):
            for member in group(at, head):
                row = at.attention(member, time, at.held[head])
                plain = [row[j] for j in candidates]
                smooth = pooled(plain, "avg", 5)
                scale = sum(plain) / max(sum(smooth), 1e-300)
                for j, x in zip(candidates, smooth, strict=True):
                    most[j] = max(most[j], x * scale)
        mean = sum(most.values()) / max(len(most), 1)
        sized = {j: max(x, mean) * float(at.v[head, j].abs().sum()) for j, x in most.items()}
        return and_window(at, head, sized)

    return score


def large_or_drawn(window: int, share: float, seed: int) -> Score:
    """VaSE-AttnV; the sample as log-weights with Gumbel noise."""

    def score(at: Moment, head: int) -> dict[int, float]:
        candidates = before(at, head, window)
        times, total = at.last(window), [0.0] * len(candidates)
        for time in times:
            for member in group(at, head):
                row = softmax([at.products[member][time][j] for j in candidates])
                total = [a + b / (at.group * len(times)) for a, b in zip(total, row, strict=True)]
        weights = pooled(total, "avg", 5)
        found = {
            j: math.log(x) + gumbel(random_key(j, head, at.now + 1, at.layer, seed))
            for j, x in zip(candidates, weights, strict=True)
        }
        ranges = sorted(candidates, key=lambda j: (float(at.v[head, j].max() - at.v[head, j].min()), j), reverse=True)
        return and_window(at, head, {**found, **dict.fromkeys(ranges[: int(share * at.target)], KEPT)})

    return score


def sketch(seed: int, fixed: bool, rank: int = 20) -> Score:
    """VaSE-DKV and CurDKV with the matrix written out."""

    def matrix(width: int, event: int, layer: int) -> torch.Tensor:
        keys = [[random_key(i * rank + r, event, layer, seed) for r in range(rank)] for i in range(width)]
        return torch.tensor([[normal(key) for key in row] for row in keys], dtype=torch.float64) / math.sqrt(rank)

    def score(at: Moment, head: int) -> dict[int, float]:
        drawn = matrix(at.k.shape[-1], 0 if fixed else at.now + 1, at.layer)
        size = {
            j: (at.k[head, j] @ drawn).square().sum() * (at.v[head, j] @ drawn).square().sum() for j in at.held[head]
        }
        return {j: float(x) for j, x in size.items()}

    return score


class LocalAndGlobal(Remembering):
    """G-KV's F, and the score."""

    def __init__(self, window: int, mix: float = 0.5, alpha: float = 0.8, memory: str = "max") -> None:
        super().__init__()
        self.window, self.mix, self.alpha, self.memory = window, mix, alpha, memory

    def see(self, at: Moment, head: int) -> None:
        candidates = before(at, head, self.window)
        if (at.now + 1) % at.period or not candidates:
            return
        times, new = at.last(self.window), dict.fromkeys(candidates, 0.0)
        for time in times:
            rows = [at.attention(member, time, at.held[head]) for member in group(at, head)]
            for j in candidates:
                new[j] += max(row[j] for row in rows) / len(times)
        top = 1.0 if self.memory == "sum" else max(new.values())
        for j, x in new.items():
            old = self.kept.get((head, j))
            both = {
                "max": lambda old, x: max(self.alpha * old, x),
                "mean": lambda old, x: self.alpha * old + (1 - self.alpha) * x,
                "sum": lambda old, x: self.alpha * old + x,
            }[self.memory]
            self.kept[head, j] = x / top if old is None else both(old, x / top)

    def __call__(self, at: Moment, head: int) -> dict[int, float]:
        same = redundancy(at, head)
        top = max(same.values())
        found = {
            j: self.mix * self.kept[head, j] - (1 - self.mix) * same[j] / top for j in before(at, head, self.window)
        }
        return and_window(at, head, found)


def lost(at: Moment, head: int, member: int, time: int, part: str) -> dict[int, float]:
    """OBCache's saliency by one query of one query head."""
    weights = at.attention(member, time, at.held[head])
    output = sum(weight * at.v[head, j] for j, weight in weights.items())
    found = {}
    for j, weight in weights.items():
        v, z = at.v[head, j], at.products[member][time][j]
        move = {"value": v, "key": z * (v - output), "joint": v + z * (v - output)}[part]
        found[j] = weight**2 * float(move @ move)
    return found


def saliency(part: str, window: int) -> Score:
    def score(at: Moment, head: int) -> dict[int, float]:
        total = dict.fromkeys(before(at, head, window), 0.0)
        for time in at.last(window):
            for member in group(at, head):
                found = lost(at, head, member, time, part)
                total = {j: x + found[j] for j, x in total.items()}
        return and_window(at, head, dict(zip(total, pooled(list(total.values()), "max", 7), strict=True)))

    return score


class AllSaliency(Remembering):
    """OBCache by every query so far."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def see(self, at: Moment, head: int) -> None:
        for member in group(at, head):
            for j, x in lost(at, head, member, at.now, self.part).items():
                self.kept[head, j] = self.kept.get((head, j), 0.0) + x

    def __call__(self, at: Moment, head: int) -> dict[int, float]:
        held = at.held[head]
        return dict(zip(held, pooled([self.kept[head, j] for j in held], "max", 7), strict=True))


def output_change(base: Score, fast: bool = False) -> Score:
    """CAOTE round another score: the output with and without each token."""

    def score(at: Moment, head: int) -> dict[int, float]:
        found = base(at, head)
        scored = {j: x for j, x in found.items() if x < 1e29}
        total = sum(scored.values())
        weights = {j: x / total for j, x in scored.items()}
        output = sum((weight * at.v[head, j] for j, weight in weights.items()), torch.zeros(at.v.shape[-1]))
        change = {}
        for j, weight in weights.items():
            if fast:
                mean = sum(at.v[head, i] for i in at.held[head]) / len(at.held[head])
                change[j] = weight / max(1 - weight, 1e-6) * float((mean - at.v[head, j]).norm())
            else:
                rest = (output - weight * at.v[head, j]) / max(1 - weight, 1e-6)
                change[j] = float((output - rest).norm())
        return and_window(at, head, change)

    return score


class Once(Remembering):
    """FlowKV round another score: how often each token competed, and then winners, survivors by age, losers."""

    def __init__(self, base: Score, keep: float, sinks: int, recent: int) -> None:
        super().__init__()
        self.base, self.keep, self.sinks, self.recent = base, keep, sinks, recent

    def see(self, at: Moment, head: int) -> None:
        over = sum(map(len, at.held)) > len(at.held) * at.target
        if (at.now + 1) % at.period or not over:
            return
        block = at.now // at.period * at.period
        for j in at.held[head]:
            if self.sinks <= j <= at.now - self.recent and j < block:
                self.kept[head, j] = self.kept.get((head, j), 0) + 1

    def __call__(self, at: Moment, head: int) -> dict[int, float]:
        base = self.base(at, head)
        new = [j for j in at.held[head] if self.kept.get((head, j)) == 1]
        new.sort(key=lambda j: (base[j], j), reverse=True)
        winners = math.ceil(self.keep * len(new))
        found = {j: -1e6 + j for j in at.held[head]}
        found |= {j: (0.0 if place < winners else -2e6) - place for place, j in enumerate(new)}
        return found


def demand_counts(floor: float) -> Callable[[Moment, list[dict[int, float]], list[set[int]], int], list[int]]:
    """ReasonAlloc's heads: pool, count, raise to the floor, square root, limits, whole slots by largest remainder."""

    def counts(at: Moment, scores: list[dict[int, float]], safe: list[set[int]], target: int) -> list[int]:
        heads = len(scores)
        rooms = [sorted((x for j, x in scores[h].items() if j not in safe[h]), reverse=True) for h in range(heads)]
        free = min(max(heads * target - sum(map(len, safe)), 0), sum(map(len, rooms)))
        pool = sorted((-x, h) for h in range(heads) for x in rooms[h])[:free]
        won = [math.sqrt(max(sum(h == head for _, h in pool), floor * free / heads)) for head in range(heads)]
        mean = sum(won) / heads
        held = [min(max(x, 0.25 * mean), 2 * mean) for x in won]
        exact = [free * x / sum(held) for x in held]
        share = [int(x) for x in exact]
        for h in sorted(range(heads), key=lambda h: (share[h] - exact[h], h))[: free - sum(share)]:
            share[h] += 1
        share = [min(s, len(room)) for s, room in zip(share, rooms, strict=True)]
        rest = sorted((-x, h) for h in range(heads) for x in rooms[h][share[h] :])
        for _, h in rest[: free - sum(share)]:
            share[h] += 1
        return [len(safe[h]) + share[h] for h in range(heads)]

    return counts
