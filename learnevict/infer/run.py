"""What the attention of a model does in the running forward: serve a cache, replay a trace, weigh softly, or run a probe.

One Run is active in a thread at a time; of nested ones the innermost. Hooks on the model (infer.attach) tell it when a forward
begins and ends, and hand each attention module to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from learnevict.signals import Attention

Arguments = dict[str, Any]


class Run(ABC):
    """Decides how the layers of a forward attend."""

    def begin(self, given: Arguments) -> Arguments | None:
        """Called before a forward with its arguments by name; returns those it is to run with, None if they are the same."""
        return None

    def end(self, output: Any) -> Any:
        """Called after a forward with what it returned, None after an error; returns what it returns instead, or None."""
        return None

    @abstractmethod
    def takes(self, layer: int) -> bool:
        """Whether this layer attends through `attend`, asked before its module runs; if not, it attends as it always does."""

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention
    ) -> Tensor:
        """Returns the attention of one layer, [B, Hq, S, dv].

        Args:
            layer: its index.
            query: [B, Hq, S, d]; key [B, H, S, d]; value [B, H, S, dv]; post-RoPE.
            hidden: inputs of the attention module [B, S, E].
            attention: how logits become probabilities.
        """

    def masks(self, window: int | None) -> bool:
        """Whether visibility in layers with this sliding window (None: full attention) is decided without a mask."""
        return window is None


RUN: ContextVar[Run | None] = ContextVar("learnevict_run", default=None)


@contextmanager
def running(run: Run) -> Generator[None]:
    """Inside, `run` is the active one."""
    token = RUN.set(run)
    try:
        yield
    finally:
        RUN.reset(token)


@dataclass(frozen=True)
class Step:
    """What the hook on an attention module hands to its attention function.

    Attributes:
        run: decides how the layer attends.
        hidden: inputs of the module [B, S, E].
        frequencies: see signals.Attention.
    """

    run: Run
    hidden: Tensor | None
    frequencies: Tensor | None
