"""Kernels against their references, in Triton's interpreter (one mode per process, so each test starts one)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from learnevict.ops import slot_attention_reference
from tests.closeness import close

COMPARE = """
import torch
from learnevict import ops
from learnevict.ops.kernels import load
from learnevict.infer.store.slots import SlotPool
from tests.infer.test_slots import poisoned
load("cpu")
torch.manual_seed(0)
for batch, heads, group, num, width in [(1, 1, 1, 1, 16), (2, 2, 4, 63, 32), (1, 3, 2, 200, 48), (1, 2, 7, 130, 64)]:
    query = torch.randn(batch, heads, group, width)
    pool = torch.full((batch, heads, num + 5, width), torch.nan)  # unused capacity must never be read
    keys, values = pool.clone()[:, :, :num], pool.clone()[:, :, :num]
    keys.normal_(), values.normal_()
    bias = torch.zeros(batch, heads, num).masked_fill(torch.rand(batch, heads, num) < 0.4, -torch.inf)
    bias[..., 0] = 0.0
    got = ops.slot_attention(query, keys, values, bias, width**-0.5, True)
    want = ops.slot_attention_reference(query, keys, values, bias, width**-0.5)
    error = float((got - want).abs().max() / want.abs().max())
    assert error < 2e-6, (num, error)
for poison in (torch.nan, torch.inf):
    query = torch.randn(2, 2, 2, 4)
    store = poisoned(SlotPool, poison)
    got = ops.slot_attention(query, store.keys, store.values, store.bias, 0.5, True)
    plain = poisoned(SlotPool, 1.0)
    assert torch.equal(got, ops.slot_attention(query, plain.keys, plain.values, plain.bias, 0.5, True)), poison
print("equal")
"""


@pytest.mark.slow
def test_decode_kernel_equals_its_reference():
    """Odd lengths, empty slots, strided pools, groups that are no power of two; float32, ieee products: 2e-6.

    Evicted keys and values that were no numbers change nothing."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_reference_by_hand():
    query, keys = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[2.0, 0.0], [0.0, 5.0], [9.0, 9.0]]]])
    values, bias = torch.tensor([[[[1.0], [3.0], [100.0]]]]), torch.tensor([[[0.0, 0.0, -torch.inf]]])
    share = torch.tensor([2.0, 0.0]).softmax(0)
    want = float(share @ torch.tensor([1.0, 3.0]))
    close(slot_attention_reference(query, keys, values, bias, 1.0).item(), want)
