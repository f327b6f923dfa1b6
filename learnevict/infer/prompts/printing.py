"""Answers on a terminal, while they are written."""

from __future__ import annotations

from typing import Any

from transformers.generation.streamers import BaseStreamer, TextStreamer

from learnevict.untrusted import printable


class Printer(TextStreamer):
    """Prints an answer on standard output without what controls a terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print whole words, as soon as the words are whole."""
        super().on_finalized_text(printable(text), stream_end)


def printer(tokenizer: Any) -> BaseStreamer:
    """Returns a streamer that prints the answer word by word; one prompt at a time."""
    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
