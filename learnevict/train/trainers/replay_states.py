"""States to learn from: what a scorer sees at every event of a teacher-forced run, with the oracle's labels of it.

In some rows of the run the oracle evicts, in the others the scorer itself, so that it also meets the states that its own
mistakes lead to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.config import Budget
from learnevict.infer.attach import attach
from learnevict.infer.teacher_forcing import prefill
from learnevict.ops import keep_top
from learnevict.parts.allocators import Together
from learnevict.parts.learned import SlotScorer
from learnevict.policy import Allocator, Guard, Schedule, TopK, Uniform, keep_best
from learnevict.signals import Signals


@dataclass
class States:
    """The recorded states of one layer, in parts that belong to events; M states in all, maybe 0.

    Attributes:
        features: float32 [m, H, N, in], inputs of the scorer.
        targets: float32 [m, H, N], the largest label of a slot's token in the blocks after the event.
        candidates: bool [m, H, N], slots that may be evicted.
        events: int64 [m, 2], the row that each state is of, and the tokens it had seen.
    """

    features: list[Tensor]
    targets: list[Tensor]
    candidates: list[Tensor]
    events: list[Tensor]

    @classmethod
    def none(cls, heads: int, inputs: int, device: torch.device) -> States:
        """Returns the states of a layer before its first event."""
        nothing = torch.zeros(0, heads, 1, device=device)
        rows = torch.zeros(0, 2, dtype=torch.int64, device=device)
        return cls([nothing.new_zeros(0, heads, 1, inputs)], [nothing], [nothing.bool()], [rows])

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features, targets and candidates of all M states, padded to one N with slots that are no candidates."""
        width = max(part.shape[2] for part in self.targets)

        def padded(parts: list[Tensor]) -> Tensor:
            last_first = [[0, 0] * (part.ndim - 3) + [0, width - part.shape[2]] for part in parts]
            return torch.cat([torch.nn.functional.pad(*pair) for pair in zip(parts, last_first, strict=True)])

        return padded(self.features), padded(self.targets), padded(self.candidates)


@dataclass
class Recorder:
    """A policy that records states; a layer that evicts has states, if only none of them: processes count on it.

    Attributes:
        future: per layer the largest label of each block or a later one, [B, H, T, M + 1] (look_ahead); None: stock layer.
        own: bool [B], rows that follow the scorer; the others follow the oracle.
        length: int64 [B], tokens of every row: events after the last one have no future and are not recorded.
    """

    budget: Budget
    scorer: SlotScorer
    future: list[Tensor | None]
    own: Tensor
    schedule: Schedule
    guard: Guard
    length: Tensor
    allocator: Allocator = field(default_factory=Uniform)
    scope: Literal["layer", "model"] = "layer"
    states: dict[int, States] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, part in enumerate(self.future):
            if part is not None:
                self.states[layer] = States.none(part.shape[1], self.scorer.num_features, part.device)

    def keep(self, signals: Signals) -> Tensor:
        """Records the rows whose event this is, and evicts by the oracle or by the scorer."""
        scores, _ = self._scores(signals)
        return keep_top(scores, signals.position, signals.budget.view(-1, 1).expand(scores.shape[:2]))

    def keep_together(self, layers: Sequence[Signals]) -> list[Tensor]:
        """Does the same where slots of all layers compete; their states then belong together, row by row."""
        return keep_best(layers, [self._scores(signals) for signals in layers], self.allocator, TopK())

    def _scores(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Records, and returns the scores that decide, as of Policy.rank, and what is protected."""
        future = self.future[signals.layer]
        assert future is not None
        rows, period = signals.rows, self.schedule.period
        block = torch.div(rows.seen, period, rounding_mode="floor").clamp_max(future.shape[-1] - 1)
        index = block.view(-1, 1, 1, 1).long().expand(*future.shape[:3], 1)
        target = future.gather(-1, index).squeeze(-1).gather(-1, signals.position.clamp_min(0).long())
        protected = self.guard.protect(signals)
        statistics = self.scorer.statistics(signals)
        parts = [
            self.scorer.features(keys, values, statistics[:, :, part]) for part, keys, values in signals.slots.chunks()
        ]
        features = torch.cat(parts, dim=2)
        reads = (signals.query_position >= 0).any(-1)  # False where other rows of the batch go on alone
        due = (rows.seen % period == 0) & (rows.seen > signals.budget) & (rows.seen < self.length)
        pick = (reads & due).nonzero().flatten()
        states = self.states[signals.layer]
        states.features.append(features[pick])
        states.targets.append(target[pick])
        states.candidates.append((signals.occupied & ~protected)[pick])
        states.events.append(torch.stack([pick, rows.seen[pick].long()], dim=-1))
        scores = torch.where(self.own.view(-1, 1, 1), self.scorer.score_features(signals.layer, features), target)
        return scores.masked_fill(~signals.occupied, -torch.inf).masked_fill(protected, torch.inf), protected


@torch.no_grad()
def record_states(
    model: PreTrainedModel,
    gate: SlotScorer,
    labels: list[Tensor | None],
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    budget: int,
    schedule: Schedule,
    guard: Guard,
    own: Tensor,
    scope: Literal["layer", "model"] = "layer",
) -> dict[int, States]:
    """Returns the states of every evicting layer in one teacher-forced run of a batch under eviction.

    Where a scorer has learned how layers share a budget, and they do not compete anyway, they share it so.

    Args:
        labels: per layer [B, H, T, M], None for stock layers.
        budget: slots per (layer, kv head) after an event, on average over layers.
        schedule: its period must be the labels' block.
        own: bool [B], rows that follow the scorer; the others follow the oracle.
        scope: who competes: slots of a head, or of all heads and layers.
    """
    allocator = Together() if scope == "model" else Uniform() if gate.demand is None else gate.demand.allocator()
    recorder = Recorder(
        Budget(budget), gate, [None if part is None else look_ahead(part) for part in labels], own, schedule, guard,
        attention_mask.sum(-1), allocator, scope=scope,
    )  # fmt: skip
    with attach(model, recorder) as cache:
        prefill(model, cache, input_ids, attention_mask, last=1)
    return recorder.states


def look_ahead(labels: Tensor) -> Tensor:
    """Returns the largest label of block m or a later one: [B, H, T, M + 1] for labels [B, H, T, M], 0 behind the last."""
    return torch.nn.functional.pad(labels.float().flip(-1).cummax(-1).values.flip(-1), (0, 1))
