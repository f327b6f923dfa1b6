"""Small networks of their own for every layer and kv head: grouped linear maps over slots."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from learnevict.config import Layout
from learnevict.ops.distributed import summed


def headwise(inputs: Tensor, weight: Tensor) -> Tensor:
    """Returns [B, H, n, in] mapped by one matrix per head, [H, in, out], to [B, H, n, out]; weights are not copied per row."""
    return torch.einsum("bhni,hio->bhno", inputs, weight)


def centre_and_scale(inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation, at least 0.01, of the batch of all processes, [H, in] each.

    Args:
        inputs: float32 [M, H, n, in].
        mask: bool [M, 1 or H, n, 1], what counts.
    """
    count = summed(mask.sum((0, 2))).clamp_min(1)
    mean = summed((inputs * mask).sum((0, 2))) / count
    spread = summed(((inputs - mean[:, None]).square() * mask).sum((0, 2))) / count
    return mean, spread.sqrt().clamp_min(1e-2)


class HeadwiseMLP(nn.Module):
    """score = w . GELU(W GELU(sum over inputs of W_x x + b) + b), one for every layer and kv head.

    Inputs go in by name and are never joined: each has its own part of the first map, so an input that is the same for all
    slots is mapped once. They are centred and scaled by what `calibrate` was shown. `inputs` are their widths by name.
    """

    calibrated: Tensor

    def __init__(self, layout: Layout, inputs: Mapping[str, int], hidden: int) -> None:
        super().__init__()
        self.inputs, heads = dict(inputs), (layout.num_layers, layout.num_heads)
        spread = math.sqrt(sum(inputs.values()))
        for name, width in inputs.items():
            self.register_parameter(f"weight_{name}", nn.Parameter(torch.randn(*heads, width, hidden) / spread))
            self.register_buffer(f"mean_{name}", torch.zeros(*heads, 1, width))
            self.register_buffer(f"scale_{name}", torch.ones(*heads, 1, width))
        self.register_buffer("calibrated", torch.zeros(layout.num_layers, dtype=torch.bool))
        self.bias_in = nn.Parameter(torch.zeros(*heads, 1, hidden))
        self.weight_mid = nn.Parameter(torch.randn(*heads, hidden, hidden) / math.sqrt(hidden))
        self.bias_mid = nn.Parameter(torch.zeros(*heads, 1, hidden))
        self.weight_out = nn.Parameter(torch.zeros(*heads, hidden, 1))

    @property
    def width(self) -> int:
        """Numbers per slot that an evaluation holds at a time, for Signals.pieces."""
        return max(*self.inputs.values(), self.weight_mid.shape[-1])

    def forward(self, layer: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the scores float32 [B, H, n] of inputs [B, H, n or 1, width], by name."""
        first = self.bias_in[layer]
        for name, given in inputs.items():
            centred = (given.float() - getattr(self, f"mean_{name}")[layer]) / getattr(self, f"scale_{name}")[layer]
            first = first + headwise(centred, getattr(self, f"weight_{name}")[layer])
        second = headwise(nn.functional.gelu(first), self.weight_mid[layer]) + self.bias_mid[layer]
        return headwise(nn.functional.gelu(second), self.weight_out[layer]).squeeze(-1)

    @torch.no_grad()
    def calibrate(self, layer: int, inputs: Mapping[str, Tensor], real: Tensor) -> None:
        """Centres and scales some inputs of one layer, [B, H, n, width] by name, by the `real` ones, bool [B, n]; only once."""
        if bool(self.calibrated[layer]):
            return
        for name, given in inputs.items():
            mean, scale = centre_and_scale(given.float(), real[:, None, :, None])
            getattr(self, f"mean_{name}")[layer, :, 0] = mean
            getattr(self, f"scale_{name}")[layer, :, 0] = scale
        self.calibrated[layer] = True
