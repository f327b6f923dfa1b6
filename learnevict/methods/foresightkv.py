"""ForesightKV: a small judge ranks cached tokens by the attention the future will pay them.

    x = [key; value; what the token has been paid so far; its age; the budget]
    score = w3 . GELU(W2 GELU(W1 x + b1) + b2)           per layer and kv head, higher stays (Section 3.2, arXiv 2602.03203)

The judge is trained to order tokens as golden eviction does (learnevict.train). Departures from the paper and its code:
features are means over queries (not sums) and their clock counts tokens (not events), so under steady attention they do not
depend on the event period; recent-window features slice the query axis; decayed and undecayed accumulators are separate
ledger columns; probabilities enter as logarithms; the size of every rotary pair is given beside the rotated key, because it
survives rotation; age and budget / length let one judge serve many budgets; two more notes, the peak so far and the tokens
since a token was last needed; two hidden layers; higher means keep. Attention is read from the last `window` queries of every
period: a judge remembers the period it was trained with, and `policy` uses that unless told otherwise; so it does with the
scope: beside the paper's equal budgets ("layer"), slots of all heads and layers may compete ("model"), or layers may get the
shares that refinement has found (`demand`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import Budget, Layout
from learnevict.errors import TrainedOtherwiseWarning
from learnevict.methods import Paper
from learnevict.parts.allocators import Together
from learnevict.parts.headwise import centre_and_scale
from learnevict.parts.layer_allocation import LayerAllocation
from learnevict.parts.learned import SlotScorer
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy
from learnevict.signals import Signals, StateColumn

PAPER = Paper("ForesightKV: learning long-term contribution for KV cache eviction", "2602.03203", 2026, "learned")
TRAINING = {"learning_rate": 3e-3}

Scope = Literal["layer", "model"]
WINDOW = 16
RECENT = (4, 8)  # the paper's 8/16/32 of a period of 128-256, scaled to a ring of 16 queries
DECAY = 0.9  # Section 3.2: per event there, per WINDOW tokens here
NEEDED = 0.02  # a probability that counts as "needed" for the idle note
SCALARS = 5  # age, length, budget / length, filled, position from the start


@dataclass(frozen=True)
class JudgeConfig:
    """Size of the judge. The paper: one hidden layer of 16; small base models afford more."""

    layout: Layout
    hidden: int = 64
    window: int = WINDOW

    @property
    def num_features(self) -> int:
        """Inputs per token: key, its rotary pair sizes, value, attention columns, scalars."""
        layout = self.layout
        group = layout.num_query_heads // layout.num_heads
        return layout.head_dim + layout.head_dim // 2 + layout.value_dim + (5 + len(RECENT)) * group + SCALARS


class ForesightGate(SlotScorer):
    """Judges of all layers and kv heads as grouped linear maps, weights [L, H, in, out].

    Args:
        layout: of the base model.
        hidden: width of the two hidden layers.
        window: past queries looked at per event.
        period: tokens between events in training; None before.
        scope: who competed in training: slots of a head ("layer"), or of all heads and layers ("model").
        demand: evicting layers, and the smallest and largest number of slots beyond the floor for which it has learned how
            these layers share a budget (parts.demand); None: they share equally.
    """

    observes = False
    refreshes = True

    def __init__(
        self,
        layout: Layout,
        hidden: int = 64,
        window: int = WINDOW,
        period: int | None = None,
        scope: Scope = "layer",
        demand: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.period = period
        self.scope: Scope = scope
        self.demand: LayerAllocation | None = None
        if demand is not None:
            self.demand = LayerAllocation(*demand)
        self.config = JudgeConfig(layout, hidden, window)
        group = layout.num_query_heads // layout.num_heads
        self.window = window
        self.columns = (
            StateColumn("paid", (group,)),
            StateColumn("decayed", (group,)),
            StateColumn("peak", (group,)),
            StateColumn("watched"),
            StateColumn("idle"),
        )
        heads, inputs = (layout.num_layers, layout.num_heads), self.config.num_features
        self.num_features = inputs
        self.mean = nn.Buffer(torch.zeros(*heads, 1, inputs))
        self.scale = nn.Buffer(torch.ones(*heads, 1, inputs))
        self.calibrated = nn.Buffer(torch.zeros((), dtype=torch.bool))
        self.weight_in = nn.Parameter(torch.randn(*heads, inputs, hidden) / math.sqrt(inputs))
        self.bias_in = nn.Parameter(torch.zeros(*heads, 1, hidden))
        self.weight_mid = nn.Parameter(torch.randn(*heads, hidden, hidden) / math.sqrt(hidden))
        self.bias_mid = nn.Parameter(torch.zeros(*heads, 1, hidden))
        self.weight_out = nn.Parameter(torch.zeros(*heads, hidden, 1))

    def settings(self) -> dict:
        """What __init__ needs to build this gate again, as JSON."""
        own = {"hidden": self.config.hidden, "window": self.config.window, "period": self.period}
        own |= {} if self.scope == "layer" else {"scope": self.scope}
        return own if self.demand is None else {**own, "demand": [len(self.demand.level), *self.demand.span]}

    def share_layers(self, num_layers: int, smallest: int, largest: int) -> LayerAllocation:
        """See SlotScorer.

        Warns:
            TrainedOtherwiseWarning: it has a demand already, for other numbers of slots; that one stays.
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

    def refresh(self, signals: Signals) -> dict[str, Tensor]:
        """Add what the last queries paid to the running notes; once per event."""
        mean, top, _ = self._paid(signals)
        notes, rows = signals.state, signals.rows
        needed = top.amax(-1) > NEEDED
        tokens = (rows.age(rows.block) + 1).view(-1, 1, 1).float()
        left = (DECAY ** (tokens / WINDOW)).unsqueeze(-1)
        return {
            "paid": notes["paid"] + tokens.unsqueeze(-1) * mean,
            "decayed": left * notes["decayed"] + (1 - left) * mean,
            "peak": torch.maximum(notes["peak"], top),
            "watched": notes["watched"] + tokens,
            "idle": torch.where(needed, 0.0, notes["idle"] + tokens),
        }

    def score(self, signals: Signals) -> Tensor:
        """float32 [B, H, N]."""
        out = torch.empty(signals.position.shape, dtype=torch.float32, device=signals.position.device)
        statistics = self.statistics(signals)
        for part, keys, values in signals.pieces(max(self.config.num_features, self.config.hidden)):
            out[:, :, part] = self.score_features(signals.layer, self.features(keys, values, statistics[:, :, part]))
        return out

    def score_features(self, layer: int, features: Tensor) -> Tensor:
        """Scores of features float32 [B, H, n, in] -> [B, H, n]."""
        batch, heads, num, width = features.shape
        x = features.transpose(0, 1).reshape(heads, batch * num, width)  # heads lead, so weights are not copied per row
        x = (x - self.mean[layer]) / self.scale[layer]
        x = nn.functional.gelu(x @ self.weight_in[layer] + self.bias_in[layer])
        x = nn.functional.gelu(x @ self.weight_mid[layer] + self.bias_mid[layer])
        return (x @ self.weight_out[layer]).view(heads, batch, num).transpose(0, 1)

    @torch.no_grad()
    def calibrate(self, features: dict[int, Tensor], candidates: dict[int, Tensor]) -> None:
        """Centre and scale inputs by what the states of one batch, that of all processes, look like; once, before training.

        Args:
            features: {layer: float32 [M, H, n, in]}; candidates: {layer: bool [M, H, n]}.
        """
        for layer, part in features.items():
            self.mean[layer, :, 0], self.scale[layer, :, 0] = centre_and_scale(part, candidates[layer].unsqueeze(-1))
        self.calibrated.fill_(1)

    def features(self, keys: Tensor, values: Tensor, statistics: Tensor) -> Tensor:
        """Join keys [B, H, n, d], values [B, H, n, dv] and statistics [B, H, n, c] into float32 [B, H, n, in]."""
        keys = keys.float()
        half = keys.shape[-1] // 2
        pairs = torch.hypot(keys[..., :half], keys[..., half : 2 * half])
        return torch.cat([keys, pairs, values.float(), statistics], dim=-1)

    def statistics(self, signals: Signals) -> Tensor:
        """What the attention and the clock say about each slot, float32 [B, H, N, c]."""
        mean, top, recent = self._paid(signals)
        notes, rows = signals.state, signals.rows
        watched = notes["watched"].unsqueeze(-1).clamp_min(1)
        attention = [mean, top, *recent, notes["paid"] / watched, notes["decayed"], notes["peak"]]
        seen = rows.seen.view(-1, 1, 1).float()
        age = signals.age.clamp_min(0).float()
        share = (signals.budget.view(-1, 1, 1).float() / seen).clamp_max(1.0)
        scalars = [
            torch.log1p(age),
            torch.log(seen).expand_as(age),
            torch.log(share).expand_as(age),
            torch.log1p(notes["idle"]),
            torch.log1p(signals.place.clamp_min(0).float()),
        ]
        return torch.cat([*(torch.log(part + 1e-4) for part in attention), torch.stack(scalars, -1)], dim=-1)

    def _paid(self, signals: Signals) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mean and maximum over the last `window` queries, and means over the last few; each [B, H, N, G]."""
        if "paid_mean" in signals.memo:
            memo = signals.memo
            return memo["paid_mean"], memo["paid_top"], [memo[f"paid_{span}"] for span in RECENT]
        batch, heads, num = signals.position.shape
        group = signals.query.shape[1] // heads
        shape = (batch, heads, group, num)
        total, top = (torch.zeros(shape, device=signals.position.device) for _ in range(2))
        recent = [torch.zeros_like(total) for _ in RECENT]
        for weights, where in signals.window(self.window):
            total += weights.sum(3)
            top = torch.maximum(top, weights.amax(3))
            for span, part in zip(RECENT, recent, strict=True):
                late = (signals.rows.age(where) < span).view(batch, 1, 1, -1, 1)
                part += (weights * late).sum(3)
        count = signals.rows.seen.clamp_max(self.window).view(-1, 1, 1, 1)
        signals.memo["paid_mean"], signals.memo["paid_top"] = (total / count).mT, top.mT
        for span, part in zip(RECENT, recent, strict=True):
            signals.memo[f"paid_{span}"] = (part / span).mT
        return self._paid(signals)


def build(layout: Layout, **settings: Any) -> ForesightGate:
    """A fresh judge for a base model."""
    return ForesightGate(layout, **settings)


def policy(
    budget: int | str | Budget,
    *,
    gate: ForesightGate,
    scope: Scope | None = None,
    floor: float = 0.2,
    **options: Unpack[Options],
) -> Policy:
    """Evict what the judge ranks lowest, every `slack` tokens (paper: 256 in training, 128 in its inference code).

    Another slack or scope than the judge was trained with is allowed, and said in a TrainedOtherwiseWarning.

    Args:
        budget: slots per (layer, kv head), for scope "model" on average over all of them: tokens, "25%" or "64MiB".
        gate: trained judges, from `Gates.from_pretrained(...)`.
        scope: "layer", as in the paper: every head holds the budget; "model": slots of all heads and layers compete, which
            takes scores that compare (a judge trained for it). None: as trained.
        floor: share of an equal split that every head keeps, for scope "model".
        **options: sinks, recent, prompt, slack, schedule; see parts.options.Options.
    """
    if gate.period is not None and options.setdefault("slack", gate.period) != gate.period:
        warnings.warn(
            f"this judge was trained for an event every {gate.period} tokens, not every {options.get('slack')}; drop slack to "
            "use that, or train one with --period",
            TrainedOtherwiseWarning,
            stacklevel=2,
        )
    if scope is not None and scope != gate.scope:
        warnings.warn(
            f"this judge was trained for scope {gate.scope!r}, not {scope!r}; drop scope to use that, or train one with "
            f"--scope {scope}",
            TrainedOtherwiseWarning,
            stacklevel=2,
        )
    if (scope or gate.scope) == "layer":
        allocator = None if gate.demand is None else gate.demand.allocator()
        return compose("foresightkv", budget, gate, allocator=allocator, **options)
    together = compose("foresightkv", budget, gate, allocator=Together(floor), **options)
    return replace(together, scope="model")
