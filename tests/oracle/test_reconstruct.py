"""Targets of a repetition, against attention probabilities of a stock model, row by row and chunk by chunk."""

from __future__ import annotations

import math

import pytest
import torch

from learnevict.errors import ModelError, UsageError
from learnevict.oracle import (
    KVZAP,
    KVZIP,
    KVZIP_PLUS,
    Received,
    Repeating,
    future_attention,
    reconstruct,
    repeat_prompt,
)
from tests.closeness import close
from tests.laws import zoo
from tests.laws.run import batch

PADS = (0, 4, 11)
LENGTH = 23
PRESETS = {"kvzip": KVZIP, "kvzip+": KVZIP_PLUS, "kvzap": KVZAP}
pytestmark = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")


class Looked:
    """What a stock model with eager attention does on one unpadded row: probabilities, values and inputs of every layer."""

    def __init__(self, model, ids: list[int]) -> None:
        hidden, values, handles = [], [], []
        for layer in model.get_decoder().layers:
            attention = layer.self_attn
            handles.append(attention.v_proj.register_forward_hook(lambda m, a, out: values.append(out[0].double())))
            handles.append(
                attention.register_forward_pre_hook(
                    lambda m, a, k: hidden.append(k["hidden_states"][0].double()), with_kwargs=True
                )
            )
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_attentions=True, use_cache=False)
        for handle in handles:
            handle.remove()
        self.probability = [part[0].double() for part in out.attentions]  # [Hq, T, T]
        self.hidden, self.values = hidden, values
        self.weights = [layer.self_attn.o_proj.weight.double() for layer in model.get_decoder().layers]

    def label(self, layer: int, head: int, key: int, queries: list[int], support: list[int], plus: bool) -> float:
        """max over the group and the queries of softmax over `support` only, of one kv head (groups of two)."""
        best = 0.0
        for h in (2 * head, 2 * head + 1):
            rows = self.probability[layer][h]
            width = self.values[layer].shape[1] // 2
            value = self.values[layer][key, head * width : (head + 1) * width]
            written = float((self.weights[layer][:, h * width : (h + 1) * width] @ value).norm())
            for t in queries:
                share = float(rows[t, key]) / sum(float(rows[t, i]) for i in support if i <= t)
                best = max(best, share * written / float(self.hidden[layer][t].norm()) if plus else share)
        return best


def brute(model, ids: list[int], how: Repeating, layer: int, head: int, plus: bool) -> list[float]:
    """Labels of one unpadded row."""
    labels = []
    for start in range(0, len(ids), how.chunk):
        chunk = list(range(start, min(start + how.chunk, len(ids))))
        again = [*how.prompt, *(ids[i] for i in range(max(0, start - how.tail), start)), *(ids[i] for i in chunk)]
        looked = Looked(model, ids + again)
        queries = list(range(len(ids), len(ids) + len(again)))
        support = sorted({*range(min(how.sinks, len(ids))), *chunk, *queries})
        labels += [looked.label(layer, head, i, queries, support, plus) for i in chunk]
    return labels


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model_name", ["qwen3", "gemma2"])
@pytest.mark.parametrize("how", [Repeating(chunk=9, sinks=2), Repeating(chunk=7, sinks=3, prompt=(5, 9), tail=2)])
def test_labels_are_attention_of_the_repetition(name, model_name, how):
    """Regression 9 and 11: padded rows as alone; rank and group order. Gemma2's first layer stays stock: a pass a chunk."""
    model = zoo.build(model_name)
    ids, mask = batch(zoo.tokens(model, 3, LENGTH), PADS)
    found = reconstruct(model, ids, mask, how=how, reduce=PRESETS[name])
    layer = len(found) - 1
    assert (found[0] is None) == (model_name == "gemma2")
    part = found[layer]
    assert part is not None and part.shape == (3, 2, LENGTH)
    for row in (0, 2):
        pad = PADS[row]
        for head in (0, 1):
            want = torch.tensor(brute(model, ids[row, pad:].tolist(), how, layer, head, name != "kvzip"))
            want = want.log() if name == "kvzap" else want
            close(part[row, head, pad:], want)
            assert bool((part[row, head, :pad] == (-math.inf if name == "kvzap" else 0)).all())


def test_a_context_shorter_than_a_chunk_is_repeated_whole():
    model = zoo.build("llama")
    ids, mask = batch(zoo.tokens(model, 3, LENGTH), PADS)
    once = reconstruct(model, ids, mask, how=Repeating(chunk=LENGTH))
    more = reconstruct(model, ids, mask, how=Repeating(chunk=500))
    assert all(torch.equal(one, other) for one, other in zip(once, more, strict=True))


def test_what_is_visited_is_the_context_alone():
    """The context cannot see its repetition, so its states are those of a plain pass."""
    from learnevict.infer.teacher_forcing import replay
    from learnevict.oracle import full_trace

    model = zoo.build("qwen3")
    ids, mask = batch(zoo.tokens(model, 3, LENGTH), PADS)
    seen: dict[int, tuple[Received, torch.Tensor]] = {}
    plain: dict[int, Received] = {}
    labels = reconstruct(model, ids, mask, how=Repeating(chunk=10), visit=lambda i, *rest: seen.update({i: rest}))
    with torch.no_grad():
        replay(model, ids, full_trace(model, ids), mask, observe=lambda i, one: plain.update({i: one}))
    real = mask.bool()
    for layer, (received, label) in seen.items():
        assert label is labels[layer]
        close(received.hidden[real], plain[layer].hidden[real])
        for one, other in [(received.key, plain[layer].key), (received.value, plain[layer].value)]:
            close(one.transpose(1, 2)[real], other.transpose(1, 2)[real])


def test_errors_teach():
    with pytest.raises(UsageError, match="at least 1 token"):
        Repeating(chunk=0)
    with pytest.raises(UsageError, match="no longer than a chunk"):
        Repeating(chunk=4, tail=5)
    model = zoo.fresh("llama")
    ids = zoo.tokens(model, 1, 8)
    attention = model.get_decoder().layers[0].self_attn
    attention.dense, attention.o_proj = attention.o_proj, None
    attention.o_proj = torch.nn.Sequential(attention.dense)  # a projection without a weight of its own
    with pytest.raises(ModelError, match="without contributions"):
        reconstruct(model, ids, reduce=KVZIP_PLUS)
    with pytest.raises(UsageError, match="give keys"):
        future_attention(
            torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), reduce=KVZIP, queries=torch.ones(1, 3).bool()
        )


def test_a_model_with_a_chat_template_is_asked_to_repeat():
    class Tokenizer:
        chat_template: str | None = None

        def __call__(self, words: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [len(word) for word in words.split()]}

    tokenizer = Tokenizer()
    assert repeat_prompt(tokenizer) == () == repeat_prompt(tokenizer, "none")
    assert repeat_prompt(tokenizer, "say it") == (3, 2)
    tokenizer.chat_template = "{{ messages }}"
    assert repeat_prompt(tokenizer) == (6, 3, 8, 7, 8)
