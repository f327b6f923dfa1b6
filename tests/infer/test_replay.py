"""replay: any history, made up or recorded, in one pass; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learnevict import EvictingCache, attach, replay
from learnevict.errors import TraceError
from learnevict.infer.attention import RUN, replay_attention
from learnevict.signals import NEVER, Attention, Trace
from tests.closeness import close
from tests.laws import zoo
from tests.laws.naive import masked_logits, stock
from tests.laws.policies import hashed
from tests.laws.run import PADS, batch, read

CLOSE = 1e-4
LENGTH = 40
pytestmark = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")


def made_up(model, length: int = LENGTH, seed: int = 0) -> Trace:
    """Every token may go at any time after it was read, or never; heads differ."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_hidden_layers, len(PADS), config.num_key_value_heads, length)
    first = torch.arange(length) + 1
    expiry = (first + torch.rand(shape, generator=generator) * (length - first)).int()
    expiry[torch.rand(shape, generator=generator) < 0.4] = NEVER
    return Trace(expiry, source="made up")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", "phi3"])
def test_any_history_can_be_replayed(name):
    model = zoo.build(name)
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    trace = made_up(model)
    with torch.no_grad():
        found = replay(model, ids, trace, mask).logits
    expiry = trace.expiry.clone()
    sliding = [kind == "sliding_attention" for kind in getattr(model.config, "layer_types", None) or []]
    expiry[[index for index, stays in enumerate(sliding) if stays]] = NEVER
    close(found, masked_logits(model, ids, mask, expiry), CLOSE, mask)


def test_nothing_evicted_is_the_stock_model():
    model = zoo.build("qwen2")
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    trace = Trace(torch.full((2, 3, 2, LENGTH), NEVER, dtype=torch.int32))
    with torch.no_grad():
        found = replay(model, ids, trace, mask).logits
    close(found, stock(model, ids, mask), 1e-5, mask)


@pytest.mark.parametrize("block", [1, 7, 40, 128])
def test_tiles_change_nothing(block):
    """Queries are read tile by tile; nothing of size [T, T] exists."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, LENGTH, 8, generator=generator) for heads in (4, 2, 2))
    expiry = made_up(zoo.build("llama")).expiry[0]
    valid = torch.arange(LENGTH) >= torch.tensor(PADS).unsqueeze(-1)
    attention = Attention(0.3, softcap=5.0, sinks=torch.randn(4, generator=generator))
    found = replay_attention(query, key, value, expiry, valid, attention, block=block)
    expected = by_hand(query, key, value, expiry, valid, attention)
    close(found, expected, 1e-5, valid.unsqueeze(1).expand(-1, 4, -1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("widths", "softcap"), [((8, 8), None), ((8, 6), None), ((8, 8), 5.0)])
def test_where_nothing_is_evicted_fused_attention_takes_over(padded, widths, softcap):
    """It gives what tiles give real tokens, with its gradients; what it cannot compute is left to tiles."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, LENGTH, 8), *((3, 2, LENGTH, width) for width in widths)]
    parts = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    valid = torch.arange(LENGTH) >= torch.tensor(PADS if padded else (0, 0, 0)).unsqueeze(-1)
    valid[1, 20] = not padded  # padding may stand between turns
    found, expected = (
        replay_attention(*parts, expiry, valid if padded else None, Attention(0.3, softcap))
        for expiry in (None, torch.full((3, 2, LENGTH), NEVER))
    )
    found, expected = (out.transpose(1, 2)[valid] for out in (found, expected))
    close(found, expected, 1e-5)
    for one, two in zip(*(torch.autograd.grad(out.square().sum(), parts) for out in (found, expected)), strict=True):
        close(one, two, 1e-5)


def by_hand(query: Tensor, key: Tensor, value: Tensor, expiry: Tensor, valid: Tensor, attention: Attention) -> Tensor:
    """One query at a time, in float64."""
    out = torch.zeros(*query.shape[:3], value.shape[-1])
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            shared = head // (query.shape[1] // key.shape[1])
            for now in range(query.shape[2]):
                seen = [i for i in range(now + 1) if valid[row, i] and now < expiry[row, shared, i]]
                if not seen:
                    continue
                logits = attention.scaling * (key[row, shared, seen].double() @ query[row, head, now].double())
                logits = attention.softcap * torch.tanh(logits / attention.softcap)
                weights = torch.cat([logits, attention.sinks[head].double().view(1)]).softmax(-1)[:-1]
                out[row, head, now] = (weights @ value[row, shared, seen].double()).float()
    return out


def test_a_recorded_run_can_be_replayed_while_attached():
    model = zoo.build("llama")
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    run = read(model, hashed(16), ids, mask, [20, *[1] * 20])
    cache = EvictingCache(model.config, hashed(16))
    with attach(model), torch.no_grad():
        found = replay(model, ids, run.trace, mask).logits
    assert cache.get_seq_length() == 0
    close(found, run.logits, CLOSE, mask)
    assert model.config._attn_implementation == "eager"


def test_arguments_reach_the_model():
    model = zoo.build("llama")
    ids, _ = batch(zoo.tokens(model, len(PADS), LENGTH), (0, 0, 0))
    trace = made_up(model)
    out = replay(model, ids, trace, labels=ids, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(out.loss, expected)
    assert len(out.hidden_states) == 3
    assert out.past_key_values is None


def test_gradients_flow_through_a_replay():
    model = zoo.build("llama")
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: embeddings)
    replay(model, ids, made_up(model), mask).logits.square().mean().backward()
    handle.remove()
    assert embeddings.grad is not None
    assert bool(embeddings.grad.isfinite().all())
    assert float(embeddings.grad.abs().sum()) > 0


def test_observers_see_every_evicting_layer():
    model = zoo.build("gemma2")
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    seen = {}

    def observe(layer, received):
        parts = (received.query, received.key, received.value, received.hidden)
        seen[layer] = (*(part.shape for part in parts), received.attention.softcap)

    with torch.no_grad():
        replay(model, ids, made_up(model), mask, observe=observe)
    assert sorted(seen) == [1, 2]
    assert seen[1][0] == (3, 4, LENGTH, 16)
    assert seen[1][1] == seen[1][2] == (3, 2, LENGTH, 16)
    assert seen[1][3:] == ((3, LENGTH, 32), 50.0)


@pytest.mark.parametrize("cut", [(slice(1), ...), (slice(None), slice(2), ...), (..., slice(30))])
def test_a_trace_of_something_else_is_refused(cut):
    model = zoo.build("llama")
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    with pytest.raises(TraceError, match=r"layers, rows, tokens.*record it on this input"):
        replay(model, ids, Trace(made_up(model).expiry[cut]), mask)


def test_a_failed_replay_leaves_nothing_behind():
    model = zoo.build("llama")
    ids, mask = batch(zoo.tokens(model, len(PADS), LENGTH))
    with pytest.raises(IndexError), torch.no_grad():
        replay(model, ids + 10**6, made_up(model), mask)
    assert RUN.get() is None
    assert model.config._attn_implementation == "eager"
    assert not model.model._forward_pre_hooks


def test_what_a_trace_says():
    trace = made_up(zoo.build("llama"))
    assert trace.evictions == int((trace.expiry < NEVER).sum())
    held = trace.held(20)
    for layer, row, head in ((0, 0, 0), (1, 2, 1)):
        expected = sum(i <= 20 < int(end) for i, end in enumerate(trace.expiry[layer, row, head]))
        assert int(held[layer, row, head]) == expected
