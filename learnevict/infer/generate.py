"""Generation under a policy: prompts in; texts, the history of the cache and its real bytes out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer, TextStreamer

from learnevict.errors import DataError, UsageError
from learnevict.infer.attach import Attachment, attach
from learnevict.infer.cache import EvictingCache, bytes_held
from learnevict.infer.layer import EvictingLayer
from learnevict.infer.model.modules import device_of
from learnevict.infer.prompts import checked
from learnevict.infer.serve import OWN_CACHE
from learnevict.policy import AnyPolicy
from learnevict.signals import EMPTY, NEVER, Trace
from learnevict.untrusted import printable


@dataclass(frozen=True)
class Completion:
    """One prompt's answer and what it cost. Byte figures are those of the batch's cache divided by its rows.

    Attributes:
        text: the answer without special tokens.
        tokens: token ids of the answer, the end token included.
        finished: False if the answer was cut at max_new_tokens.
        prompt_seconds: until the first new token of the batch; `tokens_per_second`: of the whole batch after it.
        kv_bytes: keys and values held at the end; `kv_bytes_peak` at any time; `kv_bytes_full` in a full cache.
        kept: slots held at the end by each kv head of each evicting layer, [L][H] (a full cache: of each layer).
        budget: slots per head the policy was held to at the end; None without a policy.
        trace: expiry [L, 1, H, T] over prompt and answer but its last token, which no cache ever reads.
    """

    text: str
    prompt: list[int]
    tokens: list[int]
    finished: bool
    prompt_seconds: float
    tokens_per_second: float
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_full: int
    kept: list[list[int]]
    budget: int | None = None
    trace: Trace | None = None


OWN_WAYS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "penalty_alpha", "dola_layers")
"""Settings of a model's generation_config.json for other ways of decoding than token by token."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: greedy at temperature 0."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 (greedy) or more, not {self.temperature}")


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    policy: AnyPolicy | None,
    prompts: Sequence[str | list[int]],
    *,
    batch_size: int = 1,
    streamer: BaseStreamer | None = None,
    record: bool = False,
    **sampling: Any,
) -> list[Completion]:
    """Answers prompts under a policy and returns a Completion per prompt, in order.

    Args:
        policy: governs the cache; None leaves the stock cache and the model's own attention.
        prompts: texts, or token ids from `read_text` and `read_chat`.
        batch_size: prompts per forward, padded on the left.
        streamer: is told every new token.
        record: keep the expiry trace of every row.
        **sampling: see `Sampling`.

    Raises:
        DataError: an empty prompt.
        UsageError: an argument out of range.
        BudgetError: a budget that this model cannot be held to.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    how = Sampling(**sampling)
    ids = [read_text(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    found: list[Completion] = []
    for start in range(0, len(ids), batch_size):
        part = Sampling(how.max_new_tokens, how.temperature, how.seed + start)
        found += _Batch(model, tokenizer, ids[start : start + batch_size]).run(policy, part, streamer, record)
    return found


def read_text(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a plain text, with the special tokens that the tokenizer adds."""
    if not text.strip():
        raise DataError("the prompt is empty; give at least one word")
    return list(tokenizer(checked(text, "the prompt ")).input_ids)


def read_chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Returns the token ids of a conversation under the tokenizer's chat template, up to where the assistant answers."""
    if not tokenizer.chat_template:
        raise UsageError("this model has no chat template; give a plain prompt, without --chat or messages")
    if not any(str(message.get("content", "")).strip() for message in messages):
        raise DataError("the conversation is empty; give at least one message with content")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise DataError(f"the chat template refuses these messages: {error}") from error
    return list(tokenizer(checked(text, "the conversation "), add_special_tokens=False).input_ids)


def decoding(model: Any, pad: int, sampling: Sampling) -> dict[str, Any]:
    """Returns arguments of generate() over the model's own settings: one answer, plain ids, token by token, by one cache.

    Greedy ignores how the model would sample. What is unset here stands outside the GenerationConfig, where None would be the
    model's own; what is set stands in it, because the model's own is checked before arguments are looked at.
    """
    how: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens, "pad_token_id": pad, "num_beams": 1, "num_return_sequences": 1,
        "do_sample": sampling.temperature > 0, "return_dict_in_generate": False, "output_attentions": False,
        "use_cache": True,  # else every step would read the whole text into the cache again
    }  # fmt: skip
    own = vars(model.generation_config)
    unset = ["max_length", *(name for name in (*OWN_CACHE, *OWN_WAYS) if own.get(name))]
    if sampling.temperature > 0:
        how["temperature"] = sampling.temperature
    else:
        unset += ["temperature", "top_p", "top_k", "min_p", "typical_p"]
    return {"generation_config": GenerationConfig(**how), **dict.fromkeys(unset)}


