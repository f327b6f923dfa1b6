"""Trajectories: texts read under sampled eviction, with everything a policy gradient needs to know about every eviction.

One forward of a batch runs its whole event loop; nothing is generated. Rows are copies of a text, so a group of traces of one
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
from learnevict.parts.slot_scorer import SlotScorer
from learnevict.rl.config import RefineConfig
from learnevict.rl.distribution import NOTHING
from learnevict.rl.sampler import SampledEvent, SamplingPolicy, side_by_side
from learnevict.signals import NEVER, Trace


@dataclass(frozen=True)
class CandidateSets:
    """All evictions of some layers: E events of B rows, R candidate sets of N slots each, K evictions from a set.

    R is the number of heads of one layer, or 1 if all heads of all layers compete (then N = L * H * slots).

    Attributes:
        layers: whose slots compete.
        candidates: slots that could be evicted [B, E, R, N].
        permutation: slots in the order in which they were sampled, NOTHING behind the last [B, E, R, K].
        tokens: what these slots held: (layer among `layers` * H + head) * T + column of the text [B, E, R, K].
        end: column from which they are gone [B, E].
    """

    layers: tuple[int, ...]
    candidates: Bool[Tensor, "B E R N"]
    permutation: Int[Tensor, "B E R K"]
    tokens: Int[Tensor, "B E R K"]
    end: Int[Tensor, "B E"]

    def until(self, length: Int[Tensor, "B"]) -> CandidateSets:
        """Returns the sets without evictions after which nothing of the row's text, of this length, is predicted."""
        late = (self.end >= length.view(-1, 1) - 1)[:, :, None, None]
        return replace(
            self,
            candidates=self.candidates & ~late,
            permutation=self.permutation.masked_fill(late, NOTHING),
            tokens=self.tokens.masked_fill(late, NOTHING),
        )

    def scores(self, by_layer: dict[int, Tensor]) -> Float[Tensor, "b E R N"]:
        """Returns the scores of heads, {layer: [b, E, H, n]}, laid out as the sets are."""
        return side_by_side([by_layer[layer] for layer in self.layers], 0.0)


@dataclass(frozen=True)
class Trajectory:
    """The evictions of a batch of traces, and what the scorer saw.

    Attributes:
        config: settings.
        budget: slots per (layer, kv head).
        random_keys: one per row [B].
        features: {layer: [B, E, H, n, in]}.
        sets: of layers.
        allocation: logits of the layers' budget allocation that each row was held to [B, L]; None: the scorer's own.
    """

    config: RefineConfig
    budget: int
    random_keys: Int[Tensor, "B"]
    features: dict[int, Tensor]
    sets: list[CandidateSets]
    allocation: Tensor | None


@dataclass(frozen=True)
class TextTrajectory(Trajectory):
    """A trajectory over given texts, with the base's logits along its traces."""

    logits: Float[Tensor, "B T V"]
    trace: Trace


@torch.no_grad()
def sample_trajectory(
    model: PreTrainedModel,
    scorer: SlotScorer,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"],
    config: RefineConfig,
    budget: int,
    *,
    noisy: Bool[Tensor, "L B"] | None = None,
    random_keys: Int[Tensor, "B"] | None = None,
) -> TextTrajectory:
    """Samples one trace per row.

    Args:
        model: the frozen base.
        scorer: whose scores are sampled from.
        input_ids, attention_mask: texts, padded on the left; give a text several times for a group.
        config: settings.
        budget: slots per (layer, kv head).
        noisy: layers and rows in which evictions are random (with scope "model": rows, if any layer is); default all.
        random_keys: what each row's noise is hashed from (ops.random); default the row's index.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    noisy = torch.ones(layers, len(input_ids), dtype=torch.bool) if noisy is None else noisy
    keys = torch.arange(len(input_ids), device=input_ids.device) if random_keys is None else random_keys
    sampler = SamplingPolicy(config, budget, scorer, noisy.to(input_ids.device), input_ids.shape[1], keys)
    with attach(model, sampler, record=True) as cache:
        logits = prefill(model, cache, input_ids, attention_mask)
    found = recorded(sampler, torch.full_like(input_ids[:, 0], input_ids.shape[1]))
    return TextTrajectory(**vars(found), logits=logits, trace=cache.trace())


def recorded(sampler: SamplingPolicy, length: Int[Tensor, "B"]) -> Trajectory:
    """Returns what a policy has recorded, of texts of these lengths."""
    features = {layer: stack_padded(parts, 0.0) for layer, parts in sorted(sampler.features.items())}
    sets = [stack_events(names, events).until(length) for names, events in sorted(sampler.events.items())]
    return Trajectory(sampler.config, sampler.num_slots, sampler.random_keys, features, sets, sampler.allocation)


def stack_events(layers: tuple[int, ...], events: list[SampledEvent]) -> CandidateSets:
    """Stacks events behind the rows; slots and evictions are padded to the most of any event."""
    width = max(event.width for event in events)
    events = [event.widened(width, joint=len(layers) > 1) for event in events]
    return CandidateSets(
        layers,
        stack_padded([event.candidates for event in events], False),
        stack_padded([event.permutation for event in events], NOTHING),
        stack_padded([event.tokens for event in events], NOTHING),
        torch.stack([event.end for event in events], dim=1),
    )


def stack_padded(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Stacks tensors [B, H, n, ...] behind the rows, padded to the largest n."""
    rows, heads, _, *rest = parts[0].shape
    whole = parts[0].new_full((rows, len(parts), heads, max(part.shape[2] for part in parts), *rest), fill)
    for event, part in enumerate(parts):
        whole[:, event, :, : part.shape[2]] = part
    return whole


def expired(trace: Trace) -> Tensor:
    """Returns expiry with NEVER as the length of the text, int64 [L, B, H, T]."""
    return torch.where(trace.expiry == NEVER, trace.expiry.shape[-1], trace.expiry).long()
