"""What a cache has read, token by token, and whether what comes in goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from learnevict.errors import CacheError, UsageError
from learnevict.infer.clock import Clock
from learnevict.infer.rows.ends import Ends, Finished, HostCopy

EMBEDDED, PADDING = -1, -2
ROOM = 256
NO_ROWS = "a batch of no rows came in, which nothing can be read of; give one row at least, or do not call the model"
ADVICE = "call cache.reset() or make a new cache for a new prompt, and give a next turn the whole conversation"


class Conversation:
    """Token ids of the columns that were read, and the check that a forward continues them.

    The ids stay on the device of the tokens, so that writing them down makes no step wait; only what compares them does.

    Args:
        clock: of the cache.

    Attributes:
        ids: int32 [B, room], -1 for embeddings, -2 for padding; None before the first forward.
        open: columns of the forward that has been admitted and is not over; 0 if there is none.
        step: that forward is a single step, no turn or part of one.
        padded: rows that this step pads; empty if it does not pad.
        last_step: rows whose single step stood at position 0, bool [B], and those that go on from a text; None once checked.
        ends: what generate() was told of ends; None outside of it.
        hears: generate() was given criteria that are heard.
        turn_end: columns of the prompt that generate() was given; 0 outside of it.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.finished = Finished()
        self.ends: Ends | None = None
        self.hears, self.turn_end = False, 0
        self.reset()

    def reset(self) -> None:
        self.ids: Tensor | None = None
        self.open, self.step = 0, False
        self.padded: list[bool] = []
        self.last_step: tuple[HostCopy, list[bool]] | None = None
        self.finished.forget()

    def admit(
        self,
        source: Tensor,
        tokens: Tensor | None,
        mask: Tensor | None,
        places: Tensor | None,
        last: Tensor | None,
        ends: Ends,
    ) -> Tensor | None:
        """Checks that a forward goes on from where the cache stands, and writes its tokens down.

        Inside generate() the mask of a step is not read, which would make it wait for the device: it is the prompt's, and ones.

        Args:
            source: input ids [B, S], or embeddings [B, S, E]; `tokens` are the ids, None where embeddings were given.
            mask: [B, S or columns read + S], 0 = padding.
            places: position ids [B or 1, S]; others, of several kinds, are not checked.
            last: position ids of the last column read before, [B or 1, 1].
            ends: by which rows end outside of generate().

        Returns:
            Columns that the mask hides, bool [B, columns read], if some of them were read as text; else None.
        """
        (batch, size), length = source.shape[:2], self.clock.length
        self._check_rows(batch)
        self._check_step()
        if size == 0 or (mask is not None and mask.shape[1] not in (size, length + size)):
            given = (
                "a forward of no columns" if not size else f"a mask of {0 if mask is None else mask.shape[1]} columns"
            )
            raise CacheError(
                f"{given} does not fit: this cache has read {length} and {size} come in; a new prompt needs cache.reset() or a "
                "new cache, a next turn the whole conversation"
            )
        self.step = step = size == 1 and length >= self.turn_end
        if not step and length and places is not None and places.ndim == 2:
            check_positions(places, last, mask, length, self.clock.seen)
        self.padded = self._padded(tokens, ends) if step else []
        if step and length and not self.turn_end and places is not None and places.ndim == 2:
            self._look_at_step(places, mask)
        if not step:
            self.finished.forget()
        shown = None if step and self.turn_end else mask
        hidden = self._compare(shown, self.padded) if length and (not step or shown is not None) else None
        self._write(source, tokens, shown)
        self.open = size
        return hidden

    def _look_at_step(self, places: Tensor, mask: Tensor | None) -> None:
        """Looks whether a single step stands at position 0 behind a text: at once on a CPU, else when the next one comes."""
        first = (places[:, -1] == 0).expand(len(self.clock.seen))
        if mask is not None:
            first = first & (mask[:, -1].to(places.device) != 0)
        padded = self.padded or [False] * len(first)
        going_on = [bool(seen) and not over for seen, over in zip(self.clock.seen, padded, strict=True)]
        self.last_step = HostCopy.begin(first), going_on
        if self.last_step[0].event is None:
            self._check_step()

    def _check_step(self) -> None:
        if self.last_step is None:
            return
        (first, going_on), self.last_step = self.last_step, None
        wrong = [begins and goes_on for begins, goes_on in zip(first.read().tolist(), going_on, strict=True)]
        if any(wrong):
            row = wrong.index(True)
            raise CacheError(
                f"a single token at position 0 of row {row} came in, but this cache has read a text there; {ADVICE}"
            )

    def _padded(self, tokens: Tensor | None, ends: Ends) -> list[bool]:
        """Returns the rows that a step pads; a single one never is."""
        seen, known = self.clock.seen, self.ends or ends
        if tokens is None or len(seen) < 2 or not all(seen) or not (known.ends or self.hears):
            return []
        padded = self.finished.look(tokens, known)
        return padded if any(padded) else []

    def _compare(self, mask: Tensor | None, padded: Sequence[bool] = ()) -> Tensor | None:
        """Returns what of the columns read a mask hides, if that is more than the padding known; no mask: all are text."""
        old, length = self.ids, self.clock.length
        if old is None or (mask is not None and mask.shape[1] <= length):
            return None
        if mask is None:
            wrong, hidden, more = [seen < length for seen in self.clock.seen], None, False
        else:
            known, hidden = old[:, :length] == PADDING, mask[:, :length] == 0
            found: list[list[bool]] = torch.stack([(known & ~hidden).any(-1), (hidden & ~known).any(-1)]).tolist()
            wrong, more = found[0], any(found[1])
        if padded:  # as in generate(), the mask of a row that has ended goes on with ones
            wrong = [text and not over for text, over in zip(wrong, padded, strict=True)]
        if any(wrong):
            row = wrong.index(True)
            given = "no attention mask came in, or one of ones" if mask is None else "the mask has tokens"
            raise CacheError(
                f"{given}, but this cache has read padding in row {row}, in front of a text or where the row had ended before "
                f"others; give an attention_mask of all columns with 0 there, or {ADVICE}"
            )
        return hidden if more else None

    def _check_rows(self, batch: int) -> None:
        seen, prompts = self.clock.seen, self.clock.prompt_length
        if not batch:
            raise CacheError(NO_ROWS)
        if seen and len(seen) != batch:
            raise CacheError(
                f"this cache holds a conversation of {len(seen)} rows, but {batch} rows came in; call "
                "cache.reset() or make a new cache for a new prompt"
            )
        if self.open:
            raise CacheError(
                "the last forward of this cache was interrupted, so its layers disagree; call cache.reset() and read the "
                "conversation again"
            )
        if prompts is not None and len(prompts) != batch:
            raise CacheError(
                f"prompt_length has {len(prompts)} entries, but {batch} rows came in; give one per row "
                "(with num_return_sequences, one per returned row)"
            )

    def _write(self, source: Tensor, tokens: Tensor | None, mask: Tensor | None) -> None:
        (batch, size), length, old = source.shape[:2], self.clock.length, self.ids
        if old is None or old.shape[1] < length + size:
            room = max(ROOM, length + size + length // 2)
            self.ids = torch.full((batch, room), EMBEDDED, dtype=torch.int32, device=source.device)
            if old is not None:
                self.ids[:, :length] = old[:, :length]
        assert self.ids is not None
        fresh = self.ids[:, length : length + size]
        if tokens is None:
            fresh.fill_(EMBEDDED)
        else:
            fresh.copy_(tokens)
        if mask is not None:
            fresh.masked_fill_(mask[:, -size:] == 0, PADDING)
        for row, padded in enumerate(self.padded):
            if padded:
                fresh[row].fill_(PADDING)

    def hide(self, hidden: Tensor) -> None:
        """Columns bool [B, columns read] were padding after all."""
        if self.ids is not None:
            self.ids[:, : hidden.shape[1]].masked_fill_(hidden, PADDING)

    def select(self, index: Tensor) -> None:
        if self.ids is not None:
            self.ids = self.ids.index_select(0, index.to(self.ids.device))
        self.finished.reorder(index.tolist())

    def starts(self, ids: Tensor, mask: Tensor | None) -> bool:
        length = self.clock.length
        if not length or self.ids is None:
            return True
        if (
            copies := len(self.clock.seen) // len(ids) if len(self.clock.seen) % len(ids) == 0 else 0
        ):  # beams are copies
            ids, mask = ids.repeat_interleave(copies, 0), None if mask is None else mask.repeat_interleave(copies, 0)
        if not copies or ids.shape[1] <= length:
            return False
        old = self.ids[:, :length]
        real = old != PADDING if mask is None else mask[:, :length].to(old.device) != 0
        wrong = (ids[:, :length].to(old) != old) & (old != EMBEDDED) & real
        return not bool(wrong.any())

    def check_prompt(self, ids: Tensor, mask: Tensor | None) -> None:
        """Refuses what generate() is given, unless it goes on from what was read.

        Args:
            ids: int64 [B, T]: the whole conversation; or what is new, with a mask [B, columns read + T].
        """
        if not len(ids):
            raise CacheError(NO_ROWS)
        new = mask is not None and mask.shape[1] > ids.shape[1]
        if new or len(self.clock.seen) % len(ids) or self.starts(ids, mask):
            return
        if mask is not None and mask.shape == ids.shape and self.starts(ids, None):
            self._compare(mask.repeat_interleave(len(self.clock.seen) // len(ids), 0))
        raise CacheError(
            f"generate() was given {ids.shape[1]} tokens, which are not the {self.clock.length} that this cache has read and "
            f"more; {ADVICE}"
        )

    def check_embeddings(self, states: Tensor, embed: Callable[[Tensor], Tensor]) -> None:
        """Refuses embeddings [B, T, E] of more columns than were read, whose beginning is not that of the tokens read.

        Columns that were read as embeddings are not compared; `embed` maps ids int64 [B, T] to their embeddings.
        """
        length = self.clock.length
        if not length or self.ids is None or len(states) != len(self.ids) or states.shape[1] <= length:
            return
        old = self.ids[:, :length]
        known = (old != EMBEDDED) & (old != PADDING)
        expected = embed(old.clamp_min(0).long().to(states.device))
        if bool((((states[:, :length] - expected) != 0).any(-1) & known.to(states.device)).any()):
            raise CacheError(
                f"generate() was given embeddings of other tokens than the {length} that were read; {ADVICE}"
            )


def as_batch(ids: Any) -> Tensor:
    """Returns token ids as int64 [B, T], from a tensor or lists, of one row or several."""
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError) as error:
        raise UsageError(f"token ids must be [tokens] or [batch, tokens], a tensor or lists: {error}") from None
    found = found.unsqueeze(0) if found.ndim == 1 else found
    if found.ndim != 2 or not len(found):
        raise UsageError(f"token ids must be [tokens] or [batch, tokens], not of shape {list(found.shape)}")
    return found


def check_positions(places: Tensor, last: Tensor | None, mask: Tensor | None, length: int, seen: list[int]) -> None:
    """Refuses several columns that do not stand behind what a cache has read; this waits for the device.

    Positions may count the mask's tokens, or go on from those given before (`last`, [B or 1, 1]); if none were, count columns
    or tokens read.
    """
    batch, size = len(seen), places.shape[1]
    real = torch.ones(batch, size, device=places.device) if mask is None else mask[:, -size:].to(places.device)
    column = (real != 0).int().argmax(-1, keepdim=True)
    first = places.expand(batch, -1).gather(1, column)
    if last is not None:
        allowed = [last.to(places.device).expand(batch, 1) + 1]
    else:
        allowed = [column + length, torch.tensor(seen, device=places.device).unsqueeze(1)]
    if mask is not None and mask.shape[1] == length + size:
        allowed.append(mask[:, :length].to(places.device).sum(-1, keepdim=True))
    right = torch.stack([first == one for one in allowed]).any(0) | (real == 0).all(-1, keepdim=True)
    wrong: list[int] = (~right.flatten()).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0]
        raise CacheError(
            f"the first token that comes in stands at position {int(first[row])} of row {row}, but this cache has read "
            f"{seen[row]} tokens there; {ADVICE}"
        )
