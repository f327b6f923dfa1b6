"""Questions about a context that is read and compressed once: known while it is read, or asked only afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from learnevict.errors import UsageError
from learnevict.infer.attach import attach
from learnevict.infer.cache import bytes_held
from learnevict.infer.generate import Sampling, decoding, ends_and_pad, generate, left_padded, up_to_end
from learnevict.infer.model.modules import device_of
from learnevict.oracle.collect import future_of, golden_labels
from learnevict.oracle.reducers import Reducers
from learnevict.policy import AnyPolicy

LARGEST = Reducers(query="max", group="max", needs_queries=True)
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
Pair = tuple[list[int], list[int]]
"""Token ids of a context, and of all that comes behind it."""


@dataclass(frozen=True)
class Replies:
    """Greedy replies, one entry per question, with tokens generated; `held`: bytes `peak`, `end` and `full` per context."""

    texts: list[str]
    tokens: list[int]
    held: dict[str, int]


def split_prompt(tokenizer: Any, context: str, question: str, *, chat: bool, known: bool) -> Pair:
    """Returns token ids of the context with what stands before it, and of the question with what leads to the reply.

    Both are encoded apart, so that all questions about a context share its tokens.

    Args:
        chat: under the tokenizer's chat template.
        known: the question also stands before the context.

    Raises:
        UsageError: there is no chat template.
    """
    lead = f"{question}\n\n" if known else ""
    if chat and not tokenizer.chat_template:
        raise UsageError("this model has no chat template; ask with --no-chat")
    if chat:
        message = {"role": "user", "content": f"{lead}{MARK}\n\n{question}"}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    else:
        text = f"{tokenizer.bos_token or ''}{lead}{MARK}\n\nQuestion: {question}\nAnswer:"
    before, _, after = text.partition(MARK)
    encoded = [tokenizer(part, add_special_tokens=False, verbose=False).input_ids for part in (before + context, after)]
    return list(encoded[0]), list(encoded[1])


@torch.no_grad()
def ask(
    model: Any,
    tokenizer: Any,
    policy: AnyPolicy | None,
    asked: Sequence[tuple[str, str]],
    *,
    each: int = 1,
    chat: bool = True,
    known: bool = False,
    max_new_tokens: int = 24,
) -> Replies:
    """Returns greedy replies to questions about contexts.

    Args:
        policy: governs the cache; None: the stock cache.
        asked: context and question; the questions of one context follow one another.
        each: questions per context.
        known: every question is read with its context, in a prompt of its own, before and behind it; otherwise each context
            is read and compressed once, before any question is known, and every question goes on from there.
    """
    pairs = [split_prompt(tokenizer, context, question, chat=chat, known=known) for context, question in asked]
    if not known:
        return _afterwards(model, tokenizer, policy, pairs, each, max_new_tokens)
    prompts = [before + after for before, after in pairs]
    found = generate(model, tokenizer, policy, prompts, batch_size=len(prompts), max_new_tokens=max_new_tokens)
    held = {"peak": found[0].kv_bytes_peak, "end": found[0].kv_bytes, "full": found[0].kv_bytes_full}
    return Replies([one.text for one in found], [len(one.tokens) for one in found], held)


@torch.no_grad()
def foreseen(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[str, str]],
    replies: Sequence[str],
    *,
    each: int = 1,
    chat: bool = True,
    known: bool = False,
) -> Float[Tensor, "L B H T 1"]:
    """Returns how much any token of a question and its reply attends to each token before, with the full cache.

    Tokens are those that `ask` reads with the same arguments: of a context, at most over its questions; or of a whole prompt.

    Args:
        replies: right ones, for each question.
    """
    found: list[Tensor] = []
    for (context, question), reply in zip(asked, replies, strict=True):
        before, after = split_prompt(tokenizer, context, question, chat=chat, known=known)
        answer = list(tokenizer(reply, add_special_tokens=False).input_ids)
        ids = torch.tensor([before + after + answer], device=device_of(model))
        later = torch.arange(ids.shape[1], device=ids.device)[None] >= len(before)
        labels, _ = golden_labels(model, ids, block=ids.shape[1], reduce=LARGEST, queries=later, logits_to_keep=1)
        found.append(future_of(labels)[:, :, :, : len(before + after) if known else len(before), :1])
    width = max(one.shape[3] for one in found)
    rows = torch.cat([torch.nn.functional.pad(one, (0, 0, width - one.shape[3], 0)) for one in found], 1)
    return rows if known else rows.unflatten(1, (-1, each)).amax(2)


def _afterwards(
    model: Any, tokenizer: Any, policy: AnyPolicy | None, pairs: list[Pair], each: int, limit: int
) -> Replies:
    (ends, pad), device = ends_and_pad(model, tokenizer), device_of(model)
    before, real = left_padded([context for context, _ in pairs[::each]], pad, device)
    after, fresh = left_padded([question for _, question in pairs], pad, device)
    attached = nullcontext() if policy is None else attach(model, policy, prompt_length=real.sum(-1).tolist())
    with attached as evicting:
        places = (real.cumsum(-1) - 1).clamp_min(0)  # as generate() will count on
        cache = model(
            input_ids=before, attention_mask=real, position_ids=places, past_key_values=evicting, use_cache=True,
            logits_to_keep=1,
        ).past_key_values  # fmt: skip
        held = {name: total // len(before) for name, total in bytes_held(cache).items()}
        cache.batch_repeat_interleave(each)
        before, real = before.repeat_interleave(each, 0), real.repeat_interleave(each, 0)
        out = model.generate(
            input_ids=torch.cat([before, after], 1), attention_mask=torch.cat([real, fresh], 1), past_key_values=cache,
            tokenizer=tokenizer, **decoding(model, pad, Sampling(limit)),
        )  # fmt: skip
    replies = [up_to_end(row, ends) for row in out[:, before.shape[1] + after.shape[1] :].tolist()]
    texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
    return Replies(texts, list(map(len, replies)), held)
