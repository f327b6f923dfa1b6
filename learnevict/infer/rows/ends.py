"""Rows of a batch that have ended: `generate()` feeds them padding until the last one ends, and its mask calls that text.

A row has ended once it has read an end token in a single step. Pad tokens that follow in single steps are padding; any other
token is text, so a conversation may also be read token by token. Which ids these are, `generate()` is told; who calls the model
step by step has them in its generation_config.

Only ids tell, and they are on the device: they are copied to the host while the layers run, and looked at one step later, when
nobody has to wait. Only in steps after a row's end are a step's own ids awaited, one small copy, as `generate()` itself does in
every step. A single row is never padded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learnevict.errors import PaddingReadWarning


@dataclass(frozen=True)
class Ends:
    """Token ids that end a row, and those it is then given until the other rows have ended."""

    ends: frozenset[int] = frozenset()
    pads: frozenset[int] = frozenset()

    @classmethod
    def of(cls, *sources: Mapping[str, Any]) -> Ends:
        """Returns what the first source says that says anything: arguments of generate(), then generation configs."""

        def first(name: str) -> frozenset[int]:
            return _ids(next((found for source in sources if (found := source.get(name)) is not None), None))

        ends, pads = first("eos_token_id"), first("pad_token_id")
        return cls(ends, pads or ends)


def _ids(given: Any) -> frozenset[int]:
    given = given.flatten().tolist() if isinstance(given, Tensor) else given
    return frozenset(given if isinstance(given, list | tuple) else [] if given is None else [given])


class Finished:
    """Tells which rows read padding in a single step."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """A forward of several tokens begins: every row goes on."""
        self.padded: list[bool] = []
        self.copy: tuple[Tensor, torch.cuda.Event | None] | None = None

    def reorder(self, index: list[int]) -> None:
        """Row i becomes what row index[i] was."""
        if self.copy is not None:
            last = self._last()
            self.copy = torch.tensor([last[i] for i in index]), None
            self.padded = [self.padded[i] for i in index]

    def look(self, tokens: Tensor, known: Ends) -> list[bool]:
        """Rows that are given padding now, by ids int64 [B, 1]."""
        padded = [False] * len(tokens)
        if self.copy is not None:
            padded = [was or token in known.ends for was, token in zip(self.padded, self._last(), strict=True)]
        if any(padded):
            padded = [over and token in known.pads for over, (token,) in zip(padded, tokens.tolist(), strict=True)]
        on_gpu, event = tokens.device.type == "cuda", None
        copy = tokens.to("cpu", non_blocking=on_gpu, copy=True)
        if on_gpu:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(tokens.device))
        self.padded, self.copy = padded, (copy, event)
        return padded

    def _last(self) -> list[int]:
        """Ids that each row was given in the last step."""
        assert self.copy is not None
        copy, event = self.copy
        if event is not None:
            event.synchronize()
        return copy.flatten().tolist()


def warn_of_padding(num: int) -> None:
    """Tell the caller of the model that `num` tokens were taken for text and are padding; of one, an end token, nothing."""
    if num <= 1:
        return
    warnings.warn(
        f"the attention mask hides {num} tokens that were read as text and may have evicted others; rows that generate() pads "
        "when they have ended are known by eos_token_id and pad_token_id of model.generation_config: set them there",
        PaddingReadWarning,
        stacklevel=5,
    )
