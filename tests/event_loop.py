"""One evicting layer driven with given queries, keys and values: the real event loop without a model around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learnevict.infer.clock import Clock
from learnevict.infer.layer import EvictingLayer
from learnevict.infer.store.storage import Meter, Place
from learnevict.ops import Kernels
from learnevict.policy import Governor
from learnevict.signals import Attention

VOCABULARY = 23
LAYER = 1


@dataclass(frozen=True)
class Stream:
    """Everything one layer will ever see, float32: query [B, Hq, T, d], key and value [B, H, T, d]; row b starts at
    pads[b]."""

    query: Tensor
    key: Tensor
    value: Tensor
    tokens: Tensor
    pads: tuple[int, ...]
    attention: Attention

    @property
    def length(self) -> int:
        return self.query.shape[2]

    @property
    def mask(self) -> Tensor:
        return (torch.arange(self.length) >= torch.tensor(self.pads).unsqueeze(-1)).long()

    def row(self, index: int) -> Stream:
        """One row without its padding."""
        one, pad = slice(index, index + 1), self.pads[index]
        parts = (part[one, :, pad:] for part in (self.query, self.key, self.value))
        return Stream(*parts, self.tokens[one, pad:], (0,), self.attention)


def stream(
    pads: Sequence[int] = (0, 5, 14),
    length: int = 61,
    heads: int = 2,
    group: int = 2,
    width: int = 8,
    seed: int = 0,
    softcap: float | None = None,
    sinks: bool = False,
) -> Stream:
    """Random, with keys in clusters so that some are alike, and attention far from uniform.

    Args:
        softcap: as Gemma2 has it.
        sinks: a logit per query head that takes attention from the tokens, as in GPT-OSS.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch = len(pads)
    centres = 2 * draw(batch, heads, 6, width)
    which = torch.randint(6, (batch, heads, length, 1), generator=generator).expand(-1, -1, -1, width)
    key = centres.gather(2, which) + 0.8 * draw(batch, heads, length, width)
    query = 1.3 * draw(batch, heads * group, length, width)
    tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
    frequencies = 1.7 ** -torch.arange(width // 2).float()
    value = draw(batch, heads, length, width)
    sink = 2 * draw(heads * group) if sinks else None
    attention = Attention(width**-0.5, softcap, sink, frequencies)
    return Stream(query, key, value, tokens, tuple(pads), attention)


class Loop:
    """The stream read through one layer: `sizes` tokens a forward."""

    def __init__(self, policy: Governor, data: Stream) -> None:
        self.policy, self.data = policy, data
        self.clock = Clock(policy.schedule)
        place = Place(LAYER, 0, 1, 1)
        self.layer = EvictingLayer(policy, self.clock, place, record=True, meter=Meter(), kernels=Kernels("off"))

    def read(self, size: int) -> Tensor:
        """The next `size` columns; returns the attention's output."""
        data, part = self.data, slice(self.clock.length, self.clock.length + size)
        mask = data.mask[:, : part.stop]
        self.clock.read(len(data.pads), size, mask, data.tokens[:, part], torch.device("cpu"))
        self.layer.expecting = True
        key, value = self.layer.update(data.key[:, :, part], data.value[:, :, part])
        out = self.layer.attend(data.query[:, :, part], key, value, None, data.attention)
        self.clock.commit()
        return out

    def run(self, prompt: int) -> Tensor:
        """The prompt in one forward, then token by token; returns the recorded expiry int32 [B, H, T]."""
        for size in [prompt, *[1] * (self.data.length - prompt)]:
            self.read(size)
        assert self.layer.expiry is not None
        return self.layer.expiry[..., : self.data.length]
