"""Mode "probe": what lookahead queries (soft tokens) attend to is compared with what the text attends to after them.

The base reads a text without gradient into a full cache; at some columns the probe's tokens are run, by inference's own code,
with gradient through the frozen base. Texts are aligned at the ends of their prompts, so that one forward serves all rows;
columns are counted from there, and are the same in all processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from learnevict.errors import DataError
from learnevict.infer.attach import attach
from learnevict.infer.probe import probe_attention
from learnevict.infer.teacher_forcing import replay
from learnevict.methods import full
from learnevict.ops.distributed import highest, ratio
from learnevict.oracle import PRESETS, Received, Reducers, full_trace
from learnevict.oracle.collect import layer_labels
from learnevict.parts.probes import SoftTokens
from learnevict.train.batch_random import BatchRandom
from learnevict.train.losses import objectives
from learnevict.train.run.flags import check_fields, flag
from learnevict.train.trainer import GateTrainer
from learnevict.train.trainers.layer_batch import UnpaddedPositions

OBJECTIVES = {"mse": objectives.attention_error, "kl": objectives.attention_divergence}
"""Losses by name, of the attention of the probe and of the response [B, H, G, N], and rows that count [B]."""
READ_BLOCK = 512
"""Queries that read the full cache at a time."""


@dataclass(frozen=True)
class ProbeConfig:
    """The settings of mode "probe"."""

    period: int = flag(16, "tokens between events, and the fewest before a probe")
    response: int = flag(512, "tokens after the prompt that count as the response (LookaheadKV: 512)")
    cuts: int = flag(2, "further probes per batch, at events of one of its texts; 0 as in the papers", least=0)
    horizon: int = flag(64, "tokens after such an event that count as the response")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def shortest(self) -> int:
        """The tokens that a document needs at least."""
        return self.period + 1


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
        """Returns texts, padded anywhere before, aligned at the ends of their prompts."""
        unpadded = UnpaddedPositions.of(input_ids, attention_mask.bool())
        lengths, prompts = unpadded.length, prompt_length.to(unpadded.length).minimum(unpadded.length)
        start, after = int(prompts.max()), int((lengths - prompts).max())
        index = torch.arange(start + after, device=input_ids.device) - (start - prompts).unsqueeze(-1)
        valid = (index >= 0) & (index < lengths.unsqueeze(-1))
        ids = unpadded.tokens.gather(1, index.clamp(0, input_ids.shape[1] - 1)) * valid
        first: list[int] = (start - prompts).tolist()
        return cls(ids, valid, start, first, (start - prompts + lengths).tolist())


@dataclass(frozen=True)
class Cut:
    """A column at which the probe is run, to predict the attention of the next `horizon` tokens of some rows.

    Attributes:
        column: columns read.
        horizon: tokens after it that count as the response.
        rows: bool [B], those that have been read long enough and go on; all of them may be another process's.
    """

    column: int
    horizon: int
    rows: Bool[Tensor, "B"]


def draw_cuts(texts: AlignedTexts, config: ProbeConfig, draws: BatchRandom) -> list[Cut]:
    """Returns the ends of prompts and random events of random rows, in order; as many in all processes.

    Raises:
        DataError: no text goes on after `period` tokens.
    """
    device, width = texts.ids.device, texts.ids.shape[1]
    first, end = (torch.tensor(columns, device=device) for columns in (texts.first, texts.end))
    events = (end - first - 1) // config.period
    horizons = {0: config.response}  # by tokens after the prompts
    for cut in range(config.cuts):
        event = 1 + (draws.per_row(cut, 0) * events).long()
        after = draws.one_of(first - texts.start + event * config.period, events > 0, cut, 1)
        if after is not None:
            horizons.setdefault(after, config.horizon)
    cuts: list[Cut] = []
    for after, horizon in sorted(horizons.items()):
        column = min(max(texts.start + after, 1), width)
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
def response_attention(
    base: PreTrainedModel, texts: AlignedTexts, cuts: list[Cut], reduce: Reducers
) -> list[dict[int, Float[Tensor, "B Hq n"]]]:
    """Returns what the responses attend to, from one pass: for each cut and layer, of the columns before it."""
    found: list[dict[int, Tensor]] = [{} for _ in cuts]
    column = torch.arange(texts.ids.shape[1], device=texts.ids.device)

    def see(layer: int, received: Received) -> None:
        for cut, wanted in zip(cuts, found, strict=True):
            labels = layer_labels(
                base,
                layer,
                received,
                block=len(column),
                valid=texts.valid,
                reduce=reduce,
                queries=texts.valid & (column >= cut.column) & (column < cut.column + cut.horizon),
                keys=texts.valid & (column < cut.column) if reduce.needs_keys else None,
            )
            wanted[layer] = labels[:, :, : cut.column, 0]

    trace = full_trace(base, texts.ids)
    replay(base, texts.ids, trace, texts.valid.long(), observe=see, logits_to_keep=1)
    return found


def probe_loss(
    gate: SoftTokens, base: PreTrainedModel, texts: AlignedTexts, cuts: list[Cut], wanted: list[dict[int, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Returns the loss and the hit rate, means over cuts and layers, of a probe run at every cut of texts read once."""
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
            for layer, attended in probe_attention(base, cache, gate).items():
                attention = gate.attention(attended)
                response = at_slots(answers[layer], cache.positions(layer))
                losses.append(objective(attention, response, cut.rows))
                hits.append(hit_rate(attention.detach(), response, cut.rows))
            before = cut.column
    return torch.stack(losses).mean(), torch.stack(hits).mean()


