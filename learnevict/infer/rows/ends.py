"""Rows of a batch that have ended: `generate()` feeds them padding until the last one ends, and its mask calls that text.

Inside generate() every criterion that ends a row is heard (`Heard`), and end tokens are known. Who calls the model step by step
has both ids in its generation_config: after an end token, pad tokens in single steps are padding and any other token is text,
so a conversation may also be read token by token.

What tells of an end is on the device. It is copied to the host while the layers run and looked at one step later, when nobody
has to wait; only in steps after an end token are a step's own ids awaited, one small copy, as generate() does in every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from learnevict.errors import PaddingReadWarning


@dataclass(frozen=True)
class HostCopy:
    """A small tensor on its way to the host, where nobody waits for it until it is read."""

    tensor: Tensor
    event: torch.cuda.Event | None = None

    @classmethod
    def begin(cls, found: Tensor) -> HostCopy:
        """Begins to copy; what is on the CPU already stays as it is."""
        if found.device.type != "cuda":
            return cls(found.to("cpu"))
        copy, event = found.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record(torch.cuda.current_stream(found.device))
        return cls(copy, event)

    def read(self) -> Tensor:
        """Returns the tensor when it has arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


@dataclass(frozen=True)
class Ends:
    """Token ids that end a row, and those it is then given until the other rows have ended."""

    ends: frozenset[int] = frozenset()
    pads: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: Any) -> Ends:
        """Returns what a generation config says; without a pad token nobody knows what a row is padded with."""
        return cls(*(frozenset(_ids(getattr(config, name, None))) for name in ("eos_token_id", "pad_token_id")))

    @classmethod
    def of_generate(cls, given: Mapping[str, Any], *configs: Any) -> Ends:
        """Returns what generate() makes of its arguments, where None is an answer, and of the first config that says any."""

        def first(name: str) -> list[int]:
            if name in given:
                return _ids(given[name])
            return next((found for config in configs if (found := _ids(getattr(config, name, None)))), [])

        ends = first("eos_token_id")
        return cls(frozenset(ends), frozenset(first("pad_token_id") or ends[:1]))


def _ids(given: Any) -> list[int]:
    given = given.flatten().tolist() if isinstance(given, Tensor) else given
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


class Finished:
    """Tells which rows read padding in a single step."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Starts anew, as a forward that is no step begins: every row goes on."""
        self.padded: list[bool] = []
        self.over: list[bool] = []
        self.heard: Tensor | None = None
        self.copy: HostCopy | None = None
        """Of the last step, int64 [2, B]: each row's id, and 1 where a criterion ended the row with it."""

    def reorder(self, index: list[int]) -> None:
        if self.copy is not None:
            self.copy = HostCopy(self.copy.read()[:, index])
            self.padded, self.over = ([rows[i] for i in index] for rows in (self.padded, self.over))

    def hear(self, done: Any) -> None:
        """Takes what a criterion of generate() says of the tokens that the next step reads, bool [B]."""
        if isinstance(done, Tensor) and done.ndim == 1:
            self.heard = done if self.heard is None else self.heard | done

    def look(self, tokens: Tensor, known: Ends) -> list[bool]:
        """Returns which rows are given padding now, by ids int64 [B, 1]."""
        padded = self.over = self.over or [False] * len(tokens)
        if self.copy is not None:
            last, heard = self.copy.read().tolist()
            self.over = [was or bool(now) for was, now in zip(self.over, heard, strict=True)]
            padded = [was or token in known.ends for was, token in zip(self.padded, last, strict=True)]
            if any(padded):
                padded = [
                    ended and token in known.pads for ended, (token,) in zip(padded, tokens.tolist(), strict=True)
                ]
            padded = [either or over for either, over in zip(padded, self.over, strict=True)]
        told = tokens.new_zeros(len(tokens)) if self.heard is None or len(self.heard) != len(tokens) else self.heard
        copy = HostCopy.begin(torch.stack([tokens[:, 0], told.to(tokens)]))
        self.padded, self.copy, self.heard = padded, copy, None
        return padded


class Heard(StoppingCriteria):
    """Hands on what another criterion says, and lets the cache know."""

    def __init__(self, criterion: Any, finished: Finished) -> None:
        self.criterion, self.finished = criterion, finished

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = self.criterion(input_ids, scores, **kwargs)
        self.finished.hear(done)
        return done

    def __getattr__(self, name: str) -> Any:  # generate() looks for eos_token_id
        if name == "criterion":
            raise AttributeError(name)
        return getattr(self.criterion, name)


def heard_criteria(given: Mapping[str, Any], configs: tuple[Any, ...], finished: Finished) -> StoppingCriteriaList:
    """Returns the criteria for generate() in place of those it was given: all that may end one row before the others are heard.

    Kinds that generate() makes itself stay what they are, for its own give way to them, and are asked once more where they are
    heard: they keep nothing in mind.
    """
    criteria = list(given.get("stopping_criteria") or [])
    strings = given.get("stop_strings", next((s for c in configs if (s := getattr(c, "stop_strings", None))), None))
    own = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
    asked = [one for one in criteria if type(one) in (EosTokenCriteria, StopStringCriteria)]
    if strings and given.get("tokenizer") is not None and not any(type(one) is StopStringCriteria for one in asked):
        asked.append(StopStringCriteria(given["tokenizer"], strings))
    kept = [one if type(one) in own else Heard(one, finished) for one in criteria]
    return StoppingCriteriaList([*kept, *(Heard(one, finished) for one in asked)])


def warn_of_padding(num: int) -> None:
    """Tells the caller of the model that `num` tokens were taken for text and are padding; of one, an end token, nothing."""
    if num <= 1:
        return
    warnings.warn(
        f"the attention mask hides {num} tokens that were read as text and may have evicted others; rows that are padded when "
        "they have ended are known inside generate(), else by eos_token_id and pad_token_id of model.generation_config: set "
        "them there",
        PaddingReadWarning,
        stacklevel=5,
    )
