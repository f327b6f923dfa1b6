"""A recorded eviction history as one HTML page that needs nothing else: no network, no library, no server."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnevict.errors import TraceError
from learnevict.infer.attach import attach
from learnevict.infer.model.modules import device_of
from learnevict.infer.teacher_forcing import prefill
from learnevict.policy import AnyPolicy
from learnevict.signals import NEVER, Trace
from learnevict.untrusted import printable

MOST_CELLS = 4_000_000
"""Layers x heads x tokens a page can hold before browsers become slow."""
LONGEST = 4096
FOREVER = 2**32 - 1


@torch.no_grad()
def record(model: Any, policy: AnyPolicy, ids: list[int], prompt_length: int | None = None) -> Trace:
    """Returns the eviction history of one text.

    Args:
        model: the model.
        policy: who evicts.
        ids: tokens of the text.
        prompt_length: how many of them are the prompt, for policies that protect it; default all.
    """
    given = None if prompt_length is None else [prompt_length]
    with attach(model, policy, record=True, prompt_length=given) as cache:
        prefill(model, cache, torch.tensor([ids], device=device_of(model)), last=1)
    return cache.trace()


def page(trace: Trace, tokens: list[str], title: str, about: str) -> str:
    """Returns the history of one row as HTML, token by token and head by head.

    Args:
        trace: expiry [L, 1, H, T].
        tokens: what to show for each of its T tokens.
        title: heading of the page.
        about: the line under it.

    Raises:
        TraceError: several rows, another number of tokens, or more than a browser can show.
    """
    layers, rows, heads, length = trace.expiry.shape
    if rows != 1 or length != len(tokens):
        raise TraceError(
            f"a page shows one row, but the trace has {rows} rows of {length} tokens for {len(tokens)} words"
        )
    if layers * heads * length > MOST_CELLS or length > LONGEST:
        raise TraceError(
            f"{layers} layers x {heads} heads x {length} tokens are too much for a page; give a shorter text"
        )
    texts = {"title": printable(title), "about": printable(about), "tokens": [printable(token) for token in tokens]}
    told = {**texts, "layers": list(range(layers)), "heads": heads}
    script = Path(__file__).with_name("viz.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = Path(__file__).with_name("viz.html").read_text(encoding="utf-8")
    parts = {
        "SCRIPT_HASH": f"sha256-{digest}",
        "SCRIPT": script,
        "DATA": inert({**told, "expiry": packed(trace.expiry)}),
    }
    for name, text in parts.items():
        before, after = filled.split(f"@{name}@", 1)
        filled = before + text + after
    return filled


def packed(expiry: Tensor) -> str:
    """Returns expiries as base64 of little-endian uint32, layer by layer and head by head."""
    ends = torch.where(expiry == NEVER, FOREVER, expiry.long()).flatten().cpu()
    return base64.b64encode(ends.numpy().astype("<u4").tobytes()).decode()


def inert(value: Any) -> str:
    """Returns JSON that cannot end the element it stands in, whatever the text says."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def visible(tokenizer: Any, ids: list[int]) -> list[str]:
    """Returns what each token adds to the text behind the one before it, special tokens spelled out."""
    shown = [str(tokenizer.decode(ids[:1]))]
    for index in range(1, len(ids)):
        before, both = tokenizer.decode(ids[index - 1 : index]), tokenizer.decode(ids[index - 1 : index + 1])
        shown.append(both[len(before) :] if both.startswith(before) else tokenizer.decode(ids[index : index + 1]))
    return shown
