"""Probes against a stock model that reads text and probe as one sequence, and the trainer that trains them."""

from __future__ import annotations

import contextvars
import math
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments

from learnevict import EvictingCache, Gates, attach, methods
from learnevict.config import Budget
from learnevict.data.documents import Collator
from learnevict.data.label_store import Document
from learnevict.errors import CacheError, DataError, ModelError, NotAttachedError
from learnevict.infer.probe import probe_attention
from learnevict.infer.teacher_forcing import prefill
from learnevict.oracle import JUDGE_Q, LOOKAHEAD_KV
from learnevict.parts.probes import LowRank, projections
from learnevict.policy import Policy
from learnevict.signals import NEVER
from learnevict.train.batch_random import BatchRandom
from learnevict.train.losses.objectives import attention_divergence, attention_error
from learnevict.train.trainers.probe import (
    AlignedTexts,
    Cut,
    ProbeConfig,
    ProbeTrainer,
    at_slots,
    draw_cuts,
    response_attention,
)
from tests.closeness import close
from tests.laws import zoo
from tests.laws.naive import position_ids
from tests.laws.policies import hashed
from tests.laws.run import batch, read

NAMES = ("judge_q", "lookahead_kv")
BUDGET, SLACK, SINKS, RECENT, TOKENS = 14, 4, 2, 3, 5
pytestmark = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")


def tiny() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


def gate_for(name: str, model: Any, tokens: int = TOKENS) -> Any:
    gate = Gates.make(name, model, num_tokens=tokens).gate
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return gate.eval()


def policy_for(name: str, gate: Any, budget: int = BUDGET) -> Policy:
    return methods.load(name).policy(budget, gate=gate, slack=SLACK, sinks=SINKS, recent=RECENT)


# --- one event, written anew ---


@contextmanager
def rows_of_the_probe(model: Any, gate: Any, num: int):
    """The last `num` rows of every projection pass the deltas, by the formula and in float64."""
    handles = []
    for layer in model.model.layers if hasattr(gate, "deltas") else []:
        attention = layer.self_attn
        for part in "qkvo":

            def add(module, args, out, part=part, index=attention.layer_idx):
                down, up = (weights[part][index].double() for weights in (gate.deltas.down, gate.deltas.up))
                extra = args[0] @ down @ up * gate.deltas.alpha / gate.deltas.rank
                return torch.cat([out[:, :-num], out[:, -num:] + extra[:, -num:]], 1)

            handles.append(getattr(attention, f"{part}_proj").register_forward_hook(add))
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def stock_attention(model: Any, gate: Any, ids: Any) -> list[Any]:
    """What the probe attends to behind a text [T], per layer float64 [Hq, P, T]: one pass of a stock model."""
    twin = tiny().double()
    twin.load_state_dict(model.double().state_dict())
    model.float()
    rows = torch.cat([twin.get_input_embeddings()(ids), gate.embeddings.double()])
    with rows_of_the_probe(twin, gate, len(gate.embeddings)):
        found = twin.model(inputs_embeds=rows[None], output_attentions=True, use_cache=False).attentions
    return [part[0, :, len(ids) :, : len(ids)] for part in found]


