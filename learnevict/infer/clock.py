"""The clock of a conversation batch: which tokens each row has seen, and when its next event is due.

All layers share it. It lives on the host, so no decision about time waits for the device. Tokens are cut into blocks on each
row's own grid, anchored at its first real token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from learnevict.infer.rows.runs import Run, columns_of, laid_out, lengthen
from learnevict.policy import Schedule
from learnevict.signals import NEVER, Rows


@dataclass(frozen=True)
class Block:
    """Up to one period of fresh tokens per row.

    Attributes:
        columns: where they stand in the forward's input: a slice when all rows agree, else int64 [B, W] (0 where unused).
        sizes: real tokens per row; they come first in the block.
        due: rows whose event falls after this block.
        full: rows whose period ends with this block, where an event falls unless the schedule waits for the prompt's end.
        before: real tokens each row had seen before this block.
        position: int32 [B, W], columns of the whole input, -1 where unused.
        state, runs: what `rows` is made of.
    """

    columns: slice | Tensor
    sizes: tuple[int, ...]
    due: tuple[bool, ...]
    full: tuple[bool, ...]
    before: tuple[int, ...]
    position: Tensor
    state: list[list[int]]
    runs: Tensor | None

    @cached_property
    def rows(self) -> Rows:
        """The rows after reading this block, before its event; steps that show the policy nothing make none."""
        state = torch.tensor(self.state, dtype=torch.int32).to(self.position.device, non_blocking=True)
        return Rows(*state.unbind(0), runs=self.runs)

    @cached_property
    def width(self) -> int:
        return max(self.sizes)

    @cached_property
    def ends(self) -> bool:
        """Whether the block ends a period of some row, or an event is due after it."""
        return any(self.due) or any(self.full)

    @cached_property
    def after(self) -> list[int]:
        return [before + size for before, size in zip(self.before, self.sizes, strict=True)]

    @cached_property
    def real(self) -> tuple[Tensor, Tensor] | None:
        """Rows and places in the block of its real tokens, int64 [n] each; None if all are real."""
        if all(size == self.width for size in self.sizes):
            return None
        pairs = [(row, place) for row, size in enumerate(self.sizes) for place in range(size)]
        rows, places = torch.tensor(pairs, dtype=torch.int64).to(self.position.device, non_blocking=True).unbind(-1)
        return rows, places

    def take(self, values: Tensor, dim: int) -> Tensor:
        """Returns the block's part of a fresh tensor; dim 0 is the batch, `dim` the tokens."""
        if isinstance(self.columns, slice):
            whole = self.columns.stop - self.columns.start == values.shape[dim]
            return values if whole else values[(slice(None),) * dim + (self.columns,)]
        shape = [1] * values.ndim
        shape[0], shape[dim] = self.columns.shape
        target = list(values.shape)
        target[dim] = self.columns.shape[1]
        return values.gather(dim, self.columns.view(shape).expand(target))

    def put(self, out: Tensor, values: Tensor) -> None:
        """Writes [B, Hq, W, d] back to where `take` read it in out [B, Hq, S, d]."""
        if isinstance(self.columns, slice):
            out[:, :, self.columns] = values
            return
        for row, size in enumerate(self.sizes):
            out[row][:, self.columns[row, :size]] = values[row, :, :size]


