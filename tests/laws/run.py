"""One conversation read in pieces through an evicting cache, with everything recorded that a law compares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from learnevict import EvictingCache, attach
from learnevict.policy import Policy
from learnevict.signals import Trace
from tests.laws.naive import position_ids

PROMPT, LENGTH = 37, 49
PADS = (0, 5, 14)
ANSWERS, GAPS, TURN, STEPS = (LENGTH - PROMPT, 4, 7), (0, 3, 5), 11, 9
"""Of `Turns`: tokens each row reads of its answer, padding before its second turn, columns of that turn, and steps after it."""


@dataclass(frozen=True)
class Moment:
    """What the cache held after a forward: columns read, positions per evicting layer, bytes."""

    length: int
    positions: dict[int, Tensor]
    nbytes: int


@dataclass
class Run:
    """A finished conversation."""

    ids: Tensor
    mask: Tensor
    policy: Policy
    cache: EvictingCache
    logits: Tensor
    moments: list[Moment] = field(default_factory=list)

    @property
    def trace(self) -> Trace:
        """The recorded trace."""
        return self.cache.trace()

    @property
    def evictions(self) -> int:
        """Tokens evicted, over layers, rows and heads; 0 where every layer stays stock."""
        return self.trace.evictions if self.cache.evicting else 0


def batch(ids: Tensor, pads: Sequence[int] = PADS) -> tuple[Tensor, Tensor]:
    """Left-pads rows: the first pads[b] tokens of row b become padding. Returns ids and mask, int64 [B, T]."""
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return ids * mask, mask


def pieces(prompt: int, length: int) -> list[int]:
    """The prompt in one forward, then token by token."""
    return [prompt, *([1] * (length - prompt))]


class Reader:
    """Feeds ids to a model piece by piece, from where its cache stands; several readers may take turns on one model."""

    def __init__(
        self, model: PreTrainedModel, cache: EvictingCache, ids: Tensor, mask: Tensor, sizes: list[int]
    ) -> None:
        self.model, self.cache, self.ids, self.mask = model, cache, ids, mask
        self.places = position_ids(mask)
        self.sizes = sizes
        self.logits: list[Tensor] = []
        self.moments: list[Moment] = []

    def __iter__(self) -> Iterator[Moment]:
        start = self.cache.get_seq_length()
        for size in self.sizes:
            stop = start + size
            with torch.no_grad():
                self.logits.append(
                    self.model(
                        input_ids=self.ids[:, start:stop],
                        attention_mask=self.mask[:, :stop],
                        position_ids=self.places[:, start:stop],
                        past_key_values=self.cache,
                    ).logits
                )
            positions = {index: self.cache.positions(index).clone() for index in self.cache.evicting}
            self.moments.append(Moment(stop, positions, self.cache.nbytes))
            start = stop
            yield self.moments[-1]

    def finish(self) -> Run:
        """Reads what is left."""
        for _ in self:
            pass
        return self.run()

    def run(self) -> Run:
        """Returns what was recorded."""
        return Run(self.ids, self.mask, self.cache.policy, self.cache, torch.cat(self.logits, 1), self.moments)


def read(model: PreTrainedModel, policy: Policy, ids: Tensor, mask: Tensor, sizes: list[int] | None = None) -> Run:
    """Reads ids through a cache of this policy, by default the prompt at once and the rest token by token."""
    with attach(model, policy, record=True) as cache:
        return Reader(model, cache, ids, mask, sizes or pieces(PROMPT, ids.shape[1])).finish()


@dataclass(frozen=True)
class Turns:
    """A conversation of two turns in which rows end early and the next turn is padded.

    Attributes:
        ids: int64 [B, T]; mask [B, T], 0 = padding, the rows' own padding after their end included.
        first: columns of the first turn.
        sizes: of the forwards of both turns.
        end: the token by which rows end.
    """

    ids: Tensor
    mask: Tensor
    first: int
    sizes: tuple[list[int], list[int]]
    end: int

    @classmethod
    def of(cls, ids: Tensor, end: int, pad: int) -> Turns:
        """Rows of distinct tokens: all but the first end early, and have less to read in the second turn."""
        ids, mask = batch(ids)
        for row, (answer, gap) in enumerate(zip(ANSWERS, GAPS, strict=True)):
            stop = PROMPT + answer
            if stop < LENGTH:
                ids[row, stop - 1] = end
            ids[row, stop:LENGTH], mask[row, stop:LENGTH] = pad, 0
            ids[row, LENGTH : LENGTH + gap], mask[row, LENGTH : LENGTH + gap] = pad, 0
        turn = [TURN, *([1] * (ids.shape[1] - LENGTH - TURN))]
        return cls(ids, mask, LENGTH, (pieces(PROMPT, LENGTH), turn), end)

    def alone(self, row: int) -> Turns:
        """One row without any padding."""
        real = self.mask[row].bool()
        ids, first = self.ids[row : row + 1, real], int(real[: self.first].sum())
        one, two = (self._real(row, start, sizes) for start, sizes in zip((0, self.first), self.sizes, strict=True))
        return Turns(ids, torch.ones_like(ids), first, (one, two), self.end)

    def _real(self, row: int, start: int, sizes: list[int]) -> list[int]:
        ends = [start + sum(sizes[: index + 1]) for index in range(len(sizes))]
        counts = [int(self.mask[row, stop - size : stop].sum()) for stop, size in zip(ends, sizes, strict=True)]
        return [count for count in counts if count]

    def read(self, model: PreTrainedModel, policy: Policy) -> Run:
        """As generate() does: in the first turn what a row is fed after its end is masked as text."""
        shown = self.mask[:, : self.first].clone()
        shown[:, self.sizes[0][0] :] = 1
        with attach(model, policy, record=True) as cache:
            one = Reader(model, cache, self.ids[:, : self.first], shown, self.sizes[0]).finish()
            two = Reader(model, cache, self.ids, self.mask, self.sizes[1]).finish()
        logits, moments = torch.cat([one.logits, two.logits], 1), one.moments + two.moments
        return Run(self.ids, self.mask, policy, cache, logits, moments)


def held(expiry: Tensor, mask: Tensor, length: int) -> list[list[list[list[int]]]]:
    """By layer, row and head: columns that a trace says are held once `length` columns were read."""
    column = torch.arange(expiry.shape[-1], device=expiry.device)
    alive = (column < length) & (expiry > length) & mask[:, None].bool()
    return [[[column[head].tolist() for head in row] for row in layer] for layer in alive]


def occupied(position: Tensor) -> list[list[list[int]]]:
    """By row and head: columns held, sorted, every slot counted (so a double shows)."""
    return [[sorted(head[head >= 0].tolist()) for head in row] for row in position]


class Script(LogitsProcessor):
    """Row b writes answers[b]."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers, self.step = answers, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        told = [tokens[min(self.step, len(tokens) - 1)] for tokens in self.answers]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, torch.tensor(told).to(scores.device).view(-1, 1), 0.0)


