"""Trainer for gates that ask: what soft tokens attend to at a moment is compared with what the text attends to after it.

The base reads a text without gradient into a cache from which nothing is evicted; at some moments the probe is asked, through
the same code as in inference, with gradient through the frozen base. Tokens of the text never depend on the probe, so they
are read once for all moments. AlignedTexts are aligned at the ends of their prompts, so that one forward asks all
rows there; moments
are counted from there, and are the same in all processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.errors import DataError, UsageError
from learnevict.infer.attach import attach
from learnevict.infer.probe import ask
from learnevict.infer.teacher_forcing import replay
from learnevict.methods import full
from learnevict.ops.distributed import highest, ratio
from learnevict.oracle import PRESETS, Received, Reducers, full_trace, future_attention, receiving
from learnevict.parts.probes import SoftTokens
from learnevict.train.batch_random import Draws
from learnevict.train.losses import objectives
from learnevict.train.trainer import GateTrainer

OBJECTIVES = {"mse": objectives.attention_error, "kl": objectives.attention_divergence}
"""By name: from attention of the probe and of the response [B, H, G, N], and rows that count [B], to a loss."""
READ_BLOCK = 512
"""Queries that meet the full cache at a time."""


@dataclass(frozen=True)
class ProbeConfig:
    """What a probe learns from.

    Attributes:
        period: tokens between events, and the fewest that are worth a question.
        response: tokens after the prompt that count as the response (LookaheadKV: 512).
        cuts: other moments per batch at which the probe is asked, on the event grid of one of its texts; 0 as in the papers.
        horizon: tokens after such a moment that count as the response.
    """

    period: int = 16
    response: int = 512
    cuts: int = 2
    horizon: int = 64

    def __post_init__(self) -> None:
        if min(self.period, self.response, self.horizon) < 1 or self.cuts < 0:
            raise UsageError(
                f"period={self.period}, response={self.response}, horizon={self.horizon}, cuts={self.cuts}: give at least 1 "
                "token each, and 0 cuts or more"
            )


@dataclass(frozen=True)
class AlignedTexts:
    """A batch whose prompts end in one column, padded on both sides.

    Attributes:
        ids: int64 [B, T]; valid bool [B, T], False for padding.
        start: column of the first token after the prompts.
        first, end: column of each row's first token, and the one behind its last.
    """

    ids: Int[Tensor, "B T"]
    valid: Bool[Tensor, "B T"]
    start: int
    first: list[int]
    end: list[int]

    @classmethod
    def align(
        cls, input_ids: Int[Tensor, "B S"], attention_mask: Tensor, prompt_length: Int[Tensor, "B"]
    ) -> AlignedTexts:
        """From texts that are padded anywhere."""
        real = attention_mask.bool()
        in_order = input_ids.gather(1, (~real).to(torch.int8).argsort(dim=-1, stable=True))
        lengths = real.sum(-1)
        prompts = prompt_length.to(lengths).minimum(lengths)
        start, after = int(prompts.max()), int((lengths - prompts).max())
        rank = torch.arange(start + after, device=input_ids.device) - (start - prompts).unsqueeze(-1)
        valid = (rank >= 0) & (rank < lengths.unsqueeze(-1))
        ids = in_order.gather(1, rank.clamp(0, input_ids.shape[1] - 1)) * valid
        first: list[int] = (start - prompts).tolist()
        return cls(ids, valid, start, first, (start - prompts + lengths).tolist())


@dataclass(frozen=True)
class Cut:
    """A moment at which the probe is asked: after so many columns, about the next `horizon` tokens, of some rows.

    Attributes:
        column: columns read.
        horizon: tokens after it that count as the response.
        rows: bool [B], those that have been read long enough and go on; all of them may be another process's.
    """

    column: int
    horizon: int
    rows: Bool[Tensor, "B"]


def draw_cuts(texts: AlignedTexts, config: ProbeConfig, draws: Draws) -> list[Cut]:
    """The ends of prompts and random moments of random rows, in order; as many in all processes.

    Raises:
        DataError: no text goes on after `period` tokens.
    """
    device, width = texts.ids.device, texts.ids.shape[1]
    first, end = (torch.tensor(columns, device=device) for columns in (texts.first, texts.end))
    events = (end - first - 1) // config.period
    horizons = {0: config.response}  # by tokens after the prompts
    for cut in range(config.cuts):
        event = 1 + (draws.per_row(cut, 0) * events).long()
        moment = draws.one_of(first - texts.start + event * config.period, events > 0, cut, 1)
        if moment is not None:
            horizons.setdefault(moment, config.horizon)
    cuts: list[Cut] = []
    for moment, horizon in sorted(horizons.items()):
        column = min(max(texts.start + moment, 1), width)
        rows = (first + config.period <= column) & (column < end)
        if highest(int(rows.any()), device):
            cuts.append(Cut(column, horizon, rows))
    if not cuts:
        raise DataError(
            f"a batch without a text that goes on after {config.period} tokens, or after its prompt; leave out shorter texts, "
            "or give --cuts for texts without a prompt"
        )
    return cuts


@torch.no_grad()
def foresee(
    base: PreTrainedModel, texts: AlignedTexts, cuts: list[Cut], reduce: Reducers
) -> list[dict[int, Float[Tensor, "B Hq n"]]]:
    """What the responses attend to, from one pass: for each cut and layer, of the columns before it."""
    found: list[dict[int, Tensor]] = [{} for _ in cuts]
    column = torch.arange(texts.ids.shape[1], device=texts.ids.device)

    def see(layer: int, received: Received) -> None:
        attention = received.attention
        for cut, wanted in zip(cuts, found, strict=True):
            labels = future_attention(
                received.query,
                received.key,
                block=len(column),
                valid=texts.valid,
                reduce=reduce,
                scaling=attention.scaling,
                softcap=attention.softcap,
                sinks=attention.sinks,
                queries=texts.valid & (column >= cut.column) & (column < cut.column + cut.horizon),
                keys=texts.valid & (column < cut.column) if reduce.needs_keys else None,
            )
            wanted[layer] = labels[:, :, : cut.column, 0]

    trace = full_trace(base, texts.ids)
    replay(base, texts.ids, trace, texts.valid.long(), observe=receiving(see), logits_to_keep=1)
    return found


def question_batch(
    gate: SoftTokens, base: PreTrainedModel, texts: AlignedTexts, cuts: list[Cut], wanted: list[dict[int, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Read the texts, ask at every cut, and compare.

    Returns:
        loss, mean over cuts and layers; and hits, the share of the quarter that the responses attend to most which is
        also the probe's.
    """
    objective = OBJECTIVES[gate.objective]
    mask, losses, hits, before = texts.valid.long(), [], [], 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    with attach(base, full.policy(slack=READ_BLOCK)) as cache:
        for cut, answers in zip(cuts, wanted, strict=True):
            part = slice(before, cut.column)
            if before < cut.column:
                with torch.no_grad():
                    base(
                        input_ids=texts.ids[:, part], attention_mask=mask[:, : cut.column],
                        position_ids=places[:, part], past_key_values=cache, logits_to_keep=1,
                    )  # fmt: skip
            for layer, asked in ask(base, cache, gate).items():
                attention = gate.attention(asked)
                response = at_slots(answers[layer], cache.positions(layer))
                losses.append(objective(attention, response, cut.rows))
                hits.append(hit_rate(attention.detach(), response, cut.rows))
            before = cut.column
    return torch.stack(losses).mean(), torch.stack(hits).mean()


