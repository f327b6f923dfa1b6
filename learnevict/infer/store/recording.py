"""What a layer remembers beside its slots: the last queries, and when each token was evicted."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from learnevict.infer.clock import Block
from learnevict.signals import EMPTY, NEVER

UNCHANGED = nullcontext()


def ordinary_tensors() -> AbstractContextManager[None]:
    """Returns a context in which tensors may be written to later, although the caller may be in torch.inference_mode()."""
    return _ordinary_tensors() if torch.is_inference_mode_enabled() else UNCHANGED


@contextmanager
def _ordinary_tensors() -> Generator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class Ring:
    """The last `size` queries of every row, post-RoPE, in no order: [B, Hq, W, d] and their positions int32 [B, W]."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.held is None else sum(tensor.nbytes for tensor in self.held)

    def add(self, block: Block, query: Tensor) -> None:
        """Enters the queries of a block, [B, Hq, S, d]."""
        if not self.size:
            return
        if self.held is None:
            shape = (query.shape[0], query.shape[1], self.size, query.shape[3])
            position = torch.full((shape[0], self.size), -1, dtype=torch.int32, device=query.device)
            self.held = (query.new_zeros(shape), position)
        queries, positions = self.held
        size = block.sizes[0]
        if all(s == size for s in block.sizes) and len({b % self.size for b in block.before}) == 1:
            spans = [(slice(None), block.before[0], size)]
        else:
            spans = [(slice(row, row + 1), block.before[row], size) for row, size in enumerate(block.sizes)]
        for row, before, size in spans:
            for start, stop, at in ring_spans(before, size, self.size):
                queries[row, :, at : at + stop - start] = query[row, :, start:stop]
                positions[row, at : at + stop - start] = block.position[row, start:stop]

    def hide(self, hidden: Tensor) -> None:
        """Forgets the queries of columns bool [B, columns read]."""
        if self.held is not None:
            position = self.held[1]
            gone = hidden.gather(1, position.clamp_min(0).long()) & (position >= 0)
            position.masked_fill_(gone, EMPTY)

    def select(self, index: Tensor) -> None:
        if self.held is not None:
            self.held = (self.held[0].index_select(0, index), self.held[1].index_select(0, index))


class Expiries:
    """A trace in the making: int32 [B, H, room]; a last spare column takes what is not evicted."""

    def __init__(self) -> None:
        self.table: Tensor | None = None

    def cover(self, length: int, position: Tensor) -> None:
        """Makes room for `length` columns of the rows and heads of position [B, H, N]."""
        old = self.table
        if old is not None and old.shape[-1] > length:
            return
        room = max(length + 1, length + length // 4)
        self.table = torch.full((*position.shape[:2], room), NEVER, dtype=torch.int32, device=position.device)
        if old is not None:
            self.table[..., : old.shape[-1] - 1] = old[..., :-1]

    def note(self, drop: Tensor, position: Tensor, end: Tensor) -> None:
        """Notes that slots `drop` [B, H, N] at `position` are gone from column `end` [B, 1, 1] on."""
        if self.table is None:
            return  # only padding was read, so no slot is occupied
        column = torch.where(drop, position, self.table.shape[-1] - 1).long()
        self.table.scatter_(-1, column, end.to(torch.int32).expand_as(column))


def ring_spans(before: int, size: int, window: int) -> list[tuple[int, int, int]]:
    """Returns where the last tokens of a block go in a ring: (start, stop, ring offset) pieces."""
    start = max(0, size - window)
    spans = []
    while start < size:
        at = (before + start) % window
        stop = min(size, start + window - at)
        spans.append((start, stop, at))
        start = stop
    return spans