@dataclass(frozen=True)
class SecondTurn:
    """How the second turn follows a first one in which rows end early.

    Attributes:
        pad: of generate(): another token than the end, the end token, or None for unset.
        size: columns of the turn; 1: one token, read by hand as is the last column of the first turn.
        ones: the mask calls text whatever follows the prompts.
    """

    pad: int | None
    size: int
    ones: bool

    def read(self, model: PreTrainedModel, cache: Any, turns: Turns) -> list[Tensor]:
        """Both turns through `cache`, an EvictingCache of an attached model or a stock one: logits at what is text, [n, V]."""
        prompt = {"input_ids": turns.ids[:, :PROMPT], "attention_mask": turns.mask[:, :PROMPT]}
        answers = turns.ids[:, PROMPT : turns.first].tolist()
        how = {"past_key_values": cache, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        ends = {"eos_token_id": turns.end, "pad_token_id": self.pad, "max_new_tokens": turns.first - PROMPT}
        first = model.generate(**prompt, **how, **ends, logits_processor=[Script(answers)])
        logits = [torch.stack(first.logits, 1)[turns.mask[:, PROMPT - 1 : turns.first - 1].bool()]]
        stop = turns.first + (self.size if self.size > 1 else 0)
        ids, mask = torch.cat([first.sequences, turns.ids[:, turns.first : stop]], 1), turns.mask[:, :stop]
        mask = torch.cat([mask[:, :PROMPT], torch.ones_like(mask[:, PROMPT:])], 1) if self.ones else mask
        if self.size > 1:
            script = [Script(turns.ids[:, stop:].tolist())]
            out = model.generate(
                ids, attention_mask=mask, **how, eos_token_id=None, max_new_tokens=STEPS, logits_processor=script
            )
            return [*logits, torch.stack(out.logits, 1).flatten(0, 1)]
        more = turns.ids[:, -1:]  # for every row a token
        for token, shown in ((ids[:, -1:], mask), (more, torch.nn.functional.pad(mask, (0, 1), value=1))):
            places = position_ids(shown)[:, -1:]
            with torch.no_grad():
                out = model(token, attention_mask=shown, position_ids=places, past_key_values=cache).logits[:, -1]
        return [*logits, out]
