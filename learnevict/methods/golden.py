"""Golden eviction: keep what the future attends to most (`oracle.golden`). A reference, not a bound.

`policy` follows a trace: a slot's score is its token's expiry, so an event drops exactly the tokens that the trace ends there.
`from_labels` scores a token by its labels of what is still to come: under equal allocation the events are those of the golden
trace of these labels, and any other allocation or schedule will do as well. Where nothing is known (past the last token, or
once a row's text has left the text that was looked at) recency decides, within the guards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import AnyBudget, Budget
from learnevict.errors import TraceError
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.policy import Gate, Policy
from learnevict.signals import NEVER, Signals, StateColumn, Trace

PAPER = Paper(
    "Golden eviction, section 3.1 of ForesightKV", "2602.03203", 2026, kind="reference", decides=("score", "schedule")
)


class Hindsight(Gate):
    """Looks up what tokens are worth; its tables move with the model's device.

    Args:
        scores: [L, B, H, T, M], the worth of the token in column t to blocks m, m + 1, ...; higher stays. Rows of a batch of
            k B are k neighbours for each row of the table.
        block: tokens per block; with M = 1 it does not matter.
        text: int64 [B, T], the token ids that were looked at; a row is left to recency from its first other token on.
        until: column from which each row is left to recency, whatever its text; None: never.
    """

    columns = (StateColumn("left", dtype=torch.bool),)

    def __init__(
        self,
        scores: Tensor,
        block: int = 1,
        text: Tensor | None = None,
        until: int | Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.block = block
        self.scores = nn.Buffer(scores)
        self.text = None if text is None else nn.Buffer(text)
        ends = torch.as_tensor(NEVER if until is None else until, dtype=torch.int32)
        self.until = nn.Buffer(ends.expand(scores.shape[1]).clone())

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """Returns whether a row has left the text, at every token since: the newest slot always knows."""
        if self.text is None:
            return {}
        if signals.tokens is None:
            raise TraceError("golden compares the text with its trace's, but the model was called with inputs_embeds")
        where = signals.query_position
        expected = self.text.gather(1, where.clamp(0, self.text.shape[1] - 1).long())
        other = (signals.tokens != expected) & (where >= 0) & (where < self.text.shape[1])
        before = (signals.state["left"] & signals.occupied).any(-1)
        return {"left": other.int().cumsum(-1).gt(0).unsqueeze(1) | before.unsqueeze(-1)}

    def score(self, signals: Signals) -> Tensor:
        batch, heads = signals.position.shape[:2]
        num_layers, rows, known, length, num_blocks = self.scores.shape
        if batch % rows or heads != known or signals.layer >= num_layers:
            raise TraceError(
                f"the trace covers (layers, rows, kv heads) = {(num_layers, rows, known)}, but layer {signals.layer} of "
                f"this run has {batch} rows and {heads} kv heads; make a trace for this batch and model"
            )
        block = (signals.rows.seen // self.block).clamp(max=num_blocks - 1).long()
        table, until = self.scores[signals.layer], self.until
        if batch > rows:
            table, until = (part.repeat_interleave(batch // rows, 0) for part in (table, until))
        worth = table.gather(-1, block.view(-1, 1, 1, 1).expand(-1, heads, length, -1)).squeeze(-1)
        worth = worth.gather(-1, signals.position.clamp(0, length - 1).long()).float()
        worth = worth.masked_fill(signals.position >= length, NEVER)
        left = (signals.state["left"] & signals.occupied).any(-1).any(-1) | (signals.rows.now >= until)
        return torch.where(left.view(-1, 1, 1), signals.position.float(), worth)


def from_labels(budget: AnyBudget, future: Tensor, *, text: Tensor | None = None, **options: Unpack[Options]) -> Policy:
    """Returns golden eviction that reads labels, under any budget, allocation and schedule.

    Args:
        future: [L, B, H, T, M], the largest label of blocks m, m + 1, ... of as many tokens as the slack; or of one block.
        text: what they were made from, if the text may turn out another.
    """
    until = None if text is None else text.shape[1]
    hindsight = Hindsight(future, max(options.get("slack", 128), 1), text, until)
    return compose("golden", budget, hindsight, **options)


def policy(
    budget: AnyBudget,
    *,
    trace: Trace,
    text: Tensor | None = None,
    divergence: int | Sequence[int] | Tensor | None = None,
    **options: Unpack[Options],
) -> Policy:
    """Evict as the trace says, under its own budget, guard and period: others would silently leave it.

    Args:
        trace: from `oracle.golden`, or recorded; its period is the slack, its events fall in "blocks".
        text: token ids that the trace was made from; needed in free generation, see Hindsight.
        divergence: column from which each row leaves the trace; None: its end.

    Raises:
        TraceError: another budget, guard, period or schedule than the trace's.
    """
    sinks, recent, prompt = trace.guard or (4, 8, False)
    usual: Options = {
        "sinks": sinks,
        "recent": recent,
        "prompt": prompt,
        "slack": 0 if trace.period == 1 else trace.period or 0,
    }
    terms: Options = {**usual, **options}
    guard = (terms.get("sinks"), terms.get("recent"), terms.get("prompt"))
    asked, period, when = Budget.parse(budget), max(terms.get("slack", 0), 1), options.get("schedule", "blocks")
    given = {"budget": asked, "period": period, "schedule": when, "(sinks, recent, prompt protected)": guard}
    own = (Budget(trace.budget) if trace.budget else asked, trace.period, "blocks", trace.guard or guard)
    wrong = [
        f"{name} {own}, not {found}" for (name, found), own in zip(given.items(), own, strict=True) if found != own
    ]
    if wrong:
        raise TraceError(f"the trace was rolled with {'; '.join(wrong)}: drop these options, or roll another trace")
    length = trace.expiry.shape[-1]
    until = torch.as_tensor(length if divergence is None else divergence).clamp(max=length)
    return compose("golden", asked, Hindsight(trace.expiry.unsqueeze(-1), text=text, until=until), **terms)