def at_slots(labels: Float[Tensor, "B Hq n"], position: Int[Tensor, "B H N"]) -> Float[Tensor, "B H G N"]:
    """Labels of columns as labels of the slots that hold them, 0 where empty."""
    grouped = labels.unflatten(1, (position.shape[1], -1))
    index = position.clamp_min(0).long().unsqueeze(2).expand(-1, -1, grouped.shape[2], -1)
    return grouped.gather(-1, index) * (position >= 0).unsqueeze(2)


def hit_rate(
    probe: Float[Tensor, "B H G N"], response: Float[Tensor, "B H G N"], rows: Bool[Tensor, "B"]
) -> Float[Tensor, ""]:
    """Share of the best quarter of slots by the response, group means, that is among the best quarter by the probe."""
    most = max(1, probe.shape[-1] // 4)
    marks = [
        torch.zeros_like(part[:, :, 0], dtype=torch.bool).scatter_(-1, part.mean(2).topk(most).indices, value=True)
        for part in (probe, response)
    ]
    found, wanted = ((part.sum((1, 2)) * rows).sum() for part in (marks[0] & marks[1], marks[1]))
    return ratio(found.float(), wanted)


class ProbeTrainer(GateTrainer):
    """Mode "probe": soft tokens learn to attend to what responses attend to.

    Fresh soft tokens start from the base's embeddings of evenly spaced entries of its vocabulary.

    Args:
        probe: what to learn from.

    Raises:
        DataError: while training, a batch of texts too short to ask about.
    """

    def __init__(self, *args: Any, probe: ProbeConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.probe = probe
        gate: SoftTokens = self.gate
        if not bool(gate.started):
            embed: Any = self.base.get_input_embeddings()
            spaced = torch.linspace(0, embed.weight.shape[0] - 1, len(gate.embeddings), device=embed.weight.device)
            with torch.no_grad():
                gate.start_from(embed(spaced.long()))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the gate's objective, mean over moments, layers, query heads and rows."""
        texts = AlignedTexts.align(inputs["input_ids"], inputs["attention_mask"], inputs["prompt_length"])
        cuts = draw_cuts(texts, self.probe, self.draws(len(texts.ids)))
        wanted = foresee(self.base, texts, cuts, PRESETS[self.gate.oracle])
        loss, hits = model(question_batch, self.base, texts, cuts, wanted)
        self.note(hits=hits)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss
