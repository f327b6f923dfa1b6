"""Mode "replay": scorers learn to rank cached tokens as the oracle does; no gradient through the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learnevict.errors import DataError
from learnevict.ops.distributed import highest
from learnevict.ops.random import hashed
from learnevict.oracle import golden_labels
from learnevict.parts.learned import SlotScorer
from learnevict.policy import Guard, Schedule
from learnevict.train.batch_random import BatchRandom, check_budgets
from learnevict.train.losses import objectives
from learnevict.train.run.flags import check_fields, flag
from learnevict.train.trainer import GateTrainer
from learnevict.train.trainers.replay_states import States, record_states


@dataclass(frozen=True)
class RankingConfig:
    """The settings of mode "replay"."""

    period: int = flag(16, "tokens between events in training; inference may differ, features are means over queries")
    budgets: tuple[int, int] = flag(
        (36, 160), "smallest and largest budget, drawn per batch log-uniformly: one scorer for all of them"
    )
    own_rows: float = flag(0.5, "share of rows that follow the scorer's own evictions", least=0, most=1)
    pairs: int = flag(256, "sampled pairs per state and head")
    sinks: int = flag(4, "first tokens that stay", least=0)
    recent: int = flag(8, "last tokens that stay", least=0)
    regression: float = flag(0.1, "weight of the squared error on log labels beside the pairwise loss", least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        check_budgets(self.budgets, self.floor)

    @property
    def floor(self) -> int:
        """The smallest budget with room for one scored slot beside guards and the fresh block."""
        return Guard(self.sinks, self.recent).reserved(self.period) + 1

    @property
    def shortest(self) -> int:
        """The tokens that a document needs at least."""
        return self.budgets[0] + self.period + 1


class RankingTrainer(GateTrainer):
    """The trainer of mode "replay": scorers rank the slots that they meet in runs under eviction.

    Raises:
        DataError: while training, a batch of texts too short to evict from.
    """

    config_type = RankingConfig
    stored_labels = True

    def batch_loss(self, model: Any, inputs: dict[str, Any], draws: BatchRandom) -> Tensor:
        """Records the states of a batch, scores them with gradient, and compares the scores with the oracle's labels."""
        states = dict(sorted(self._record(inputs, draws).items()))
        stacked = {layer: part.stacked() for layer, part in states.items()}
        features = {layer: part[0] for layer, part in stacked.items()}
        gate: SlotScorer = self.gate
        if not bool(gate.calibrated):
            gate.calibrate(features, {layer: part[2] for layer, part in stacked.items()})
        scores: list[Tensor] = model(score_all, features)
        parts = [
            (score, objectives.log_label(targets), candidates)
            for score, (_, targets, candidates) in zip(scores, stacked.values(), strict=True)
        ]
        candidate_sets = parts if gate.scope == "layer" else [joined(parts)]
        pairs = self.config.pairs * len(parts) // len(candidate_sets)
        losses: list[Tensor] = []
        for number, (part, state) in enumerate(zip(candidate_sets, states.values(), strict=False)):
            row, seen = torch.cat(state.events).unbind(-1)
            losses.append(objectives.pairwise(*part, pairs=pairs, seeds=hashed(draws.rows[row], seen, number)))
        errors = [self.config.regression * objectives.regression(*part) for part in parts]
        for score, target, candidates in parts:
            self.record(kept_share=objectives.kept_share(score.detach(), target, candidates, self.config.period))
        return torch.stack(losses).mean() + torch.stack(errors).mean()

    def _record(self, inputs: dict[str, Any], draws: BatchRandom) -> dict[int, States]:
        """Returns the states of every layer in one run of the batch, under a budget drawn for it."""
        config, ids, mask, labels = self.config, inputs["input_ids"], inputs["attention_mask"], inputs["stored_labels"]
        if labels is None:
            labels, _ = golden_labels(self.base, ids, mask, block=config.period)
        width = highest(ids.shape[1], ids.device)
        longest = width - config.period - 1
        if longest < config.floor:
            raise DataError(
                f"a batch of texts of at most {width} tokens: nothing would be evicted from them even at the smallest "
                f"budget ({config.floor}); leave out texts shorter than {config.floor + config.period + 1} tokens"
            )
        gate: Any = self.gathered_gates().gate
        return record_states(
            self.base,
            gate,
            list(labels),
            ids,
            mask,
            budget=min(draws.budget(config.budgets), longest),
            schedule=Schedule(config.period),
            guard=Guard(config.sinks, config.recent),
            own=draws.per_row(0) < config.own_rows,
            scope=self.gate.scope,
        )


def score_all(gate: SlotScorer, features: dict[int, Tensor]) -> list[Tensor]:
    """Returns the scores of recorded states, {layer: [M, H, N, in]} -> [M, H, N] of each; DeepSpeed takes no dictionary."""
    return [gate.score_features(layer, part) for layer, part in features.items()]


def joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scores, labels and candidates [M, H, N] of several layers as one candidate set, [M, 1, L * H * N]."""
    scores, labels, candidates = (torch.cat([part.flatten(1) for part in kind], 1) for kind in zip(*parts, strict=True))
    return scores.unsqueeze(1), labels.unsqueeze(1), candidates.unsqueeze(1)
