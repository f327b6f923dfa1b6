"""KVzip: keep what the model needs to say the text again, whatever will be asked (arXiv 2505.23416).

    s_i = max over repeating queries and the group of  softmax over {sinks, chunk, repetition} (q . k_i)

The text is run again behind itself, in chunks, each behind the token ids of `instruction`; what runs is forgotten. A token is
scored once, with its chunk, and keeps its score. A repetition attends to all that the cache holds; only the score's softmax is
restricted.

A chunk is what was read since the last event, at most `chunk` tokens. So by default memory stays bounded: every `slack` tokens
the newest are repeated, those of the answer too, and every token is run twice. schedule="prefill_end" repeats and compresses
the prompt at its end, as in the paper, and the answer as it grows; "prefill_only" leaves the answer alone.

Departures: no instruction unless one is given (oracle.reconstruct.repeat_prompt makes one), which models want that were trained
to follow them, and no tail of the chunk before; sinks stand for the system prompt. Every head holds the same number; the
paper's ranking of all heads together is allocation="pooled".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from learnevict.config import AnyBudget
from learnevict.errors import UsageError
from learnevict.methods import Paper
from learnevict.parts.options import Options, compose
from learnevict.policy import Policy, Questions, Scorer
from learnevict.signals import Signals, StateColumn, queries_at_a_time

PAPER = Paper("KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", "2505.23416", 2025)


@dataclass(frozen=True)
class Repetition(Scorer):
    """The most attention that a repetition of its chunk pays to a token."""

    chunk: int = 2048
    sinks: int = 4
    instruction: tuple[int, ...] = ()
    columns = (StateColumn("repeated"),)
    asks = True

    def score(self, signals: Signals) -> Tensor:
        return signals.state["repeated"]

    def ask(self, questions: Questions) -> dict[int, dict[str, Tensor]]:
        found = {layer: signals.state["repeated"] for layer, signals in questions.layers.items()}
        texts = questions.unasked
        for start in range(0, max(map(len, texts)), self.chunk):
            self._repeat(questions, [text[start : start + self.chunk] for text in texts], found)
        return {layer: {"repeated": score} for layer, score in found.items()}

    def _repeat(self, questions: Questions, chunks: list[range], found: dict[int, Tensor]) -> None:
        """Scores one chunk of every row, given by its unpadded positions; of some rows it may be empty."""
        text = questions.text([chunk.start for chunk in chunks], max(map(len, chunks)))
        told = len(self.instruction)
        tokens = text.new_empty(len(text), told + text.shape[1])
        tokens[:, :told] = torch.tensor(self.instruction, dtype=text.dtype).to(text.device)
        tokens[:, told:] = text

        def per_row(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32).to(text.device, non_blocking=True).view(-1, 1, 1)

        first, stop = per_row([chunk.start for chunk in chunks]), per_row([chunk.stop for chunk in chunks])
        count = per_row([told + len(chunk) if chunk else 0 for chunk in chunks])

        def receive(layer: int, query: Tensor, key: Tensor) -> None:
            signals = questions.layers[layer]
            chunk = signals.occupied & (signals.place >= first) & (signals.place < stop)
            keys = chunk | (signals.occupied & (signals.place < self.sinks))
            found[layer] = torch.where(chunk, strongest(signals, query, key, keys, count), found[layer])

        questions.run(tokens, receive)


def strongest(signals: Signals, query: Tensor, key: Tensor, keys: Tensor, count: Tensor) -> Tensor:
    """Returns the largest probability that queries [B, Hq, P, d] give each slot, float32 [B, H, N].

    Their softmax runs over the slots `keys`, bool [B, H, N], and causally over their own keys [B, H, P, d]; of each row the
    first `count` queries, int32 [B, 1, 1], are heard.
    """
    batch, heads, num = signals.position.shape
    grouped = query.unflatten(1, (heads, -1))
    top, size = torch.zeros(keys.shape, device=keys.device), queries_at_a_time(signals.slots, query)
    for start in range(0, query.shape[2], size):
        part = grouped[:, :, :, start : start + size]
        stored = signals.slots.logits(part.flatten(2, 3)).view(*part.shape[:4], num)
        own = part @ key.unsqueeze(2).mT
        weights, _ = signals.attention.beside(stored, own, keys[:, :, None, None], start)
        heard = torch.arange(start, start + part.shape[3], device=keys.device) < count
        top = torch.maximum(top, (weights * heard.view(batch, 1, 1, -1, 1)).amax((2, 3)))
    return top


def policy(
    budget: AnyBudget, *, chunk: int = 2048, instruction: tuple[int, ...] = (), **options: Unpack[Options]
) -> Policy:
    """Keep what a repetition of the text needs.

    Args:
        chunk: most tokens that are repeated at a time (2048: the authors' code).
        instruction: token ids before each repetition.

    Raises:
        UsageError: a chunk without tokens.
    """
    if chunk < 1:
        raise UsageError(f"a chunk of {chunk} tokens repeats nothing; give 1 or more")
    return compose("kvzip", budget, Repetition(chunk, options.get("sinks", 4), tuple(instruction)), **options)
