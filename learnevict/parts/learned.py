"""Kinds of learned gates and what their trainers need: surrogates of the oracle, rankers of slots, slot scorers."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from learnevict.config import Layout
from learnevict.errors import GateError, TrainedOtherwiseWarning
from learnevict.parts.allocators import LayerAllocation
from learnevict.parts.headwise import HeadwiseMLP, centre_and_scale
from learnevict.policy import Gate
from learnevict.signals import Signals, StateColumn

Scope = Literal["layer", "model"]


class Learner(Gate):
    """Learns from one pass of the frozen base, layer by layer, with the oracle's labels as targets
    (learnevict.train.trainers.regression).

    Attributes:
        oracle: what its paper would have it predict, a name of learnevict.oracle.PRESETS.
        objective: how its numbers are compared with the oracle's, a name of learnevict.train.trainers.teacher_pass.OBJECTIVES.
        at_cuts: True if it ranks the slots held at an event, False if it scores tokens as they are written.
        from_hidden: it reads nothing but the hidden states of fresh tokens, so stored ones are all that its training needs.
    """

    mode = "stream"
    oracle: str
    objective: str
    at_cuts: bool
    from_hidden = False

    @abstractmethod
    def predictions(self, signals: Signals) -> Tensor:
        """Returns what is compared with the oracle's labels, with gradient, float32 [B, H, tokens or slots]."""

    def calibrate(self, signals: Signals) -> None:
        """Takes the scale of inputs from whole texts of one layer, once and before training; nothing by default."""


class Surrogate(Learner):
    """Estimates the oracle's label of a token when it is written, and stores it in the column "estimate"."""

    columns = (StateColumn("estimate"),)
    at_cuts = False

    @abstractmethod
    def estimate(self, signals: Signals) -> Tensor:
        """Returns the estimates of fresh tokens, with gradient, float32 [B, H, S]."""

    def predictions(self, signals: Signals) -> Tensor:
        return self.estimate(signals)

    def write(self, signals: Signals) -> dict[str, Tensor]:
        return {"estimate": self.estimate(signals)}

    def score(self, signals: Signals) -> Tensor:
        return signals.state["estimate"]


class Ranker(Learner):
    """Scores all slots at an event, with gradient; its per-slot state may be learned too."""

    at_cuts = True

    def predictions(self, signals: Signals) -> Tensor:
        return self.score(signals)


class NetworkRanker(Ranker):
    """Ranks by a network per layer and kv head.

    Attributes:
        network: its inputs are "key", "value" and those of `inputs`; keys and values are centred and scaled by whole texts.
    """

    network: HeadwiseMLP

    @abstractmethod
    def inputs(self, signals: Signals) -> Mapping[str, Tensor]:
        """Returns the other inputs by name, float32 [B, H, N or 1, width]."""

    def score(self, signals: Signals) -> Tensor:
        inputs = self.inputs(signals)
        names = ("key", "value", *inputs)

        def ranked(*parts: Tensor) -> Tensor:
            return self.network(signals.layer, dict(zip(names, parts, strict=True)))

        return signals.per_slot(ranked, self.network.width, *inputs.values())

    def calibrate(self, signals: Signals) -> None:
        assert signals.key is not None
        assert signals.value is not None
        fresh = {"key": signals.key, "value": signals.value}
        self.network.calibrate(signals.layer, fresh, signals.query_position >= 0)


