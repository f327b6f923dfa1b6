"""Runs: stretches of a row's real tokens without padding between them. Left padding alone makes one run of a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learnevict.signals import NEVER

Run = tuple[int, int]
"""The column where a run begins, and how many real tokens come before it."""


def lengthen(runs: list[Run], seen: int, columns: Sequence[int], offset: int = 0) -> None:
    """Enters real tokens at ascending `columns` + `offset`, of which `seen` came before."""
    jumps = range(1, len(columns)) if columns[-1] - columns[0] >= len(columns) else ()
    for rank in (0, *(rank for rank in jumps if columns[rank] != columns[rank - 1] + 1)):
        column, before = columns[rank] + offset, seen + rank
        if not runs or column - before != runs[-1][0] - runs[-1][1]:
            runs.append((column, before))


def columns_of(runs: list[Run], seen: int) -> list[int]:
    """Returns where the `seen` real tokens of a row stand."""
    ends = [before for _, before in runs[1:]] + [seen]
    return [column + rank for (column, before), end in zip(runs, ends, strict=True) for rank in range(end - before)]


def laid_out(rows: list[list[Run]], device: torch.device) -> Tensor | None:
    """Returns the table of signals.Rows.runs, int32 [2, B, R]; None if no row has padding between real tokens."""
    width = max(map(len, rows))
    if width <= 1:
        return None
    parts = [[*runs, *([(NEVER, NEVER)] * (width - len(runs)))] for runs in rows]
    table = [
        [[column for column, _ in row] for row in parts],
        [[column - before for column, before in row] for row in parts],
    ]
    return torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True)
