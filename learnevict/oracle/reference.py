"""What policies are measured against on a batch of texts: the full cache, its labels, random and golden eviction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.infer.teacher_forcing import replay
from learnevict.oracle.collect import golden_labels
from learnevict.oracle.reducers import horizon
from learnevict.oracle.traces import Roll, unpadded_positions
from learnevict.policy import Governor, Guard, WrappedScorer
from learnevict.signals import NEVER, Signals, Trace


@dataclass(frozen=True)
class Reference:
    """What the full cache makes of a batch of texts; one serves every policy measured on them.

    Attributes:
        input_ids, attention_mask: [B, T], padded on the left by multiples of the block (see `align`), on the right by the rest.
        prompt: int64 [B], real tokens of prompts.
        loss_mask: bool [B, T], tokens whose loss counts.
        block: tokens between events.
        layers: indices of evicting layers.
        labels: golden labels of those, [L, B, H, T, M].
        loss: summed loss of each row with the full cache, float64 [B].
        bounds: losses that `losses_between` remembers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt: Tensor
    loss_mask: Tensor
    block: int
    layers: list[int]
    labels: Tensor
    loss: Tensor
    bounds: dict[tuple[bytes, Guard], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"] | None = None,
        *,
        block: int,
        prompt_length: Sequence[int] | Int[Tensor, "B"] | None = None,
        loss_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Reference:
        """Makes the reference by one full-cache pass.

        Args:
            attention_mask: 0 = padding, on the left.
            block: the event period of the policies to come.
            prompt_length: real tokens of each prompt; default none.
            loss_mask: tokens whose loss counts; default all real ones after the prompt.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if loss_mask is None:
            begins = torch.zeros(len(mask)) if prompt_length is None else torch.as_tensor(prompt_length)
            loss_mask = mask.bool() & (mask.cumsum(-1) > begins.to(mask.device).clamp_min(1).unsqueeze(-1))
        input_ids, mask, loss_mask = align(block, mask, input_ids, mask, loss_mask)
        found, logits = golden_labels(model, input_ids, mask, block=block)
        layers = [index for index, part in enumerate(found) if part is not None]
        prompt = torch.zeros(len(input_ids), dtype=torch.int64) if prompt_length is None else prompt_length
        prompt = torch.as_tensor(prompt, device=input_ids.device).long()
        labels = torch.stack([part for part in found if part is not None])
        return cls(input_ids, mask, prompt, loss_mask, block, layers, labels, losses(logits, input_ids, loss_mask))

    @cached_property
    def position(self) -> Tensor:
        """Returns the unpadded position of each token, -1 for padding, int64 [B, T]."""
        return unpadded_positions(self.attention_mask.bool())

    @cached_property
    def future(self) -> Tensor:
        """Returns the largest label of blocks m, m + 1, ...; [L, B, H, T, M + 1], zeros behind the end."""
        return torch.nn.functional.pad(horizon(self.labels), (0, 1))

    @cached_property
    def random_scores(self) -> Tensor:
        """Returns a fixed random number for every token of a layer and head, wherever padding puts it: [L, B, H, T]."""
        layers, _, heads, length, _ = self.labels.shape
        drawn = torch.rand(length, layers, heads, generator=torch.Generator().manual_seed(0)).to(self.labels.device)
        where = self.position.clamp_min(0).unsqueeze(1).expand(-1, heads, -1)
        return torch.stack([part.expand(len(where), -1, -1).gather(-1, where) for part in drawn.permute(1, 2, 0)])

    def roll(self, expiry: Int[Tensor, "L B H T"], guard: Guard) -> Roll:
        """Returns uniform eviction under these guards that holds as many slots, on average over heads, as a policy has held."""
        ends = [(m + 1) * self.block for m in range(self.labels.shape[-1])]
        held = [held_after(expiry, self.position, seen).double().mean((0, 2)).ceil().long() for seen in ends]
        prompt = self.prompt if guard.prompt else torch.zeros_like(self.prompt)
        shape = (self.labels.shape[0], self.labels.shape[2])
        return Roll(self.position, torch.stack(held, -1), shape, self.block, guard, prompt)

    def losses_between(self, model: PreTrainedModel, roll: Roll) -> tuple[Tensor, Tensor]:
        """Returns losses of each row under random and under golden eviction, float64 [B] each; they are remembered."""
        key = (roll.limit.cpu().numpy().tobytes(), Guard(roll.guard.sinks, roll.guard.recent, roll.guard.prompt))
        if key not in self.bounds:
            chance = self.replayed(model, roll.trace(lambda m, _: self.random_scores))
            self.bounds[key] = (chance, self.replayed(model, roll.trace(lambda m, _: self.future[..., m + 1])))
        return self.bounds[key]

    @torch.no_grad()
    def replayed(self, model: PreTrainedModel, trace: Trace) -> Tensor:
        """Returns loss of each row under a trace of the evicting layers."""
        shape = (model.config.get_text_config(decoder=True).num_hidden_layers, *trace.expiry.shape[1:])
        whole = trace.expiry.new_full(shape, NEVER)
        whole[self.layers] = trace.expiry
        logits = replay(model, self.input_ids, Trace(whole), self.attention_mask).logits
        return losses(logits, self.input_ids, self.loss_mask)


def held_after(expiry: Int[Tensor, "L B H T"], position: Int[Tensor, "B T"], seen: int) -> Int[Tensor, "L B H"]:
    """Returns slots held right after the event at `seen` tokens; rows that are shorter hold anything."""
    end = (position == seen - 1).int().argmax(-1) + 1
    return ((expiry > end[:, None, None]) & ((position >= 0) & (position < seen)).unsqueeze(1)).sum(-1)


def align(block: int, attention_mask: Int[Tensor, "B T"], *parts: Tensor) -> list[Tensor]:
    """Returns parts [B, T] of left-padded texts, rows moved to the left by less than a block and filled up with zeros.

    Events then fall at the same columns in all rows; a policy that decides when all layers have run needs a forward for each.
    """
    column = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    source = column + attention_mask.long().argmax(-1, keepdim=True) % block
    inside = source < len(column)
    return [part.gather(1, source.clamp_max(len(column) - 1)) * inside for part in parts]


def token_losses(logits: Float[Tensor, "B T V"], input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Returns the loss of the next token in nats, float32, in the column that predicts it; 0 in the last column."""
    found = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    )
    return torch.nn.functional.pad(found.view(len(input_ids), -1), (0, 1))


def losses(
    logits: Float[Tensor, "B T V"], input_ids: Int[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """Returns the summed loss of each row's tokens of the loss mask, float64."""
    return (token_losses(logits, input_ids)[:, :-1] * loss_mask[:, 1:]).double().sum(-1)


@dataclass(frozen=True)
class EventScores:
    """The scores of one layer at one event: position int32 and scores float32 [B, H, N], now int32 [B], the last token read."""

    layer: int
    position: Tensor
    scores: Tensor
    now: Tensor


@dataclass(frozen=True)
class RecordingScorer(WrappedScorer):
    """A scorer that appends its scores to a list."""

    recorded: list[EventScores] = field(default_factory=list)

    def score(self, signals: Signals) -> Tensor:
        """See Scorer."""
        scores = self.scorer.score(signals)
        event = EventScores(signals.layer, signals.position.clone(), scores.detach().float(), signals.rows.now)
        self.recorded.append(event)
        return scores


def recording(policy: Governor) -> tuple[Governor, list[EventScores]]:
    """Returns the same policy, and a list that fills with its scorer's scores; it stays empty if none is asked (a Rule)."""
    recorder = RecordingScorer(policy.scorer)
    return replace(policy, scorer=recorder), recorder.recorded
