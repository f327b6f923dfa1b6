"""Methods that run tokens to ask, written a second time: float64 forwards of a stock model in which masks hide what is gone.

A row is a text without padding; every event reads all of it again, with the tokens that ask behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from tests.brute_force import NEVER, Moment, Rule, pooled, ranked, snap
from tests.laws import naive

STATES: dict[int, tuple[Any, Any, Any]] = {}


def noted(module, query, key, value, *args, **kwargs):
    STATES[module.layer_idx] = tuple(part[0].double() for part in (query, key, value))
    return naive.masked_attention(module, query, key, value, *args, **kwargs)


@dataclass
class Conversation:
    """One row: held[layer][head] are positions, oldest first; fresh those read since the last event that evicted."""

    model: Any
    ids: list[int]
    rule: Rule
    expiry: Any
    held: list[list[list[int]]]
    fresh: list[int] = field(default_factory=list)
    now: int = -1

    def run(self, extra: list[int], visible: list[list[list[int]]] | None = None) -> tuple[Any, list[Moment]]:
        """Logits [T, V] and a Moment per layer of the text so far and `extra`, which sees `visible` or all that is held."""
        text, size = self.ids[: self.now + 1], self.now + 1 + len(extra)
        gone = {layer: torch.zeros(1, len(heads), size, size).bool() for layer, heads in enumerate(self.held)}
        for layer, heads in enumerate(visible or self.held):
            for head, seen in enumerate(heads):
                for j in range(len(text)):
                    gone[layer][0, head, int(min(self.expiry[layer, head, j], size)) : len(text), j] = True
                    gone[layer][0, head, len(text) :, j] = j not in seen
        with naive.masking(self.model, gone), torch.no_grad():
            AttentionInterface.register(naive.NAME, noted)
            ones = torch.ones(1, size, dtype=torch.int64)
            logits = self.model(torch.tensor([text + extra]), attention_mask=ones, use_cache=False).logits[0]
        moments = [
            Moment(q, k, v, q.shape[-1] ** -0.5, (), text + extra, self.held[layer], [], now=self.now)
            for layer, (q, k, v) in sorted(STATES.items())
        ]
        return logits, moments

    def safe(self, head: list[int], recent: int) -> set[int]:
        block = self.now // self.rule.slack * self.rule.slack
        return {j for j in head if j < self.rule.sinks or j > self.now - recent or j >= block}


Ask = Callable[[Conversation], list[list[dict[int, float]]]]


def history(model: Any, ids: list[int], prompt: int, rule: Rule, ask: Ask) -> Any:
    """expiry int32 [L, H, T]; `ask` gives every token held a number, by layer and head."""
    config = model.config
    shape = config.num_hidden_layers, config.num_key_value_heads
    expiry = torch.full((*shape, len(ids)), NEVER, dtype=torch.int32)
    held: list[list[list[int]]] = [[[] for _ in range(shape[1])] for _ in range(shape[0])]
    talk = Conversation(model, ids, rule, expiry, held)
    for time in range(len(ids)):
        talk.now = time
        talk.fresh.append(time)
        for heads in held:
            for head in heads:
                head.append(time)
        grid = (time + 1) % rule.slack == 0
        due = grid if time >= prompt or not rule.at_prompt_end else time == prompt - 1
        if not due or len(held[0][0]) <= rule.budget:
            continue
        scores = ask(talk)
        talk.fresh = []
        for layer, heads in enumerate(held):
            for number, head in enumerate(heads):
                best = ranked(head, talk.safe(head, rule.recent), scores[layer][number])
                expiry[layer, number, best[rule.budget :]] = time + 1
                head[:] = sorted(best[: rule.budget])
    return expiry


def mine(at: Moment, head: int) -> range:
    return range(head * at.group, (head + 1) * at.group)


class Repeated:
    """KVzip."""

    def __init__(self, chunk: int, prompt: tuple[int, ...] = ()) -> None:
        self.chunk, self.prompt = chunk, list(prompt)
        self.kept: dict[tuple[int, int, int], float] = {}

    def __call__(self, talk: Conversation) -> list[list[dict[int, float]]]:
        for start in range(0, len(talk.fresh), self.chunk):
            chunk = talk.fresh[start : start + self.chunk]
            extra = self.prompt + [talk.ids[j] for j in chunk]
            own = list(range(talk.now + 1, talk.now + 1 + len(extra)))
            for layer, at in enumerate(talk.run(extra)[1]):
                for head in range(len(at.held)):
                    among = sorted({*range(talk.rule.sinks), *chunk}) + own
                    rows = [at.attention(member, time, among) for member in mine(at, head) for time in own]
                    for j in chunk:
                        self.kept[layer, head, j] = max(row[j] for row in rows)
        return [
            [{j: self.kept[layer, number, j] for j in head} for number, head in enumerate(heads)]
            for layer, heads in enumerate(talk.held)
        ]


def lookahead(past: int, num: int, window: int) -> Ask:
    """LAQ and LAQ++ behind SnapKV's choice."""

    def ask(talk: Conversation) -> list[list[dict[int, float]]]:
        logits, moments = talk.run([])
        chosen = [
            [
                ranked(head, talk.safe(head, window), snap("paper", window)(at, number))[: talk.rule.budget]
                for number, head in enumerate(at.held)
            ]
            for at in moments
        ]
        written = [int(logits[-1].argmax())]
        for _ in range(num - 1):
            written.append(int(talk.run(written, chosen)[0][-1].argmax()))
        after = talk.run(written, chosen)[1]
        return [[votes(at, number) for number in range(len(at.held))] for at in after]

    def votes(at: Moment, number: int) -> dict[int, float]:
        held = at.held[number]
        before, pools = [j for j in held if j <= at.now - past], []
        for member in mine(at, number):
            times = [*(at.last(past) if past else []), *range(at.now + 1, at.now + 1 + num)]
            rows = [at.attention(member, time, held) for time in times]
            pools.append(pooled([sum(row.get(j, 0.0) for row in rows) for j in before], "max", 7))
        mean = [sum(column) / at.group for column in zip(*pools, strict=True)]
        return {**dict.fromkeys(held, 1e30), **dict(zip(before, mean, strict=True))}

    return ask
