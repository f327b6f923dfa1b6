"""Golden eviction: follow a trace that was rolled from the future (`oracle.golden`). A reference, not a bound.

A slot's score is its token's expiry, so an event drops exactly the tokens that the trace ends there. Where the trace
has nothing to say (past its last token, or once a row's text has left the text it was made from) recency decides,
within the guards. Any recorded trace of a uniform policy can be followed the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from learnevict.config import Budget
from learnevict.errors import TraceError
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.policy import Gate, Policy
from learnevict.signals import Signals, StateColumn, Trace

PAPER = Paper("Golden eviction, section 3.1 of ForesightKV", "2602.03203", 2026, kind="reference")


class Hindsight(Gate):
    """Looks up expiries; its tables move with the model's device.

    Args:
        trace: the history to follow.
        text: int64 [B, T], the token ids the trace was made from; a row leaves the trace at its first other token.
        divergence: column from which each row leaves the trace; None: its end.
    """

    columns = (StateColumn("left", dtype=torch.bool),)

    def __init__(self, trace: Trace, text: Tensor | None, divergence: int | Sequence[int] | Tensor | None) -> None:
        super().__init__()
        length = trace.expiry.shape[-1]
        until = torch.as_tensor(length if divergence is None else divergence, dtype=torch.int32)
        self.expiry = nn.Buffer(trace.expiry)
        self.text = None if text is None else nn.Buffer(text)
        self.until = nn.Buffer(until.clamp(max=length).expand(trace.expiry.shape[1]).clone())

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
        if (batch, heads) != self.expiry.shape[1:3] or signals.layer >= self.expiry.shape[0]:
            raise TraceError(
                f"the trace covers (layers, rows, kv heads) = {tuple(self.expiry.shape[:3])}, but layer {signals.layer} of "
                f"this run has {batch} rows and {heads} kv heads; make a trace for this batch and model"
            )
        table = self.expiry[signals.layer]
        ends = table.gather(-1, signals.position.clamp(0, table.shape[-1] - 1).long())
        left = (signals.state["left"] & signals.occupied).any(-1).any(-1) | (signals.rows.now >= self.until)
        return torch.where(left.view(-1, 1, 1), signals.position, ends).float()


def policy(
    budget: int | str | Budget,
    *,
    trace: Trace,
    text: Tensor | None = None,
    divergence: int | Sequence[int] | Tensor | None = None,
    **options: Unpack[Options],
) -> Policy:
    """Evict as the trace says, under its own budget, guard and period: others would silently leave it.

    Args:
        trace: from `oracle.golden`, or recorded; its period is the slack, its events fall in "blocks".
        text, divergence: see Hindsight; a text is needed in free generation.

    Raises:
        TraceError: another budget, guard, period or schedule than the trace's.
    """
    asked = Budget.parse(budget)
    if trace.budget is not None and asked != Budget(trace.budget):
        raise TraceError(
            f"the trace was rolled for a budget of {trace.budget} tokens, not {asked}; roll one for {asked}"
        )
    slack = options.get("slack", 0 if trace.period == 1 else trace.period)
    if slack is None or trace.period != max(slack, 1):
        raise TraceError(
            f"the trace has an event every {trace.period} tokens, not every {slack}; roll labels of that block"
        )
    if (when := options.get("schedule", "blocks")) != "blocks":
        raise TraceError(f"the trace has its events in blocks, so schedule={when!r} cannot follow it")
    sinks, recent, prompt = trace.guard or (4, 8, False)
    terms: Options = {"sinks": sinks, "recent": recent, "prompt": prompt, **options, "slack": slack}
    given = (terms.get("sinks"), terms.get("recent"), terms.get("prompt"))
    if trace.guard is not None and given != trace.guard:
        raise TraceError(
            f"the trace was rolled with (sinks, recent, prompt protected) = {trace.guard}, not {given}; drop these options"
        )
    return compose("golden", asked, Hindsight(trace, text, divergence), **terms)