class Stopwatch(BaseStreamer):
    """Notes when the first new token of a batch came, and hands every token on."""

    def __init__(self, listener: BaseStreamer | None) -> None:
        self.listener = listener
        self.start = self.first = time.perf_counter()
        self.calls = 0

    def put(self, value: Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()
        if self.listener is not None:
            self.listener.put(value)

    def end(self) -> None:
        if self.listener is not None:
            self.listener.end()


class Printer(TextStreamer):
    """Prints an answer on standard output, word by word, without what controls a terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


def printer(tokenizer: Any) -> BaseStreamer:
    """Returns a streamer that prints the answer to one prompt at a time."""
    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class _Batch:
    """Prompts that go through the model together."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, prompts: list[list[int]]) -> None:
        if not all(prompts):
            raise DataError("the prompt is empty; give at least one word")
        self.model: Any = model
        self.tokenizer, self.prompts = tokenizer, prompts
        self.width = max(map(len, prompts))
        self.ends, self.pad = ends_and_pad(model, tokenizer)

    def run(
        self, policy: AnyPolicy | None, sampling: Sampling, streamer: BaseStreamer | None, record: bool
    ) -> list[Completion]:
        ids, mask = left_padded(self.prompts, self.pad, device_of(self.model))
        how, watch = self._how(sampling), Stopwatch(streamer)
        stock = DynamicCache(config=self.model.config)
        attached = nullcontext(stock) if policy is None else self._attach(policy, record)
        with seeded(sampling, device_of(self.model)), attached as cache:
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, streamer=watch, tokenizer=self.tokenizer, **how,
            )  # fmt: skip
        stop = time.perf_counter()
        answers = [up_to_end(row, self.ends) for row in out[:, self.width :].tolist()]
        count = sum(map(len, answers))
        late = count - len(answers)
        speed = late / (stop - watch.first) if late else count / (stop - watch.start)
        timing = {"prompt_seconds": watch.first - watch.start, "tokens_per_second": speed}
        return [self._completion(row, answer, cache, timing) for row, answer in enumerate(answers)]

    def _attach(self, policy: AnyPolicy, record: bool) -> Attachment:
        return attach(self.model, policy, record=record, prompt_length=[len(prompt) for prompt in self.prompts])

    def _how(self, sampling: Sampling) -> dict[str, Any]:
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and self.width + sampling.max_new_tokens > limit:
            warnings.warn(
                f"{self.width} prompt tokens and up to {sampling.max_new_tokens} new ones go beyond the {limit} "
                "positions this model was made for; what comes after is guesswork",
                stacklevel=2,
            )
        return decoding(self.model, self.pad, sampling)

    def _completion(self, row: int, answer: list[int], cache: Any, timing: dict[str, float]) -> Completion:
        prompt, num_rows, evicting = self.prompts[row], len(self.prompts), isinstance(cache, EvictingCache)
        seen = len(prompt) + len(answer) - 1
        held = {name: total // num_rows for name, total in bytes_held(cache).items()}
        return Completion(
            text=self.tokenizer.decode(answer, skip_special_tokens=True),
            prompt=prompt,
            tokens=answer,
            finished=answer[-1] in self.ends,
            kv_bytes=held["end"],
            kv_bytes_peak=held["peak"],
            kv_bytes_full=held["full"],
            kept=kept_slots(cache, row, seen),
            budget=resolved_budget(cache, seen) if evicting else None,
            trace=row_trace(cache.trace(), row, self.width - len(prompt), seen) if evicting and cache.record else None,
            **timing,
        )


def ends_and_pad(model: PreTrainedModel, tokenizer: Any) -> tuple[set[int], int]:
    """Returns the tokens that end an answer, and the one that rows are padded with."""
    given = model.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    ends: set[int] = set(given) if isinstance(given, list) else set() if given is None else {given}
    return ends, next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)


def left_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns token ids and attention mask, int64 [B, T]; all rows end in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)


def up_to_end(answer: list[int], ends: set[int]) -> list[int]:
    """Returns an answer up to and with its first end token; what follows in a batch is padding."""
    stop = next((index for index, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: stop + 1]


@contextmanager
def seeded(sampling: Sampling, device: torch.device) -> Generator[None, None, None]:
    """Draws random numbers from the seed inside; the caller's random state is untouched."""
    if sampling.temperature == 0:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        yield


def kept_slots(cache: Any, row: int, seen: int) -> list[list[int]]:
    """Returns the slots that each kv head of each evicting layer holds for one row, [L][H]; of every layer in a stock cache."""
    if isinstance(cache, EvictingCache):
        return [(cache.positions(layer)[row] != EMPTY).sum(-1).tolist() for layer in cache.evicting]
    return [[min(layer.keys.shape[2], seen)] * layer.keys.shape[1] for layer in cache.layers]


def resolved_budget(cache: EvictingCache, seen: int) -> int:
    """Returns the budget in slots per head after so many tokens, before a layer allocator moves it about."""
    policy, place = cache.policy, next(layer.place for layer in cache.layers if isinstance(layer, EvictingLayer))
    return policy.budget.tokens(
        seen, policy.floor, place.row_bytes_per_token, place.num_evicting, policy.schedule.slack
    )


def row_trace(trace: Trace, row: int, padding: int, seen: int) -> Trace:
    """Returns one row of a batch's trace, its columns counted from the first real token."""
    expiry = trace.expiry[:, row : row + 1, :, padding : padding + seen]
    expiry = torch.where(expiry == NEVER, NEVER, (expiry - padding).clamp_max(seen)).int()
    return replace(trace, expiry=expiry.cpu())
