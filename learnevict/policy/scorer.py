"""Scorers, which say what is worth keeping, and gates, which are scorers with parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from learnevict.signals import Signals, StateColumn

Answer = TypeVar("Answer")


class Scorer(ABC):
    """Gives each slot a number; higher stays.

    Attributes:
        columns: its per-slot state; the cache owns it.
        window: past queries that the cache keeps for it to look back at.
        observes: True if `observe` must be called after every block or step with the attention of the fresh queries.
        refreshes: True if `refresh` must be called at the end of every period of a row, also where the schedule waits with its
            events, or nothing needs to go.
        asks: True if `ask` must be called before an event, which then falls after the forward.
    """

    columns: tuple[StateColumn, ...] = ()
    window: int = 0
    observes: bool = False
    refreshes: bool = False
    asks: bool = False

    @abstractmethod
    def score(self, signals: Signals) -> Tensor:
        """Returns float32 [B, H, N]; values of empty slots are ignored."""

    def write(self, signals: Signals) -> dict[str, Tensor]:
        """Returns the state of fresh tokens, {name: [B, H, S, ...]}; columns not named start at their fill."""
        return {}

    def observe(self, signals: Signals) -> dict[str, Tensor]:
        """Returns updated state of all slots, {name: [B, H, N, ...]}, given `signals.fresh_attention`."""
        return {}

    def refresh(self, signals: Signals) -> dict[str, Tensor]:
        """Returns updated state of all slots after a period, {name: [B, H, N, ...]}."""
        return {}

    def ask(self, questions: Questions) -> dict[int, dict[str, Tensor]]:
        """Returns updated state of all slots before an event, {layer: {name: [B, H, N, ...]}}, of what running tokens tells."""
        return {}

    @property
    def soft(self) -> SoftGate | None:
        """The gate by which attention may be weighed in place of eviction, if the scorer is or has one."""
        return None

    def to(self, device: torch.device) -> Scorer:
        """Moves parameters or tables to `device`; scorers without any return themselves."""
        return self


@dataclass(frozen=True)
class WrappedScorer(Scorer):
    """A scorer in front of another one: all but its scores is that one's."""

    scorer: Scorer

    def __post_init__(self) -> None:
        for name in ("columns", "window", "observes", "refreshes", "asks"):
            object.__setattr__(self, name, getattr(self.scorer, name))

    def score(self, signals: Signals) -> Tensor:
        return self.scorer.score(signals)

    def write(self, signals: Signals) -> dict[str, Tensor]:
        return self.scorer.write(signals)

    def observe(self, signals: Signals) -> dict[str, Tensor]:
        return self.scorer.observe(signals)

    def refresh(self, signals: Signals) -> dict[str, Tensor]:
        return self.scorer.refresh(signals)

    def ask(self, questions: Questions) -> dict[int, dict[str, Tensor]]:
        return self.scorer.ask(questions)

    @property
    def soft(self) -> SoftGate | None:
        return self.scorer.soft

    def to(self, device: torch.device) -> Scorer:
        self.scorer.to(device)
        return self


class Gate(nn.Module, Scorer):
    """A Scorer with parameters, for all layers of one base model; trained with the base frozen.

    Attributes:
        mode: which trainer of learnevict.train trains it: "replay", "stream", "soft" or "probe"; "" if none does.
        made: arguments that it was made with besides the layout, as JSON.
    """

    mode: str = ""
    made: Mapping[str, Any] = {}

    def forward(self, task: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        """Returns task(self, ...): trainers use parameters inside a forward only, because DDP and ZeRO watch for it."""
        return task(self, *args, **kwargs)

    def settings(self) -> dict[str, Any]:
        """Returns what the method's `build` needs besides the layout to make this gate again, as JSON."""
        return dict(self.made)

    def to(self, *args: Any, **kwargs: Any) -> Gate:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See nn.Module."""
        nn.Module.to(self, *args, **kwargs)
        return self


@dataclass(frozen=True)
class DecayBias:
    """An additive bias on the logit of key i at query t, by which a soft gate weighs attention while it is trained.

    geometric (window None): (t - i) * log_retention_i; windowed: log_retention_i once t - i >= window, 0 before.

    Attributes:
        log_retention: float32 [B, H, T], at most 0, in columns of the text.
        window: tokens that are not weighed yet.
    """

    log_retention: Tensor
    window: int | None = None

    def bias(self, query: Tensor, key: Tensor) -> Tensor:
        """Returns float32 [B, H, S, n] for query columns int64 [S] and key columns int64 [n] (contiguous or not)."""
        age = (query.view(-1, 1) - key).to(torch.float32)
        log_retention = self.log_retention.index_select(-1, key).unsqueeze(2)
        return age * log_retention if self.window is None else log_retention * (age >= self.window)


class SoftGate(Gate):
    """A gate that gives a token a log-retention when it is written, by which training weighs attention instead of evicting.

    Attributes:
        losses: weights of its losses, by name in learnevict.train.trainers.soft_gate.LOSSES.
        random_keys: int64 [B] of ops.random, from which noise in the rows of a batch is drawn while it is trained; None: it
            comes from torch's global generator.
    """

    mode = "soft"
    losses: Mapping[str, float] = {}
    random_keys: Tensor | None = None

    @property
    def soft(self) -> SoftGate:
        """Itself."""
        return self

    @abstractmethod
    def decay_bias(self, state: dict[str, Tensor]) -> DecayBias:
        """Returns the bias that the state of `write`, {name: [B, H, T, ...]}, stands for."""


class Probe(Protocol):
    """Lookahead queries: tokens that attend to the slots and to each other, and leave no trace."""

    @property
    def embeddings(self) -> Tensor:
        """[P, E]: what goes into the decoder in place of embedded tokens."""
        ...

    def adapted(self, decoder: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which the decoder's projections are changed for the probe (not at all, or by LoRA)."""
        ...


Receive = Callable[[int, Tensor, Tensor], None]
"""Told, in every evicting layer, of its index and of queries [B, Hq, P, d] and keys [B, H, P, d] of tokens that are run."""


class Questions(Protocol):
    """A text at an event, and a decoder that runs further tokens against its slots, which leave no trace."""

    @property
    def layers(self) -> Mapping[int, Signals]:
        """The evicting layers."""
        ...

    @property
    def unasked(self) -> list[range]:
        """Unpadded positions that each row has read since it was asked last; none of a row that evicts nothing now."""
        ...

    def text(self, start: list[int], size: int) -> Tensor:
        """Returns token ids of each row from an unpadded position on, int64 [B, size]; beyond its end anything."""
        ...

    def run(self, tokens: Tensor, receive: Receive, visible: Mapping[int, Tensor] | None = None) -> Tensor:
        """Runs tokens, int64 [B, P], as if they came next; returns what is likeliest to follow each row's last, int64 [B].

        Args:
            visible: slots that they attend to in each layer, bool [B, H, N]; None: all.
        """
        ...

    def next_tokens(self) -> Tensor:
        """Returns the likeliest tokens to follow the text, int64 [B]."""
        ...
