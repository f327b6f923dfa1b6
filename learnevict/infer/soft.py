"""Attention that a gate weighs instead of evicting: how soft gates learn, through the model, in one pass without a cache.

The weight of key i at query t is exp(logit + bias(t, i)), the bias being what the gate's `decay_bias` says (arXiv
2512.03324, version 2). It is added and never multiplied: a factor on the logit would raise forgotten keys whose logit is
negative. Queries go in tiles that are computed again in the backward pass, so no layer keeps a [T, T] matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from learnevict.errors import CacheError, ModelError, UsageError
from learnevict.infer.attention import RUN, Run, masked_attention
from learnevict.policy import DecayBias, Scorer, SoftGate
from learnevict.signals import EMPTY, Attention, Rows, Signals

TILE = 128


@dataclass(frozen=True)
class Sequence:
    """A whole text seen as slots, one per column; padding is empty. key [B, H, T, d]; value [B, H, T, dv]."""

    key: Tensor
    value: Tensor
    position: Tensor

    @property
    def room(self) -> int:
        return self.key.shape[2]

    def logits(self, query: Tensor) -> Tensor:
        return query @ self.key.transpose(-1, -2)

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        step = max(1, self.room // 4)
        for start in range(0, self.room, step):
            part = slice(start, min(start + step, self.room))
            yield part, self.key[:, :, part], self.value[:, :, part]


@dataclass(frozen=True)
class TextInput:
    """What one forward reads: tokens int64 [B, T] (None if embeddings were given), real tokens bool [B, T], rows."""

    tokens: Tensor | None
    valid: Tensor
    rows: Rows

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> TextInput:
        """Returns the text in the arguments of a decoder's forward."""
        if given.get("past_key_values") is not None:
            raise CacheError(
                "attach(soft=True) weighs a whole text at once and evicts nothing: call the model without past_key_values "
                "(use_cache=False), or attach without soft to run under eviction"
            )
        tokens, mask = given.get("input_ids"), given.get("attention_mask")
        source = tokens if tokens is not None else given["inputs_embeds"]
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise CacheError("attach(soft=True) needs a 2D attention mask [batch, tokens]; 4D masks are not supported")
        shape = source.shape[:2]
        valid = torch.ones(shape, dtype=torch.bool, device=source.device) if mask is None else mask.bool()
        column = torch.arange(shape[1], dtype=torch.int32, device=source.device)
        first = torch.where(valid, column, shape[1]).amin(-1).int()
        now = torch.where(valid, column, EMPTY).amax(-1).int()
        return cls(tokens, valid, Rows(first, now, valid.sum(-1).int(), first, now + 1))

    @property
    def position(self) -> Tensor:
        """int32 [B, T], columns; -1 where padded."""
        column = torch.arange(self.valid.shape[1], dtype=torch.int32, device=self.valid.device)
        return torch.where(self.valid, column, EMPTY).int()


@dataclass
class Soft(Run):
    """What `with attach(model, policy, soft=True) as soft:` yields.

    Attributes:
        layers: those that would evict; the others attend as they always do.
        state: of the last forward, {layer: what the gate's `write` said, {name: [B, H, T, ...]}}.
        text: of the last forward.
    """

    gate: SoftGate
    layers: frozenset[int]
    state: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    text: TextInput | None = None

    @property
    def decay_biases(self) -> list[DecayBias]:
        """The decay bias of each layer in the last forward, in order of layers."""
        return [self.gate.decay_bias(self.state[layer]) for layer in sorted(self.state)]

    def begin(self, given: Mapping[str, Any]) -> None:
        self.text, self.state = TextInput.of(given), {}

    def takes(self, layer: int) -> bool:
        return layer in self.layers

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, attention: Attention
    ) -> Tensor:
        text = self.text
        assert text is not None
        slots = Sequence(key, value, text.position.unsqueeze(1).expand(-1, key.shape[1], -1))
        signals = Signals(
            layer=layer,
            slots=slots,
            rows=text.rows,
            budget=text.rows.seen,  # between events a policy knows none
            state={},
            query=query,
            query_position=text.position,
            attention=attention,
            key=key,
            value=value,
            hidden=hidden,
            tokens=text.tokens,
        )
        self.state[layer] = self.gate.write(signals)
        return soft_attention(query, key, value, self.gate.decay_bias(self.state[layer]), text.valid, attention)


def soft_gate(scorer: Scorer) -> SoftGate:
    """Returns what of a scorer can weigh attention."""
    if (gate := scorer.soft) is None:
        raise UsageError(
            f"attach(soft=True) needs a policy scored by a SoftGate, which weighs attention; {type(scorer).__name__} cannot: "
            "drop soft, or give the policy of trimkv, wg_kv or dms"
        )
    return gate


def soft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: DecayBias,
    valid: Tensor,
    attention: Attention,
    *,
    tile: int = TILE,
    again: bool = True,
) -> Tensor:
    """Returns causal attention [B, Hq, T, dv] with the bias of `decay` on the logits, after the cap; differentiable in all.

    Args:
        query: [B, Hq, T, d]; key [B, H, T, d]; value [B, H, T, dv].
        decay: log-retention float32 [B, H, T].
        valid: bool [B, T], False for padding.
        tile: queries at a time.
        again: compute tiles again in the backward pass instead of keeping their probabilities.
    """
    length, parts = query.shape[2], []
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        whole = (
            query[:, :, start:stop],
            key[:, :, :stop],
            value[:, :, :stop],
            decay.log_retention[..., :stop],
            valid[:, :stop],
        )
        run = partial(_tile, window=decay.window, attention=attention)
        kept = not again or not torch.is_grad_enabled()
        parts.append(run(*whole) if kept else checkpoint(run, *whole, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts, dim=2)


def _tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_retention: Tensor,
    valid: Tensor,
    window: int | None,
    attention: Attention,
) -> Tensor:
    """Returns attention of the last queries [B, Hq, s, d] of a text of n columns, over all of these."""
    num, size = log_retention.shape[-1], query.shape[2]
    column = torch.arange(num, device=query.device)
    row = column[num - size :]
    visible = (column <= row.view(-1, 1)) & valid[:, None, None, None]
    bias = DecayBias(log_retention, window).bias(row, column).unsqueeze(2)
    return masked_attention(query, key, value, visible, attention, bias)


@contextmanager
def layers_again(model: nn.Module, attached: Callable[[Soft], AbstractContextManager[Any]]) -> Generator[None]:
    """Makes decoder layers of soft forwards inside keep their inputs only and compute again in the backward pass.

    That may come after the attachment has ended, and on another thread, so each layer attaches itself again, by `attached`.
    Dropout of the model stays off.
    """

    @contextmanager
    def again(soft: Soft) -> Generator[None]:
        with attached(
            replace(soft, state={})
        ):  # made when entered: a layer that no gradient reaches is not computed again
            yield

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        run = RUN.get()
        return nullcontext(), again(run) if isinstance(run, Soft) else nullcontext()

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layers that transformers can checkpoint; train without it")
    before = [(layer, layer.gradient_checkpointing, layer.training) for layer in layers]
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=contexts)
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer, checkpoints, training in before:
            layer.gradient_checkpointing, layer.training = checkpoints, training