@pytest.mark.parametrize("name", NAMES)
def test_ask_equals_one_pass_over_text_and_probe(name):
    """Left-padded rows, read in two forwards; slots in any order."""
    model = tiny()
    gate = gate_for(name, model)
    ids, mask = batch(torch.randint(3, 64, (3, 30)), (0, 5, 14))
    with attach(model, methods.full.policy(slack=SLACK)) as cache, torch.no_grad():
        for part in (slice(0, 17), slice(17, 30)):
            model(
                ids[:, part], attention_mask=mask[:, : part.stop], position_ids=position_ids(mask)[:, part],
                past_key_values=cache,
            )  # fmt: skip
        found = probe_attention(model, cache, gate)
    for row, pad in enumerate((0, 5, 14)):
        for layer, wanted in enumerate(stock_attention(model, gate, ids[row, pad:])):
            position = cache.positions(layer)[row]
            for head in range(4):
                held = position[head // 2] >= 0
                at = position[head // 2][held].long() - pad
                got = found[layer][row, head // 2, head % 2]
                assert sorted(at.tolist()) == list(range(30 - pad))
                close(got[:, held].double(), wanted[head][:, at])
                assert bool((got[:, ~held] == 0).all())
                assert bool((got.sum(-1) < 1).all())


@pytest.mark.parametrize("name", NAMES)
def test_an_event_evicts_what_the_probe_looks_at_least(name):
    """Until the first eviction nothing is missing below, so one pass of the stock model tells it: 16 tokens, 14 stay."""
    model = tiny()
    gate = gate_for(name, model)
    ids = torch.randperm(61)[None, :16] + 3
    with attach(model, policy_for(name, gate), record=True) as cache, torch.no_grad():
        prefill(model, cache, ids)
    expiry = cache.trace().expiry
    for layer, attended in enumerate(stock_attention(model, gate, ids[0])):
        mean = attended.mean(1)
        if name == "lookahead_kv":
            mean = mean / mean.sum(-1, keepdim=True)
        for head in range(2):
            score = mean[2 * head : 2 * head + 2].mean(0)
            free = range(SINKS, 16 - SLACK)
            gone = sorted(free, key=lambda j, score=score: (float(score[j]), j))[: 16 - BUDGET]
            assert (expiry[layer, 0, head] != NEVER).nonzero().flatten().tolist() == sorted(gone)
            assert bool((expiry[layer, 0, head, gone] == 16).all())


# --- no trace ---


@pytest.mark.parametrize("model_name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("name", NAMES)
def test_a_probe_leaves_no_trace(name, model_name):
    """Asked at every event by a policy that then keeps all: logits, slots and windows are those without a probe, to the bit."""
    model = zoo.build(model_name)
    ids, mask = batch(zoo.distinct_tokens(model, 2, 36), (0, 6))
    attended: list[Any] = []
    silent = hashed(BUDGET, slack=SLACK, verb=lambda signals: None)
    probing = replace(
        silent, probe=gate_for(name, model), verb=lambda signals: attended.append(signals.probe_attention)
    )
    with_probe, without = (
        read(model, policy, ids, mask, [2] * 18) for policy in (probing, silent)
    )  # events end forwards
    assert len(attended) > 2 * len(with_probe.cache.evicting)
    assert all(part is not None and bool((part > 0).any()) for part in attended)
    assert torch.equal(with_probe.logits, without.logits)
    for one, other in zip(with_probe.cache.layers, without.cache.layers, strict=True):
        mine, its = (part.store if hasattr(part, "store") else part for part in (one, other))
        assert torch.equal(mine.keys, its.keys)
        assert torch.equal(mine.values, its.values)


def test_two_conversations_are_asked_apart():
    """Taking turns on one model, one of them with deltas: each hears what it hears alone."""
    model = tiny()
    gates = [gate_for(name, model) for name in NAMES]
    texts = torch.randint(3, 64, (2, 1, 20))
    alone = []
    with attach(model), torch.no_grad():
        for gate, text in zip(gates, texts, strict=True):
            cache = EvictingCache(model.config, methods.full.policy(slack=SLACK))
            model(text, past_key_values=cache)
            alone.append(probe_attention(model, cache, gate))
        caches = [EvictingCache(model.config, methods.full.policy(slack=SLACK)) for _ in gates]
        for part in (slice(0, 8), slice(8, 20)):
            for cache, gate, text in zip(caches, gates, texts, strict=True):
                model(text[:, part], past_key_values=cache)
                found = probe_attention(model, cache, gate)
                if part.stop == 20:
                    for layer, wanted in alone.pop(0).items():
                        close(found[layer], wanted)


def test_deltas_are_passed_by_the_probe_alone():
    """Fresh ones change nothing; another context's forward never passes them; afterwards the model is what it was."""
    model = tiny()
    ids = torch.randint(3, 64, (1, 9))
    before = model(ids).logits
    fresh = Gates.make("lookahead_kv", model).gate
    with fresh.adapted(model.model):
        assert torch.equal(model(ids).logits, before)
    gate = gate_for("lookahead_kv", model)
    with gate.adapted(model.model):
        assert not torch.allclose(model(ids).logits, before)
        assert torch.equal(contextvars.Context().run(lambda: model(ids).logits), before)
    assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_fused_projections_are_split():
    """Phi3's one matrix for queries, keys and values."""
    model = zoo.build("phi3")
    deltas = gate_for("lookahead_kv", model).deltas
    attention = model.model.layers[1].self_attn
    rows = torch.randn(2, 3, 32)
    plain = attention.qkv_proj(rows)
    with deltas.added_to(model.model), torch.no_grad():
        found = attention.qkv_proj(rows) - plain
    wanted = [rows @ deltas.down[part][1] @ deltas.up[part][1] * 4.0 for part in "qkv"]
    close(found, torch.cat(wanted, -1).detach())


# --- gradients ---


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    """Along a random direction of all parameters, through both layers."""
    model = tiny()
    gate = gate_for(name, model)
    ids = torch.randint(3, 64, (2, 20))
    weights = {layer: torch.randn(2, 2, 2, TOKENS, 1) * torch.rand(20) for layer in range(2)}
    with attach(model, methods.full.policy(slack=32)) as cache:
        with torch.no_grad():
            model(ids, past_key_values=cache)
        room = cache.positions(0).shape[2]

        def value() -> torch.Tensor:
            attended = probe_attention(model, cache, gate)
            return sum(
                (attended[layer] * nn.functional.pad(weights[layer], (0, room - 20))).double().sum()
                for layer in attended
            )

        value().backward()
        torch.manual_seed(1)
        steps = [torch.randn_like(parameter) for parameter in gate.parameters()]
        slope = sum(float((p.grad * step).sum()) for p, step in zip(gate.parameters(), steps, strict=True))
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                for parameter, step in zip(gate.parameters(), steps, strict=True):
                    parameter += sign * 1e-3 * step
                ends.append(float(value()))
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=2e-2)
    assert all(bool((parameter.grad != 0).any()) for parameter in gate.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- refusals ---


def test_what_cannot_be_asked():
    model = tiny()
    gate = gate_for("judge_q", model)
    cache = EvictingCache(model.config, methods.full.policy(slack=SLACK))
    with attach(model):
        with pytest.raises(CacheError, match="read nothing"):
            probe_attention(model, cache, gate)
        model(torch.randint(3, 64, (1, 9)), past_key_values=cache)
    with pytest.raises(NotAttachedError, match="attach"):
        probe_attention(model, cache, gate)
    with (
        pytest.raises(ModelError, match=r"make the policy with the method's policy\(\)"),
        attach(model, replace(policy_for("judge_q", gate), probe=None)) as bare,
    ):
        model(torch.randint(3, 64, (1, 20)), past_key_values=bare)


def test_deltas_refuse_other_models():
    model = tiny()
    with pytest.raises(ModelError, match="qkv_proj"):
        projections(nn.Linear(2, 2))
    other = LowRank(Gates.make("judge_q", zoo.build("qwen3")).base().layout, 2, 4.0)
    with (
        pytest.raises(ModelError, match="q projection of layer 0 is 32 wide, not 64"),
        other.added_to(model.model),
    ):
        model(torch.randint(3, 64, (1, 4)))


# --- learning ---


def documents(lengths: list[tuple[int, int]]) -> list[Document]:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 64, (prompt + response,), generator=generator).tolist() for prompt, response in lengths]
    return [Document(ids, prompt, "random", 0) for ids, (prompt, _) in zip(rows, lengths, strict=True)]


def aligned(lengths: list[tuple[int, int]]) -> AlignedTexts:
    inputs = Collator(0)(documents(lengths))
    return AlignedTexts.align(inputs["input_ids"], inputs["attention_mask"], inputs["prompt_length"])


def test_texts_are_aligned_at_the_ends_of_their_prompts():
    lengths = [(20, 6), (9, 13), (14, 0)]
    texts = aligned(lengths)
    assert (texts.start, texts.first, texts.end) == (20, [0, 11, 6], [26, 33, 20])
    for row, document in enumerate(documents(lengths)):
        assert texts.ids[row][texts.valid[row]].tolist() == document.input_ids
        assert texts.valid[row].nonzero().flatten().tolist() == list(range(texts.first[row], texts.end[row]))


def test_cuts_are_moments_with_a_past_and_a_future():
    torch.manual_seed(0)
    texts = aligned([(20, 16), (9, 13), (14, 0)])
    config = ProbeConfig(period=4, response=8, cuts=6, horizon=3)
    seen = [draw_cuts(texts, config, BatchRandom.anew(3)) for _ in range(20)]
    for cuts in seen:
        assert [cut.column for cut in cuts] == sorted({cut.column for cut in cuts})
        ends = next(cut for cut in cuts if cut.column == 20)
        assert (ends.horizon, ends.rows.tolist()) == (8, [True, True, False])
        for cut in cuts:
            wanted = [first + 4 <= cut.column < end for first, end in zip(texts.first, texts.end, strict=True)]
            assert cut.rows.tolist() == wanted
            assert cut.column == 20 or any(
                (cut.column - first) % 4 == 0 for first, row in zip(texts.first, wanted, strict=True) if row
            )
    assert {cut.column for cuts in seen for cut in cuts} & set(range(20)), "never inside a prompt"
    assert {cut.column for cuts in seen for cut in cuts} & set(range(21, 40)), "never inside a response"
    with pytest.raises(DataError, match="goes on after 30 tokens"):
        draw_cuts(texts, ProbeConfig(period=30, cuts=0), BatchRandom.anew(3))


@pytest.mark.parametrize("reduce", [JUDGE_Q, LOOKAHEAD_KV])
def test_responses_are_the_mean_of_their_tokens(reduce):
    """Against attention of the stock model, row by row and without padding."""
    model, texts = tiny(), aligned([(12, 9), (7, 4)])
    everyone = torch.ones(2, dtype=torch.bool)
    cuts = [Cut(9, 5, everyone), Cut(12, 100, everyone)]
    found = response_attention(model, texts, cuts, reduce)
    for row, (first, end) in enumerate(zip(texts.first, texts.end, strict=True)):
        ids = texts.ids[row : row + 1, first:end]
        attentions = model(ids, output_attentions=True).attentions
        for cut, labels in zip(cuts, found, strict=True):
            now, last = cut.column - first, min(cut.column + cut.horizon, end) - first
            for layer, attention in enumerate(attentions):
                paid = attention[0, :, now:last, :now]
                if reduce.needs_keys:
                    paid = paid / paid.sum(-1, keepdim=True)
                close(labels[layer][row, :, first:], paid.mean(1))
                assert bool((labels[layer][row, :, :first] == 0).all())


def test_objectives_by_hand():
    probe = torch.tensor([[[[0.5, 0.25, 0.25]]], [[[1.0, 0.0, 0.0]]]])
    response = torch.tensor([[[[0.25, 0.75, 0.0]]], [[[0.0, 1.0, 0.0]]]])
    first = torch.tensor([True, False])
    assert float(attention_error(probe, response, first)) == pytest.approx(0.0625 + 0.25 + 0.0625)
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.25)
    assert float(attention_divergence(probe, response, first)) == pytest.approx(wanted, rel=1e-5)


def test_labels_find_their_slots():
    labels = torch.rand(1, 4, 5)
    position = torch.tensor([[[3, -1, 0], [1, 2, -1]]], dtype=torch.int32)
    found = at_slots(labels, position)
    assert torch.equal(found[0, 0, 1], torch.stack([labels[0, 1, 3], torch.tensor(0.0), labels[0, 1, 0]]))
    assert torch.equal(found[0, 1, 0], torch.stack([labels[0, 2, 1], labels[0, 2, 2], torch.tensor(0.0)]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_teaches_to_ask(name, tmp_path):
    """A few steps on a handful of texts bring the loss down; the base does not move, and gates are saved whole."""
    model = tiny()
    gates = Gates.make(name, model, num_tokens=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=4, learning_rate=3e-2, logging_steps=5,
        report_to="none", remove_unused_columns=False, use_cpu=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = ProbeTrainer(
        model=gates, args=arguments, train_dataset=documents([(24, 12), (30, 9), (18, 15), (21, 6)]),
        data_collator=Collator(0), base=model, config=ProbeConfig(period=4, response=8, cuts=1, horizon=6),
    )  # fmt: skip
    embedded = model.get_input_embeddings().weight
    assert all(bool((embedded == token).all(-1).any()) for token in gates.gate.embeddings)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    trainer.save_model(str(tmp_path))
    again = Gates.load(tmp_path, model)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in gates.state_dict().items())
    assert Budget.parse(again.policy(24, slack=4).budget).amount == 24
