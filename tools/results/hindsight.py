"""Traces made with hindsight, replayed on a batch of texts: what any label would have kept, and what that costs.

TextBatch are short and padded on the right, so attention is held as [T, T] and columns are ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learnevict.errors import UsageError
from learnevict.evals.methods import EvaluationSettings
from learnevict.evals.tasks import TextBatch
from learnevict.evals.teacher_forced import Columns, score
from learnevict.infer.teacher_forcing import replay
from learnevict.oracle import Received, full_trace
from learnevict.oracle.reference import held_after, token_losses
from learnevict.oracle.traces import EQUAL, Roll, Share, golden, roll_of
from learnevict.signals import Trace


class Case:
    """A batch of texts at one budget, and the model's full-cache run over them.

    Args:
        texts: padded on the right, see `from_the_left`.
        budget: mean slots per layer and kv head.
        settings: event period and guards.
    """

    def __init__(self, model: Any, texts: TextBatch, budget: int, settings: EvaluationSettings) -> None:
        self.model, self.texts, self.budget, self.settings = model, texts, budget, settings
        self.valid = texts.attention_mask.bool()
        self.logits, self.received = self.run(full_trace(model, texts.input_ids))
        self.group = self.received[0].query.shape[1] // self.received[0].key.shape[1]

    @torch.no_grad()
    def run(self, trace: Trace) -> tuple[Tensor, list[Received]]:
        """Returns logits under a trace, and what each layer's attention was given."""
        seen: list[Received] = []

        ids, mask = self.texts.input_ids, self.texts.attention_mask
        return replay(self.model, ids, trace, mask, observe=lambda _, received: seen.append(received)).logits, seen

    def losses(self, logits: Tensor) -> Tensor:
        """Returns the loss of every response token at the query that predicts it, [B, T]."""
        return token_losses(logits, self.texts.input_ids) * torch.nn.functional.pad(self.texts.loss_mask[:, 1:], (0, 1))

    def attention(self, received: list[Received], trace: Trace | None = None) -> Iterator[Tensor]:
        """Yields attention [B, H, G, T, T] of every layer; with a trace, what a token gets or would get beside what is left."""
        column = torch.arange(self.valid.shape[1])
        for layer, one in enumerate(received):
            query = one.query.unflatten(1, (-1, self.group))
            scores = one.attention.scores(query @ one.key.unsqueeze(2).mT)
            scores = scores.masked_fill(column > column[:, None], -torch.inf)
            if trace is None:
                yield scores.softmax(-1)
                continue
            left = column[:, None] < trace.expiry[layer][:, :, None, None]
            total = scores.masked_fill(~left, -torch.inf).logsumexp(-1, keepdim=True)
            yield (scores - torch.where(left, total, torch.logaddexp(total, scores))).exp()

    def pooled(self, attention: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns the mean over the real queries of every block and over the group: [B, H, T, M]."""
        real = self.valid.float()
        parts = (
            torch.arange(real.shape[1]) // self.settings.block
            == torch.arange(-(-real.shape[1] // self.settings.block))[:, None]
        )
        share = real.unsqueeze(-1) * parts.T
        share = share / share.sum(1, keepdim=True).clamp_min(1)
        if weight is not None:
            share = share * weight.unsqueeze(-1)
        return attention.mean(2).mT @ share.unsqueeze(1)

    def labels(self, change: Callable[[Tensor, Received, int], Tensor] | None = None, **how: Any) -> Tensor:
        """Returns block labels [L, B, H, T, M]; `how`: received, trace (see attention), weight of queries [B, T]."""
        received, weight = how.get("received", self.received), how.get("weight")
        maps = enumerate(zip(self.attention(received, how.get("trace")), received, strict=True))
        found = [self.pooled(p if change is None else change(p, one, layer), weight) for layer, (p, one) in maps]
        return torch.stack(found)

    @cached_property
    def golden_labels(self) -> Tensor:
        """ForesightKV's labels, [L, B, H, T, M]."""
        return self.labels()

    @cached_property
    def golden(self) -> Trace:
        """Returns the trace of uniform golden eviction."""
        return self.follow(self.golden_labels)

    def roll(self) -> Roll:
        """Returns how traces are made here."""
        shape = (len(self.received), self.received[0].key.shape[1])
        return roll_of(self.valid, shape, **self.terms)

    @property
    def reserved(self) -> int:
        """Returns the slots of guards and a fresh block."""
        return self.settings.guard.reserved(self.settings.block)

    @property
    def terms(self) -> dict[str, Any]:
        """Returns what all traces are made under."""
        return {"budget": self.budget, "block": self.settings.block, "guard": self.settings.guard}

    def follow(self, labels: Tensor, kind: Any = "max", share: Share = EQUAL) -> Trace:
        """Returns golden eviction by these labels."""
        return golden(list(labels), share=share, horizon=kind, valid=self.valid, **self.terms)

    def follow_future(self, future: Tensor) -> Trace:
        """Returns the same for scores that are already reduced over the future: entry m is over blocks m, m + 1, ..."""
        future = torch.nn.functional.pad(future, (0, 1))
        return self.roll().trace(lambda m, _: future[..., m + 1])

    def measure(self, trace: Trace) -> Columns:
        """Returns what the texts cost under a trace."""
        return score(self.texts, self.run(trace)[0])


def from_the_left(texts: TextBatch) -> TextBatch:
    """Returns the same texts, padded on the right."""
    length = texts.input_ids.shape[1]
    pad = length - texts.attention_mask.sum(-1, keepdim=True)
    column = (torch.arange(length, device=pad.device) + pad) % length
    parts = (texts.input_ids, texts.attention_mask, texts.answer_mask, texts.loss_mask)
    ids, mask, answers, losses = (part.gather(1, column) for part in parts)
    return TextBatch(ids, mask, answers, losses, texts.prompt_length)


# --- what one query says of one key: attention [B, H, G, T, T] and what its layer was given ---


def distance(p: Tensor, one: Received, layer: int) -> Tensor:
    """Returns |v - o| for every query and key, [B, H, G, T, T]."""
    value = one.value.unsqueeze(2)
    output = p @ value
    square = value.square().sum(-1).unsqueeze(-2) + output.square().sum(-1, keepdim=True) - 2 * output @ value.mT
    return square.clamp_min(0).sqrt()


def caote(p: Tensor, one: Received, layer: int) -> Tensor:
    """Returns the change of the output if the key goes."""
    return p / (1 - p).clamp_min(1e-3) * distance(p, one, layer)


def contribution(case: Case, p: Tensor, one: Received, layer: int) -> Tensor:
    """Returns attention x |W_O v|."""
    weight = case.model.model.layers[layer].self_attn.o_proj.weight.detach()
    heads = weight.unflatten(1, (one.key.shape[1], case.group, -1))
    return p * torch.einsum("ehgd,bhtd->bhget", heads, one.value).norm(dim=3).unsqueeze(3)


def by_value(p: Tensor, one: Received, layer: int) -> Tensor:
    """Returns attention x |v|."""
    return p * one.value.norm(dim=-1)[:, :, None, None]


def largest(p: Tensor, one: Received, layer: int) -> Tensor:
    """Returns the attention of the query head of the group that attends most."""
    return p.amax(2, keepdim=True)


def profile(trace: Trace, position: Int[Tensor, "B T"]) -> Float[Tensor, "L H"]:
    """Returns the mean slots that each head holds right after events, over rows and events at which the whole budget is held.

    Raises:
        UsageError: nothing was evicted.
    """
    assert trace.budget is not None
    assert trace.period is not None
    expiry = trace.expiry
    position = position.to(expiry.device)
    total, count = torch.zeros(expiry.shape[0], expiry.shape[2], device=expiry.device), 0
    for seen in range(trace.period, int(position.max()) + 2, trace.period):
        held = held_after(expiry, position, seen).float()
        full = (position == seen - 1).any(-1) & (held.mean((0, 2)) >= trace.budget - 0.5)
        total, count = total + held[:, full].sum(1), count + int(full.sum())
    if not count:
        raise UsageError(f"the texts are too short for a budget of {trace.budget}: nothing was evicted")
    return total / count


def slots_of(free: Float[Tensor, "L H"], budget: int, reserved: int) -> Int[Tensor, "L H"]:
    """Returns whole slots per head with mean `budget`: those reserved for guards and a fresh block, the rest in proportion
    to `free`."""
    rest = (budget - reserved) * free.numel()
    exact = free.double().clamp_min(0)
    exact = exact / exact.sum() * rest
    whole = exact.floor()
    more = (whole - exact).flatten().argsort(stable=True)[: rest - int(whole.sum())]
    whole.view(-1)[more] += 1
    return reserved + whole.long()
