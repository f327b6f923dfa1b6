"""Estimates against what runs really hold, on the testbed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from learnevict import testbed
from learnevict.config import Budget
from learnevict.data.documents import Collator
from learnevict.data.opening import describe_base, longest_text, read_source
from learnevict.errors import UsageError
from learnevict.hub import Gates
from learnevict.infer.attach import attach
from learnevict.infer.teacher_forcing import prefill
from learnevict.oracle import golden_labels
from learnevict.policy import Guard, Policy, Schedule
from learnevict.train.run.estimate import Figures, estimate, memory_of, report, saved_bytes
from learnevict.train.run.phases import PHASES, RunPlan
from learnevict.train.trainers.pairwise import score_all
from learnevict.train.trainers.regression import StreamConfig, stream_loss
from learnevict.train.trainers.replay_states import record_states

TOKENS, ROWS, PERIOD = 256, 2, 16


@pytest.fixture(scope="module")
def base():
    model, tokenizer = testbed.load()
    return model.requires_grad_(False), tokenizer  # as trainers have it


@pytest.fixture(scope="module")
def text(base):
    """A batch without padding: input_ids and attention_mask [ROWS, TOKENS]."""
    batch = Collator(0)(read_source("testbed", base[1], ROWS))
    ids = batch["input_ids"][:, -TOKENS:]
    return ids, torch.ones_like(ids)


def figures(method: str, mode: str, *, budget: int = 64, **changes: object) -> Figures:
    plan = {"tokens": TOKENS, "rows": ROWS, "period": PERIOD, "budgets": (budget, budget), **changes}
    config, dtype = describe_base("testbed")
    return estimate(config, method, RunPlan(mode, dtype=dtype, **plan))


def test_weights_are_counted_exactly(base):
    found = figures("foresightkv", "replay", settings={"hidden": 8}, processes=4)
    gates = Gates.make("foresightkv", base[0], hidden=8)
    assert found.parameters == sum(weights.numel() for weights in base[0].parameters())
    assert found.base == sum(weights.nbytes for weights in base[0].parameters())
    assert found.gate_parameters == sum(weights.numel() for weights in gates.parameters())
    assert found.gates["DDP"] == 16 * found.gate_parameters
    assert figures("foresightkv", "replay", processes=64).gates["ZeRO-3"] < found.gates["DDP"] * 10


@pytest.mark.parametrize("budget", [36, 150])
def test_labels_caches_and_states_are_those_of_a_run(base, text, budget):
    """Labels and keys and values exactly, states within 20 %."""
    model, (ids, mask) = base[0], text
    found = figures("foresightkv", "replay", budget=budget, settings={"hidden": 8})
    gates = Gates.make("foresightkv", model, hidden=8)
    labels, _ = golden_labels(model, ids, mask, block=PERIOD)
    assert found.phases["labelling"]["labels"] == sum(part.nbytes for part in labels)
    stored = sum(part.half().nbytes for part in labels) // ROWS
    assert found.stored == stored

    states = record_states(
        model, gates.gate, list(labels), ids, mask, budget=budget, schedule=Schedule(PERIOD), guard=Guard(4, 8),
        own=torch.tensor([True, False]),
    )  # fmt: skip
    held = sum(
        part.nbytes for of in states.values() for kind in (of.features, of.targets, of.candidates) for part in kind
    )
    assert found.phases["recording"]["recorded states"] == pytest.approx(held, rel=0.2)
    inputs = {layer: of.stacked()[0] for layer, of in states.items()}
    learned = saved_bytes(lambda: score_all(gates.gate, inputs), gates.gate)
    assert found.phases["learning"]["gates"] == pytest.approx(learned, rel=0.2)

    with torch.no_grad(), attach(model, gates.policy(budget, slack=PERIOD, sinks=4, recent=8)) as cache:
        prefill(model, cache, ids, mask, last=1)
    ledger = 4 * 8 * (budget + PERIOD) * ROWS * 4 * 2  # eight numbers a slot, in 4 layers of 2 heads
    assert found.phases["recording"]["evicting cache"] == cache.peak_nbytes + ledger


@pytest.mark.parametrize(
    ("method", "settings", "rel"), [("kvzap", {}, 0.2), ("fast_kvzip", {}, 0.2), ("kvp", {"hidden": 8}, 0.3)]
)
def test_gates_hold_what_streaming_keeps(base, text, method, settings, rel):
    """What rankers keep depends on where the cuts fall."""
    model, (ids, mask) = base[0], text
    found = figures(method, "stream", settings=settings, cuts=8)
    gates = Gates.make(method, model, **settings)
    inputs = {"input_ids": ids, "attention_mask": mask, "stored_labels": None}
    torch.manual_seed(0)
    held = saved_bytes(lambda: stream_loss(gates.gate, model, inputs, StreamConfig(cuts=8)), gates.gate)
    parts = found.phases["reading"]
    assert parts["gates"] + parts["regret over all pairs"] == pytest.approx(held, rel=rel)


def test_activations_are_those_of_a_soft_forward(base, text):
    model, (ids, mask) = base[0], text
    settings = {"hidden": 8, "dropout": 0.0, "noise": 0.0}
    found = figures("trimkv", "soft", settings=settings)
    gates = Gates.make("trimkv", model, **settings)
    policy = Policy(Budget(1), gates.gate, schedule=Schedule(active=False))

    def forward() -> torch.Tensor:
        with attach(model, policy, soft=True):
            return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits

    held = saved_bytes(forward, gates.gate, model)
    parts = found.phases["learning"]
    assert parts["activations of the base"] + parts["gates"] == pytest.approx(held, rel=0.2)
    less = figures("trimkv", "soft", settings=settings, recompute=True)
    assert less.working < found.working


@pytest.fixture
def large(tmp_path) -> Path:
    """A folder with nothing but the configuration of a model of 8 billion weights."""
    shape = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return tmp_path


def test_a_program_can_be_asked_before_anything_is_there(large, capsys):
    from learnevict.train import distill

    flags = "--method kvzap --data nowhere --max_length 32768 --per_device_train_batch_size 1 --gpus 8 --dry-run"
    distill.main(distill.parse([*flags.split(), "--model", str(large), "--output_dir", str(large / "out")]))
    said = capsys.readouterr().out
    assert "8,190,735,360 weights" in said
    assert "1 x 32768 tokens a process, 8 processes" in said
    assert "Fits on GPUs of 80GiB" in said
    assert not (large / "out").exists()


def test_what_does_not_fit_is_said(large):
    from learnevict.infer.load import load_config

    config = load_config(str(large))
    plan = partial(RunPlan, tokens=32768, processes=8)
    assert "Does not fit on GPUs of 80GiB, however many" in report(
        estimate(config, "foresightkv", plan("replay")), "80GiB"
    )
    assert "a whole group of 8 traces" in report(
        estimate(config, "foresightkv", plan("grpo", rows=8, period=2048, tokens=8192)), "64GiB"
    )
    assert "Does not fit on GPUs of 8GiB" in report(estimate(config, "kvzap", plan("stream")), "8GiB")
    found = estimate(config, "kvzap", plan("stream"))
    assert found.base == 2 * found.parameters
    once, twice = (sum(estimate(config, "kvzap", plan("stream", rows=rows)).operations.values()) for rows in (1, 2))
    assert twice == pytest.approx(2 * once)


@pytest.mark.parametrize("mode", sorted(PHASES))
def test_every_mode_has_a_table(mode):
    method = {"stream": "kvpop", "soft": "dms", "probe": "judge_q"}.get(mode, "foresightkv")
    said = report(figures(method, mode), "1GiB")
    assert said.count("FLOP") >= 3
    assert "Fits" in said


def test_plans_and_memories_that_make_no_sense():
    with pytest.raises(UsageError, match="mode 'table' is unknown"):
        RunPlan("table", 100)
    with pytest.raises(UsageError, match="at least 1 token"):
        RunPlan("replay", 0)
    with pytest.raises(UsageError, match="is no memory"):
        memory_of("80")
    assert memory_of("1KiB") == 1024
    assert longest_text("testbed", 100) == 100
    assert longest_text("texts.jsonl", 77) == 77
