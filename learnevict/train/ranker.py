"""Trainer for judges that rank cached tokens: trajectory replay, no gradient through the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learnevict.errors import BudgetError, DataError
from learnevict.oracle import golden_labels
from learnevict.parts.gates import Judge
from learnevict.policy import Guard, Schedule
from learnevict.train import objectives
from learnevict.train.labels import Document
from learnevict.train.states import States, record_states
from learnevict.train.trainer import GateTrainer


@dataclass(frozen=True)
class RankingConfig:
    """What the judge learns from.

    Attributes:
        period: tokens between events in training; inference may differ, features are means over queries.
        budgets: smallest and largest budget, drawn per batch log-uniformly: one judge for all of them.
        own_rows: share of rows that follow the judge's own evictions.
        pairs: sampled pairs per state and head.
        sinks, recent: guards.
        regression: weight of the squared error on log labels beside the pairwise loss.
    """

    period: int = 16
    budgets: tuple[int, int] = (36, 160)
    own_rows: float = 0.5
    pairs: int = 256
    sinks: int = 4
    recent: int = 8
    regression: float = 0.1

    @property
    def floor(self) -> int:
        """The smallest budget with room for one scored slot beside guards and the fresh block."""
        return Guard(self.sinks, self.recent).reserved(self.period) + 1


def log_label(target: Tensor) -> Tensor:
    """Labels on a logarithmic scale from 0 (below 1e-3) to 1 (all attention)."""
    return 1 + torch.log10(target.clamp_min(1e-3)) / 3


class Collator:
    """Left-pads documents; labels, if stored, become one tensor per layer."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, documents: list[Document]) -> dict[str, Any]:
        """input_ids, attention_mask [B, T] and stored_labels: [L, B, H, T, M] or None."""
        width = max(len(d.input_ids) for d in documents)
        ids = torch.full((len(documents), width), self.pad)
        mask = torch.zeros(len(documents), width, dtype=torch.long)
        stored = documents[0].labels is not None
        blocks = max(d.labels.shape[-1] for d in documents if d.labels is not None) if stored else 0
        first = documents[0].labels
        labels = None if first is None else torch.zeros(first.shape[0], len(documents), first.shape[1], width, blocks)
        for row, document in enumerate(documents):
            size = len(document.input_ids)
            ids[row, width - size :] = torch.tensor(document.input_ids)
            mask[row, width - size :] = 1
            if labels is not None and document.labels is not None:
                labels[:, row, :, width - size :, : document.labels.shape[-1]] = document.labels.float()
        return {"input_ids": ids, "attention_mask": mask, "stored_labels": labels}


class RankingTrainer(GateTrainer):
    """Mode "replay": judges rank what they meet in runs under eviction.

    Args:
        ranking: what to learn from.

    Raises:
        BudgetError: training budgets that cannot hold the guards.
        DataError: while training, a batch of texts too short to evict from.
    """

    def __init__(self, *args: Any, ranking: RankingConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if ranking.budgets[0] < ranking.floor:
            raise BudgetError(
                f"training budgets of {ranking.budgets[0]} to {ranking.budgets[1]} cannot hold {ranking.sinks} sinks, "
                f"{ranking.recent} recent and a fresh block of {ranking.period}; the smallest that works is {ranking.floor}"
            )
        self.ranking = ranking

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Record the states of a batch, score them with gradient, and compare with the oracle."""
        states = self._record(inputs)
        stacked = {layer: part.stacked() for layer, part in sorted(states.items())}
        gate: Judge = self.gate
        if not bool(gate.calibrated):
            gate.calibrate({layer: part[0] for layer, part in stacked.items()}, {k: p[2] for k, p in stacked.items()})
        scores: dict[int, Tensor] = model(judge_all, {layer: part[0] for layer, part in stacked.items()})
        total = torch.zeros((), device=self.args.device)
        for layer, (_, targets, candidates) in stacked.items():
            labels = log_label(targets)
            total = total + objectives.pairwise(scores[layer], labels, candidates, pairs=self.ranking.pairs)
            total = total + self.ranking.regression * objectives.regression(scores[layer], labels, candidates)
            share = objectives.kept_share(scores[layer].detach(), targets, candidates, self.ranking.period)
            self.note(kept_share=share)
        loss = total / len(stacked)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _record(self, inputs: dict[str, Any]) -> dict[int, States]:
        config = self.ranking
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        labels = inputs["stored_labels"]
        if labels is None:
            labels, _ = golden_labels(self.base, ids, mask, block=config.period)
        low, high = (torch.tensor(float(b)).log() for b in config.budgets)
        budget = int((low + (high - low) * torch.rand(())).exp().round())
        longest = ids.shape[1] - config.period - 1
        if longest < config.floor:
            raise DataError(
                f"a batch of texts of at most {ids.shape[1]} tokens: nothing would be evicted from them even at the smallest "
                f"budget ({config.floor}); leave out texts shorter than {config.floor + config.period + 1} tokens"
            )
        budget = min(budget, longest)
        return record_states(
            self.base,
            self.gate,
            list(labels),
            ids,
            mask,
            budget=budget,
            schedule=Schedule(config.period),
            guard=Guard(config.sinks, config.recent),
            own=torch.rand(len(ids), device=ids.device) < config.own_rows,
        )


def judge_all(judge: Judge, features: dict[int, Tensor]) -> dict[int, Tensor]:
    """Scores of recorded states: {layer: [M, H, N, in]} -> {layer: [M, H, N]}."""
    return {layer: judge.judge(layer, part) for layer, part in features.items()}
