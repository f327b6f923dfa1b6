"""Gates with a probe: soft tokens in place of a response that is not written yet, and deltas that only their rows pass.

Why not the trainable tokens of PEFT: they are entries of the base's vocabulary, so the base would get another embedding
matrix, and another identity than the one a gate is tied to; here the base's weights stay what they are, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from learnevict.config import Layout
from learnevict.errors import ModelError
from learnevict.policy import Gate
from learnevict.signals import Signals

SPREAD = 0.02
"""Standard deviation of fresh soft tokens: that of a fresh embedding matrix. A layout knows no embeddings; the trainer does
(`start_from`)."""
SPLIT = {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",), "o_proj": ("o",)}
FUSED = {"qkv_proj": ("q", "k", "v"), "o_proj": ("o",)}  # Phi3

_passing: ContextVar[object] = ContextVar("learnevict_passing", default=None)


class SoftTokens(Gate):
    """Soft tokens whose attention, averaged over them and over a group of query heads, is the score of a slot.

    Attributes:
        embeddings: [P, E], what the decoder reads.
        objective: how their attention is compared with that of the response, a name of
        learnevict.train.trainers.probe.OBJECTIVES.
        oracle: the response's attention, a name of learnevict.oracle.PRESETS.

    Args:
        layout: of the base model.
        num_tokens: P.
    """

    mode = "probe"
    objective: str
    oracle: str

    def __init__(self, layout: Layout, num_tokens: int = 32) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(SPREAD * torch.randn(num_tokens, layout.hidden_size))
        self.started = nn.Buffer(torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def start_from(self, embedded: Tensor) -> None:
        """Takes the base's embeddings of some tokens, [P, E], for soft tokens that have not been trained yet."""
        self.embeddings.copy_(embedded)
        self.started.fill_(1)

    def settings(self) -> dict[str, Any]:
        return {"num_tokens": self.embeddings.shape[0]}

    def adapted(self, decoder: nn.Module) -> AbstractContextManager[None]:
        """See policy.Probe; nothing is added."""
        return nullcontext()

    def attention(self, probe_attention: Tensor) -> Tensor:
        """Returns what the tokens attend to on average, float32 [B, H, G, N], from `probe_attention` [B, H, G, P, N]."""
        return probe_attention.mean(3)

    def score(self, signals: Signals) -> Tensor:
        """Returns scores, float32 [B, H, N]. Raises ModelError: the policy has no probe, so it attended to nothing."""
        if signals.probe_attention is None:
            raise ModelError("soft tokens score by what they attend to; make the policy with the method's policy()")
        return self.attention(signals.probe_attention).mean(2)


class LowRank(nn.Module):
    """A delta of low rank for the q, k, v and o projections of all layers: output + (alpha / rank) (x A) B.

    B starts at zero, so fresh deltas change nothing. They are passed by what the decoder reads inside `added_to`, in the same
    thread or task, and by nothing else; the base's weights are never touched.

    Args:
        layout: of the base model.
        rank: r.
        alpha: their weight times r.
    """

    def __init__(self, layout: Layout, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        queries, keys = layout.num_query_heads * layout.head_dim, layout.num_heads * layout.head_dim
        mixed = layout.num_query_heads * layout.value_dim
        values, width = layout.num_heads * layout.value_dim, layout.hidden_size
        shapes = {"q": (width, queries), "k": (width, keys), "v": (width, values), "o": (mixed, width)}
        layers = layout.num_layers
        self.down = nn.ParameterDict(
            {name: torch.randn(layers, num, rank) / math.sqrt(num) for name, (num, _) in shapes.items()}
        )
        self.up = nn.ParameterDict({name: torch.zeros(layers, rank, num) for name, (_, num) in shapes.items()})

    def delta(self, layer: int, name: str, inputs: Tensor) -> Tensor:
        """Returns what one projection's output is changed by, [..., out], for inputs [..., in]."""
        down, up = (part[name][layer].to(inputs.dtype) for part in (self.down, self.up))
        return (inputs @ down) @ up * (self.alpha / self.rank)

    @contextmanager
    def added_to(self, decoder: nn.Module) -> Generator[None, None, None]:
        """Changes the decoder's projections by the deltas inside the context.

        Raises:
            ModelError: the decoder has no attention with projections of these names, or of other widths.
        """
        mark = object()
        handles = [
            projection.register_forward_hook(partial(self._add, mark, layer, names))
            for layer, projection, names in projections(decoder)
        ]
        token = _passing.set(mark)
        try:
            yield
        finally:
            _passing.reset(token)
            for handle in handles:
                handle.remove()

    def _add(self, mark: object, layer: int, names: tuple[str, ...], _: nn.Module, args: Any, output: Tensor) -> Any:
        if _passing.get() is not mark:  # another thread's forward
            return output
        parts = [self.delta(layer, name, args[0]) for name in names]
        delta = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if delta.shape != output.shape:
            raise ModelError(
                f"the {'/'.join(names)} projection of layer {layer} is {output.shape[-1]} wide, not {delta.shape[-1]}: these "
                "deltas do not fit this model"
            )
        return output + delta


def projections(decoder: nn.Module) -> list[tuple[int, nn.Module, tuple[str, ...]]]:
    """Returns layer, projection and what it projects to, for every attention module of a decoder.

    Raises:
        ModelError: there is none whose projections are known.
    """
    found: list[tuple[int, nn.Module, tuple[str, ...]]] = []
    for module in decoder.modules():
        index, parts = getattr(module, "layer_idx", None), dict(module.named_children())
        known = next((names for names in (SPLIT, FUSED) if names.keys() <= parts.keys()), None)
        if isinstance(index, int) and known is not None:
            found += [(index, parts[name], what) for name, what in known.items()]
    if not found:
        raise ModelError(
            "this model's attention has no projections q_proj, k_proj, v_proj (or qkv_proj) and o_proj, to which a probe adds "
            "deltas; use a probe without them (judge_q)"
        )
    return found