class Clock:
    """Reads forwards as blocks and remembers where every row stands.

    Attributes:
        plan: blocks of the forward that is being read.
        rest: for each of them, the tokens of every row that it and those behind it bring.
        single: the forward is one block of one column.
        all_begun: every row has read a token.
        asked: tokens that each row had read when a scorer asked its cache last.

    Args:
        schedule: when events fall.
        prompt_length: real tokens of each row's prompt; None: what is read before the first single step.
        deferred: events are held after the forward, so one that would read beyond an event comes in pieces (infer.serve).
    """

    def __init__(self, schedule: Schedule, prompt_length: list[int] | None = None, deferred: bool = False) -> None:
        self.schedule = schedule
        self.given_prompt_length = prompt_length
        self.deferred = deferred
        self.reset()

    def reset(self) -> None:
        self.prompt_length = self.given_prompt_length
        self.length = 0
        self.pending = 0
        self.decoding = False
        self.first: list[int] = []
        self.now: list[int] = []
        self.seen: list[int] = []
        self.block: list[int] = []
        self.prompt_end: list[int] = []
        self.prompt_seen: list[int] = []
        self.asked: list[int] = []
        self.runs: list[list[Run]] = []
        self.tokens: Tensor | None = None
        self.plan: list[Block] = []
        self.rest: list[list[int]] = []
        self.single = self.all_begun = False
        self._table: tuple[list[list[Run]], Tensor | None] = ([], None)

    def prompt_tokens(self, row: int) -> int:
        return self.prompt_seen[row] if self.prompt_seen else 0

    def reorder(self, index: list[int]) -> None:
        for name in ("first", "now", "seen", "block", "prompt_end", "prompt_seen", "prompt_length", "asked"):
            old = getattr(self, name)
            setattr(self, name, old if old is None else [old[i] for i in index])
        self.runs = [list(self.runs[i]) for i in index]

    def read(
        self,
        batch: int,
        size: int,
        mask: Tensor | None,
        tokens: Tensor | None,
        device: torch.device,
        *,
        single: bool | None = None,
        padded: list[bool] | None = None,
    ) -> None:
        """Plans one forward of `size` columns.

        Args:
            mask: [B, >= size], 0 = padding; None if all are real. The host waits for it.
            single: a step, no piece of a longer text.
            padded: rows that a step pads because they have ended.
        """
        if not self.seen:
            self.first, self.now = [0] * batch, [-1] * batch
            self.seen, self.block, self.prompt_end = [0] * batch, [0] * batch, [0] * batch
            self.prompt_seen, self.runs = [0] * batch, [[] for _ in range(batch)]
            self.asked = [0] * batch
        single = size == 1 if single is None else single
        queues = self._queues(batch, size, mask, padded)
        self.tokens = tokens
        if not self.decoding:
            self._extend_prompt(queues, single)
        self.plan, self.pending = [], size
        done = [0] * batch
        while any(done[row] < len(queues[row]) for row in range(batch)):
            self.plan.append(self._block(queues, done, single, device))
        self.rest = [
            [sum(block.sizes[row] for block in self.plan[number:]) for row in range(batch)]
            for number in range(len(self.plan))
        ]
        self.single, self.all_begun = size == 1 and len(self.plan) == 1, all(self.seen)

    def hide(self, hidden: Tensor) -> list[int]:
        """Takes back what was read in columns bool [B, columns read]: how many tokens each row loses."""
        lost, period = [0] * len(hidden), self.schedule.period
        for row, flags in enumerate(hidden.tolist()):
            read = list(columns_of(self.runs[row], self.seen[row]))
            columns = [column for column in read if not flags[column]]
            self.asked[row] = sum(not flags[column] for column in read[: self.asked[row]])
            lost[row], seen = self.seen[row] - len(columns), len(columns)
            if not lost[row]:
                continue
            self.seen[row], self.runs[row] = seen, []
            if columns:
                lengthen(self.runs[row], 0, columns)
            self.first[row], self.now[row] = (columns[0], columns[-1]) if columns else (0, -1)
            self.block[row] = columns[seen // period * period] if seen % period else self.now[row] + 1
            self.prompt_seen[row] = sum(column < self.prompt_end[row] for column in columns)
        return lost

    def commit(self) -> None:
        self.length += self.pending
        self.pending = 0

    def next_event(self, row: int, seen: int) -> int:
        """Returns how many tokens a row has read at its first event after `seen`; NEVER if forwards may be of any length."""
        schedule, prompt = self.schedule, self.prompt_length
        grid = seen + schedule.period - seen % schedule.period
        if not schedule.active or (schedule.prompt == "end" and prompt is None):  # then it ends with its forward
            return NEVER
        if schedule.prompt == "end" and prompt is not None:
            return prompt[row] if seen < prompt[row] else grid if schedule.decode else NEVER
        return grid

    def _queues(
        self, batch: int, size: int, mask: Tensor | None, padded: list[bool] | None
    ) -> list[range] | list[list[int]]:
        """Returns the real columns of each row."""
        if mask is None:
            return [range(1 - over) for over in padded] if padded else [range(size)] * batch
        flags = mask[:, -size:].bool().tolist()
        over = padded or [False] * batch
        return [
            [column for column, real in enumerate(row) if real and not ended]
            for row, ended in zip(flags, over, strict=True)
        ]

    def _extend_prompt(self, queues: list[range] | list[list[int]], single: bool) -> None:
        """Counts tokens read before the first single step as the prompt, unless its length was given."""
        if single and self.prompt_length is None:
            self.decoding = all(self.seen)
        for row, queue in enumerate(queues):
            count = 0 if self.decoding else len(queue)
            if self.prompt_length is not None:
                count = max(0, min(count, self.prompt_length[row] - self.seen[row]))
            if count:
                self.prompt_end[row] = self.length + queue[count - 1] + 1
                self.prompt_seen[row] += count

    def _block(
        self, queues: list[range] | list[list[int]], done: list[int], single: bool, device: torch.device
    ) -> Block:
        period, batch = self.schedule.period, len(queues)
        sizes, due, full, parts, before = [], [], [], [], tuple(self.seen)
        for row in range(batch):
            queue, start = queues[row], done[row]
            size = min(len(queue) - start, period - self.seen[row] % period, self._to_prompt_end(row))
            part = queue[start : start + size]
            if size:
                if self.seen[row] == 0:
                    self.first[row] = self.block[row] = self.length + part[0]
                lengthen(self.runs[row], self.seen[row], part, self.length)
                self.now[row] = self.length + part[-1]
                self.seen[row] += size
                done[row] += size
            sizes.append(size)
            parts.append(part)
            due.append(self._due(row, size, done[row] == len(queue), single))
            full.append(self._full(row, size, single))
        state = [list(part) for part in (self.first, self.now, self.seen, self.block, self.prompt_end)]
        if self._table[0] != self.runs:
            self._table = [list(runs) for runs in self.runs], laid_out(self.runs, device)
        columns, position = self._columns(parts, max(sizes), device)
        for row in range(batch):
            if sizes[row] and self.seen[row] % period == 0:
                self.block[row] = self.now[row] + 1
        return Block(columns, tuple(sizes), tuple(due), tuple(full), before, position, state, self._table[1])

    def _full(self, row: int, size: int, single: bool) -> bool:
        schedule = self.schedule
        on_grid = size > 0 and self.seen[row] % schedule.period == 0
        return on_grid and schedule.active and (schedule.decode or not single)

    def _due(self, row: int, size: int, last: bool, single: bool) -> bool:
        schedule = self.schedule
        if not schedule.active or size == 0:
            return False
        if schedule.prompt == "blocks":
            return self._full(row, size, single)
        on_grid = self.seen[row] % schedule.period == 0
        if self.prompt_length is not None and self.seen[row] <= self.prompt_length[row]:
            return self.seen[row] == self.prompt_length[row]
        past_prompt = single or self.prompt_length is not None
        return schedule.decode and on_grid if past_prompt else last

    def _to_prompt_end(self, row: int) -> int:
        """Returns tokens to the end of the row's prompt, where a schedule that waits for it cuts a block; else no limit."""
        if self.schedule.prompt == "blocks" or self.prompt_length is None:
            return NEVER
        left = self.prompt_length[row] - self.seen[row]
        return left if left > 0 else NEVER

    def _columns(self, parts: list, width: int, device: torch.device) -> tuple[slice | Tensor, Tensor]:
        same = all(len(part) == width and part[0] == parts[0][0] and part[-1] == parts[0][-1] for part in parts)
        if same and parts[0][-1] - parts[0][0] == width - 1:
            start = parts[0][0]
            place = torch.arange(self.length + start, self.length + start + width, dtype=torch.int32, device=device)
            return slice(start, start + width), place.expand(len(parts), -1)
        columns = [[*part, *([0] * (width - len(part)))] for part in parts]
        places = [[*(self.length + c for c in part), *([-1] * (width - len(part)))] for part in parts]
        position = torch.tensor(places, dtype=torch.int32).to(device, non_blocking=True)
        return slice(0, 1) if self.pending == 1 else torch.tensor(columns, dtype=torch.int64, device=device), position