def hidden_of(signals: Signals, method: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the inputs of the attention module for fresh tokens, [B, S, E].

    Raises:
        GateError: there are none, as in a replay from stored queries.
    """
    if signals.hidden is None:
        raise GateError(
            f"{method} reads hidden states, but layer {signals.layer} was given none; run it inside a model"
        )
    return signals.hidden.to(dtype)


class SlotScorer(Gate):
    """score = w3 . GELU(W2 GELU(W1 x + b1) + b2) for features x = [key; sizes of its rotary pairs; value; statistics].

    Weights of all layers and kv heads are grouped linear maps [L, H, in, out]. They are trained on recorded states
    (learnevict.train.trainers.pairwise) and refined by reinforcement (learnevict.rl).

    Args:
        layout: of the base model.
        num_statistics: statistics of a slot, c.
        hidden: width of the two hidden layers.
        window: past queries looked at per event.
        period: tokens between events in training; None before.
        scope: who competed in training: slots of a head ("layer"), or of all heads and layers ("model").
        demand: layer budget allocation: evicting layers, and the smallest and largest number of slots beyond the floor that it
            was learned for; None: layers share equally. Stored gates have this name.

    Attributes:
        calibrated: bool [], whether `calibrate` has been called.
        num_features: inputs of the network per slot.
    """

    mode = "replay"

    def __init__(
        self,
        layout: Layout,
        num_statistics: int,
        *,
        hidden: int,
        window: int,
        period: int | None,
        scope: Scope,
        demand: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.hidden, self.window, self.period = hidden, window, period
        self.scope: Scope = scope
        self.demand = None if demand is None else LayerAllocation(*demand)
        heads = (layout.num_layers, layout.num_heads)
        self.num_features = inputs = layout.head_dim + layout.head_dim // 2 + layout.value_dim + num_statistics
        self.mean = nn.Buffer(torch.zeros(*heads, 1, inputs))
        self.scale = nn.Buffer(torch.ones(*heads, 1, inputs))
        self.calibrated = nn.Buffer(torch.zeros((), dtype=torch.bool))
        self.weight_in = nn.Parameter(torch.randn(*heads, inputs, hidden) / math.sqrt(inputs))
        self.bias_in = nn.Parameter(torch.zeros(*heads, 1, hidden))
        self.weight_mid = nn.Parameter(torch.randn(*heads, hidden, hidden) / math.sqrt(hidden))
        self.bias_mid = nn.Parameter(torch.zeros(*heads, 1, hidden))
        self.weight_out = nn.Parameter(torch.zeros(*heads, hidden, 1))

    @abstractmethod
    def statistics(self, signals: Signals) -> Tensor:
        """Returns statistics of each slot's attention and age, float32 [B, H, N, c]."""

    def settings(self) -> dict[str, Any]:
        """See Gate; what was not chosen is left out."""
        own: dict[str, Any] = {"hidden": self.hidden, "window": self.window, "period": self.period}
        own |= {} if self.scope == "layer" else {"scope": self.scope}
        return own if self.demand is None else {**own, "demand": [len(self.demand.level), *self.demand.span]}

    def share_layers(self, num_layers: int, smallest: int, largest: int) -> LayerAllocation:
        """Returns its layer budget allocation; if it has none, makes one of so many evicting layers and slots beyond the floor.

        Warns:
            TrainedOtherwiseWarning: it has one already, for other numbers of slots; that one stays.
        """
        if self.demand is None:
            self.demand = LayerAllocation(num_layers, smallest, largest).to(self.mean.device)
        elif self.demand.span != (smallest, largest):
            warnings.warn(
                f"these gates have learned how layers share {self.demand.span[0]} to {self.demand.span[1]} slots beyond the "
                f"floor, not {smallest} to {largest}: beyond theirs, shares stay as at the end; start from gates without",
                TrainedOtherwiseWarning,
                stacklevel=2,
            )
        return self.demand

    def score(self, signals: Signals) -> Tensor:
        def scored(*parts: Tensor) -> Tensor:
            return self.score_features(signals.layer, self.features(*parts))

        return signals.per_slot(scored, max(self.num_features, self.hidden), self.statistics(signals))

    def features(self, keys: Tensor, values: Tensor, statistics: Tensor) -> Tensor:
        """Joins keys [B, H, n, d], values [B, H, n, dv] and statistics [B, H, n, c] into float32 [B, H, n, in]."""
        keys = keys.float()
        half = keys.shape[-1] // 2
        pairs = torch.hypot(keys[..., :half], keys[..., half : 2 * half])
        return torch.cat([keys, pairs, values.float(), statistics], dim=-1)

    def score_features(self, layer: int, features: Tensor) -> Tensor:
        """Returns scores [B, H, n] of features float32 [B, H, n, in]."""
        batch, heads, num, width = features.shape
        x = features.transpose(0, 1).reshape(heads, batch * num, width)  # heads lead, so weights are not copied per row
        x = (x - self.mean[layer]) / self.scale[layer]
        x = nn.functional.gelu(x @ self.weight_in[layer] + self.bias_in[layer])
        x = nn.functional.gelu(x @ self.weight_mid[layer] + self.bias_mid[layer])
        return (x @ self.weight_out[layer]).view(heads, batch, num).transpose(0, 1)

    @torch.no_grad()
    def calibrate(self, features: dict[int, Tensor], candidates: dict[int, Tensor]) -> None:
        """Centres and scales features by those of one batch, that of all processes; once, before training.

        Args:
            features: {layer: float32 [M, H, n, in]}; candidates: {layer: bool [M, H, n]}.
        """
        for layer, part in features.items():
            self.mean[layer, :, 0], self.scale[layer, :, 0] = centre_and_scale(part, candidates[layer].unsqueeze(-1))
        self.calibrated.fill_(1)

    def warn_if_trained_otherwise(self, slack: int) -> None:
        """Warns (TrainedOtherwiseWarning) of another slack than the gate was trained with."""
        if self.period not in (None, slack):
            warnings.warn(
                f"these gates were trained for an event every {self.period} tokens, not every {slack}; drop slack to use that, "
                f"or train some with --period {slack}",
                TrainedOtherwiseWarning,
                stacklevel=3,
            )
