"""The end of a block in one layer: per-slot state is refreshed; where an event is due, the policy is asked what to keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from learnevict.errors import CacheError
from learnevict.infer.clock import Block
from learnevict.infer.store.storage import Storage
from learnevict.policy import Governor
from learnevict.signals import Signals


@dataclass(frozen=True)
class Event:
    """Rows of a layer after the block that was read last, and what the policy may see of them."""

    storage: Storage
    block: Block
    signals: Signals

    def refresh(self, policy: Governor) -> None:
        """Updates per-slot state in the rows whose period is over."""
        columns, full = self.storage.pool.state.columns, self.block.full
        for name, fresh in policy.scorer.refresh(self.signals).items():
            if not all(full):
                whose = torch.tensor(full).to(fresh.device, non_blocking=True)
                fresh = torch.where(whose.view(-1, *([1] * (fresh.ndim - 1))), fresh, columns[name])
            columns[name] = fresh.to(columns[name].dtype)

    def waiting(self) -> Event:
        """Returns the same event, holding nothing but what the policy may see: no part of a longer forward's states."""
        names = ("query", "key", "value", "hidden", "tokens")
        parts = {name: getattr(self.signals, name) for name in names}
        parts = {name: alone(part) for name, part in parts.items()}
        return replace(self, signals=replace(self.signals, memo={}, **parts))  # slots may still move

    def targets(self) -> list[int]:
        return self.storage.targets_after(self.block)

    def crowded(self) -> list[bool]:
        """Returns which rows are due and hold more than their budget, in all or in full precision."""
        storage, tiers = self.storage, self.storage.tiers_after(self.block)
        return [
            due and (live > full or live + demoted > full + low)
            for due, live, demoted, (full, low) in zip(self.block.due, storage.live, storage.low, tiers, strict=True)
        ]

    def decide(self, policy: Governor, signals: Signals, rows: list[bool]) -> tuple[Tensor, Tensor] | None:
        """Returns what goes in `rows`, and what of the rest leaves full precision, both bool [B, H, N]; None if all is kept."""
        if not policy.store.bits:
            keep = policy.keep(signals)
            return None if keep is None else (self.drop(keep, rows), torch.zeros_like(keep))
        pool = self.storage.pool
        full = signals.occupied
        full[:, :, pool.keys.shape[2] :] = False
        counts = torch.tensor(self.storage.full_targets(self.block.after)).to(full.device, non_blocking=True)
        keep, stay = policy.keep_in_tiers(signals, full, counts.view(-1, 1).expand(full.shape[:2]))
        if keep is None:
            return None
        drop = self.drop(keep, rows)
        leave = full & ~stay & ~drop
        if not all(rows):
            leave &= torch.tensor(rows).to(full.device, non_blocking=True).view(-1, 1, 1)
        return drop, leave

    def drop(self, keep: Any, rows: list[bool]) -> Tensor:
        """Returns what goes, bool [B, H, N], if only `rows` evict and the policy keeps `keep`.

        Raises:
            CacheError: `keep` is no mask of the slots.
        """
        wanted = self.signals.position.shape
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != wanted:
            found = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise CacheError(
                f"keep(signals) returned {found} in layer {self.signals.layer}, not the slots to keep, torch.bool "
                f"{list(wanted)}; return such a mask, or None to keep all"
            )
        drop = ~keep & self.signals.occupied
        if not all(rows):
            drop &= torch.tensor(rows).to(drop.device, non_blocking=True).view(-1, 1, 1)
        return drop


def alone(part: Tensor | None) -> Tensor | None:
    """Returns the tensor without what else its memory holds."""
    if part is None or part.untyped_storage().nbytes() == part.nbytes:
        return part
    return part.clone()


def check_room(storage: Storage, kept: Tensor, policy: Governor, layer: int) -> None:
    """Raises CacheError if more is kept, bool [B, H, N], than is counted; on CUDA a device assertion, without a wait."""
    budget = [live + low for live, low in zip(storage.live, storage.low, strict=True)]
    room = torch.tensor(budget).to(kept.device, non_blocking=True)
    counts = kept.sum(-1)
    most = -(-counts.sum(-1) // counts.shape[1]) if policy.allocator.ragged else counts.amax(-1)
    try:
        torch.ops.aten._assert_async.msg((most <= room).all(), "a policy kept more slots than its budget")
    except RuntimeError as error:
        raise CacheError(
            f"the policy keeps {most.tolist()} slots per head in layer {layer}, but its budget leaves {budget}; "
            "keep(signals) must not exceed signals.budget"
        ) from error
