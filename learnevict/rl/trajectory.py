"""Episodes: texts read under sampled eviction, with everything a policy gradient needs to know about every draw.

One reading of a batch runs its whole event loop; nothing is generated. Rows are copies of a text, so a group of traces of one
text is a group of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.infer.attach import attach
from learnevict.infer.teacher_forcing import prefill
from learnevict.parts.learned import SlotScorer
from learnevict.rl.distribution import NOTHING
from learnevict.rl.sampler import EventDraws, SamplingPolicy, SamplingTerms, laid_out
from learnevict.signals import NEVER, Trace


@dataclass(frozen=True)
class CandidateSets:
    """All draws of some layers: E events of B rows, R races of N slots each, K draws in a race.

    R is the number of heads of one layer, or 1 if all heads of all layers race together (then N = L * H * slots).

    Attributes:
        layers: whose slots race.
        pool: what could be drawn [B, E, R, N].
        order: slots in the order drawn, NOTHING behind the last [B, E, R, K].
        tokens: what these slots held: (layer among `layers` * H + head) * T + column of the text [B, E, R, K].
        end: column from which they are gone [B, E].
    """

    layers: tuple[int, ...]
    pool: Bool[Tensor, "B E R N"]
    order: Int[Tensor, "B E R K"]
    tokens: Int[Tensor, "B E R K"]
    end: Int[Tensor, "B E"]

    def until(self, length: Int[Tensor, "B"]) -> CandidateSets:
        """Without draws that no prediction of the row's text, of this length, comes after: its last token predicts none."""
        late = (self.end >= length.view(-1, 1) - 1)[:, :, None, None]
        return replace(
            self,
            pool=self.pool & ~late,
            order=self.order.masked_fill(late, NOTHING),
            tokens=self.tokens.masked_fill(late, NOTHING),
        )

    def scores(self, by_layer: dict[int, Tensor]) -> Float[Tensor, "b E R N"]:
        """Scores of heads, {layer: [b, E, H, n]}, laid out as the races are."""
        return laid_out([by_layer[layer] for layer in self.layers], 0.0)


@dataclass(frozen=True)
class Trajectory:
    """The draws of a batch of traces, and what the judge saw.

    Attributes:
        terms: the rules.
        features: {layer: [B, E, H, n, in]}.
        races: of layers.
        tried: logits of the layers' shares that each row was held to [B, L]; None: no others than the judge's own.
        rows: B.
    """

    terms: SamplingTerms
    features: dict[int, Tensor]
    races: list[CandidateSets]
    tried: Tensor | None
    rows: int


@dataclass(frozen=True)
class TextTrajectory(Trajectory):
    """An episode over given texts, with the base's logits along its traces."""

    logits: Float[Tensor, "B T V"]
    trace: Trace


@torch.no_grad()
def sample_trajectory(
    model: PreTrainedModel,
    judge: SlotScorer,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"],
    terms: SamplingTerms,
    *,
    noisy: Bool[Tensor, "L B"] | None = None,
    words: Int[Tensor, "B"] | None = None,
) -> TextTrajectory:
    """Sample one trace per row.

    Args:
        model: the frozen base.
        judge: whose scores the draws follow.
        input_ids, attention_mask: texts, padded on the left; give a text several times for a group.
        terms: the rules.
        noisy: layers and rows in which draws are random (with scope "model": rows, if any layer is); default all.
        words: what each row's noise is hashed from (ops.hashing); default the row's index.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    noisy = torch.ones(layers, len(input_ids), dtype=torch.bool) if noisy is None else noisy
    words = torch.arange(len(input_ids), device=input_ids.device) if words is None else words
    explorer = SamplingPolicy(terms, judge, noisy.to(input_ids.device), input_ids.shape[1], words)
    with attach(model, explorer, record=True) as cache:
        logits = prefill(model, cache, input_ids, attention_mask)
    reading = TextTrajectory(*gathered(explorer), logits, cache.trace())
    length = torch.full_like(input_ids[:, 0], input_ids.shape[1])
    return replace(reading, races=[one.until(length) for one in reading.races])


def gathered(
    explorer: SamplingPolicy,
) -> tuple[SamplingTerms, dict[int, Tensor], list[CandidateSets], Tensor | None, int]:
    """What an explorer has taken down: the fields of an Trajectory."""
    features = {layer: side_by_side(parts, 2, 0.0) for layer, parts in sorted(explorer.features.items())}
    races = [stacked(names, events) for names, events in sorted(explorer.events.items())]
    return explorer.terms, features, races, explorer.tried, len(explorer.words)


def stacked(layers: tuple[int, ...], events: list[EventDraws]) -> CandidateSets:
    """Events as one tensor each, behind the rows; slots and draws are padded to the most of any event."""
    width = max(event.width for event in events)
    alike = [event.widened(width, joint=len(layers) > 1) for event in events]
    return CandidateSets(
        layers,
        side_by_side([event.pool for event in alike], 2, False),
        side_by_side([event.order for event in alike], 2, NOTHING),
        side_by_side([event.tokens for event in alike], 2, NOTHING),
        torch.stack([event.end for event in alike], dim=1),
    )


def side_by_side(parts: Sequence[Tensor], dim: int, fill: float) -> Tensor:
    """Tensors [B, ...] that differ along `dim`, padded and stacked behind the rows."""
    width = max(part.shape[dim] for part in parts)

    def padded(part: Tensor) -> Tensor:
        shape = list(part.shape)
        shape[dim] = width - shape[dim]
        return torch.cat([part, part.new_full(shape, fill)], dim)

    return torch.stack([padded(part) for part in parts], dim=1)


def expired(trace: Trace) -> Tensor:
    """Expiry with NEVER as the length of the text, int64 [L, B, H, T]."""
    return torch.where(trace.expiry == NEVER, trace.expiry.shape[-1], trace.expiry).long()
