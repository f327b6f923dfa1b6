"""Overhearing a policy: what its scorer says at every event."""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from learnevict.policy import Governor, Scorer
from learnevict.signals import Signals


@dataclass(frozen=True)
class Note:
    """Scores of one layer at one event: position int32 and scores float32, both [B, H, N]; now int32 [B], last token read."""

    layer: int
    position: Tensor
    scores: Tensor
    now: Tensor


@dataclass(frozen=True)
class Overheard(Scorer):
    """A scorer whose scores are noted down."""

    scorer: Scorer
    notes: list[Note] = field(default_factory=list)

    @property
    def columns(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See Scorer."""
        return self.scorer.columns

    @property
    def window(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See Scorer."""
        return self.scorer.window

    @property
    def observes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See Scorer."""
        return self.scorer.observes

    @property
    def refreshes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See Scorer."""
        return self.scorer.refreshes

    def score(self, signals: Signals) -> Tensor:
        """See Scorer."""
        scores = self.scorer.score(signals)
        self.notes.append(Note(signals.layer, signals.position.clone(), scores.detach().float(), signals.rows.now))
        return scores

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """See Scorer."""
        return self.scorer.write(signals)

    def observe(self, signals: Signals) -> dict[str, Tensor]:
        """See Scorer."""
        return self.scorer.observe(signals)

    def refresh(self, signals: Signals) -> dict[str, Tensor]:
        """See Scorer."""
        return self.scorer.refresh(signals)

    def to(self, device: torch.device) -> Scorer:
        """See Scorer."""
        self.scorer.to(device)
        return self


def watched(policy: Governor) -> tuple[Governor, list[Note]]:
    """The same policy, and a list that fills with what its scorer says; it stays empty if none is asked (a Rule).

    A governor that is no dataclass is left as it is.
    """
    if not is_dataclass(policy):
        return policy, []
    notes: list[Note] = []
    listening: Any = replace(policy, scorer=Overheard(policy.scorer, notes))  # pyright: ignore[reportCallIssue]
    return listening, notes