def at_slots(labels: Float[Tensor, "B Hq n"], position: Int[Tensor, "B H N"]) -> Float[Tensor, "B H G N"]:
    """Returns labels of columns as labels of the slots that hold them, 0 where empty."""
    grouped = labels.unflatten(1, (position.shape[1], -1))
    index = position.clamp_min(0).long().unsqueeze(2).expand(-1, -1, grouped.shape[2], -1)
    return grouped.gather(-1, index) * (position >= 0).unsqueeze(2)


def hit_rate(
    probe: Float[Tensor, "B H G N"], response: Float[Tensor, "B H G N"], rows: Bool[Tensor, "B"]
) -> Float[Tensor, ""]:
    """Returns the share of the quarter of slots that the responses attend to most, group means, which is also the probe's."""
    most = max(1, probe.shape[-1] // 4)
    marks = [
        torch.zeros_like(part[:, :, 0], dtype=torch.bool).scatter_(-1, part.mean(2).topk(most).indices, value=True)
        for part in (probe, response)
    ]
    found, wanted = ((part.sum((1, 2)) * rows).sum() for part in (marks[0] & marks[1], marks[1]))
    return ratio(found.float(), wanted)


class ProbeTrainer(GateTrainer):
    """The trainer of mode "probe": soft tokens learn to attend to what responses attend to.

    Fresh soft tokens start from the base's embeddings of evenly spaced entries of its vocabulary.

    Raises:
        DataError: while training, a batch of texts too short for a probe.
    """

    config_type = ProbeConfig
    responses = True

    def __init__(self, *args: Any, config: ProbeConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        gate: SoftTokens = self.gate
        if not bool(gate.started):
            embed: Any = self.base.get_input_embeddings()
            spaced = torch.linspace(0, embed.weight.shape[0] - 1, len(gate.embeddings), device=embed.weight.device)
            with torch.no_grad():
                gate.start_from(embed(spaced.long()))

    def batch_loss(self, model: Any, inputs: dict[str, Any], draws: BatchRandom) -> Tensor:
        """Returns the loss of the gate's objective, mean over cuts, layers, query heads and rows."""
        texts = AlignedTexts.align(inputs["input_ids"], inputs["attention_mask"], inputs["prompt_length"])
        cuts = draw_cuts(texts, self.config, draws)
        wanted = response_attention(self.base, texts, cuts, PRESETS[self.gate.oracle])
        loss, hits = model(probe_loss, self.base, texts, cuts, wanted)
        self.record(hits=hits)
        return loss
