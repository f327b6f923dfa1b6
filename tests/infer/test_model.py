"""Models and calls at the edge: served exactly, or refused in words; never served wrongly."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from learnevict import EvictingCache, Gates, attach, methods, testbed
from learnevict.errors import (
    BudgetError,
    CacheError,
    GateError,
    LabelError,
    ModelError,
    PromptInPiecesWarning,
    StockLayersWarning,
    TraceError,
    UnusedCacheWarning,
    UsageError,
)
from learnevict.hub import weight_hash
from learnevict.infer.generate import generate
from learnevict.oracle import golden, golden_labels, golden_trace
from learnevict.policy import Guard, Policy
from tests.closeness import close
from tests.laws import zoo
from tests.laws.cases import random_gates

SMALL: dict[str, Any] = {**zoo.COMMON, "num_hidden_layers": 2}
IDS = torch.arange(3, 43).view(1, 40) % zoo.VOCABULARY


def random_policy(budget: int | str = 20, **options: Any) -> Policy:
    return methods.random.policy(budget, **{"sinks": 2, "recent": 3, "slack": 4, **options})


def make(kind: str, **extra: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SMALL, **extra})
    return AutoModelForCausalLM.from_config(config).eval()


def linear_and_full() -> PreTrainedModel:
    return make(
        "Qwen3NextConfig", head_dim=16, layer_types=["linear_attention", "full_attention"], num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip


def step_by_step(model: PreTrainedModel, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        parts = [
            model(part, past_key_values=cache, use_cache=True).logits for part in IDS.split([30] + [1] * 10, dim=1)
        ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    "model",
    [
        linear_and_full,
        partial(make, "GPTNeoXConfig", rotary_pct=0.5),
        partial(make, "OlmoConfig"),
        partial(make, "GraniteConfig"),
    ],
    ids=["qwen3_next", "gpt_neox", "olmo", "granite"],
)
def test_other_families_are_served_exactly(model):
    """Linear layers stay stock, under any name the cache has in the module's signature."""
    base = model()
    with torch.no_grad():
        expected = base(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StockLayersWarning)
        with attach(base, random_policy(64)) as cache:
            close(step_by_step(base, cache), expected, 1e-4)
        with attach(base, random_policy(20), record=True) as cache:
            assert (step_by_step(base, cache) - expected).abs().max() > 1e-4
            assert cache.trace().evictions > 0


@pytest.mark.parametrize(
    "model",
    [
        partial(make, "DiffLlamaConfig"),
        partial(make, "JetMoeConfig", kv_channels=8, num_local_experts=2, num_experts_per_tok=1),
    ],
    ids=["two attention calls", "other keys than the cache's"],
)
def test_attention_that_is_not_plain_is_refused(model):
    base = model()
    with attach(base, random_policy(64)) as cache, pytest.raises((ModelError, CacheError)), torch.no_grad():
        base(IDS, past_key_values=cache, use_cache=True)
    assert not isinstance(cache, EvictingCache) or cache.clock.length == 0


def test_encoders_are_refused_and_become_decoders():
    with pytest.raises(ModelError, match="BertLMHeadModel attends in both directions"):
        attach(make("BertConfig"), random_policy())
    base = make("BertConfig", is_decoder=True)
    with torch.no_grad():
        expected = base(IDS).logits
    with attach(base, random_policy(64)) as cache:
        close(step_by_step(base, cache), expected)


@pytest.mark.full
def test_the_table_of_models_is_what_they_do():
    from tests.laws import compatibility

    found = compatibility.rows()
    assert not [row for row in found if row.outcome == "broken"]
    assert compatibility.page(found) == compatibility.FILE.read_text(encoding="utf-8"), (
        "python -m tests.laws.compatibility"
    )


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "opt"])
def test_the_table_of_models_says_that_they_are_served(name):
    """Three that another decoder holds than the one their outer class calls, or whose layers differ in width."""
    from tests.laws import compatibility

    (row,) = compatibility.rows([name])
    assert row.outcome == "served", row
    assert str(row) in compatibility.FILE.read_text(encoding="utf-8").splitlines()


def test_longrope_is_refused():
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = transformers.Phi3Config(
        **SMALL | {"max_position_embeddings": 128}, original_max_position_embeddings=32, rope_parameters=factors
    )
    with pytest.raises(ModelError, match="after 32 tokens"):
        EvictingCache(config, random_policy())


def test_a_cache_given_by_position_is_seen():
    base = zoo.build("llama")
    with attach(base, random_policy(64)) as cache, torch.no_grad():
        base.model(IDS, None, None, cache)
    assert cache.clock.length == 40


def test_attention_probabilities_are_not_promised():
    base = zoo.build("llama")
    with attach(base, random_policy()) as cache, pytest.raises(UsageError, match="output_attentions"):
        base(IDS, past_key_values=cache, output_attentions=True)


def test_a_new_prompt_in_a_used_cache_is_refused():
    base = zoo.build("llama")
    with attach(base, random_policy()) as cache, torch.no_grad():
        base(IDS, past_key_values=cache)
        with pytest.raises(CacheError, match=r"mask of 12 columns.*reset"):
            base(IDS[:, :8], attention_mask=torch.ones(1, 12), past_key_values=cache)


def test_attach_checks_the_base_of_gates():
    gates = Gates.make("foresightkv", zoo.build("qwen3"), hidden=4)
    with pytest.warns(UnusedCacheWarning):
        attach(zoo.build("qwen3"), gates.policy(40, slack=4)).detach()
    other = zoo.fresh("qwen3")
    other.lm_head.weight.add_(1.0)
    with pytest.raises(GateError, match="other weights"):
        attach(other, gates.policy(40, slack=4))
    with pytest.warns(UnusedCacheWarning):
        attach(other, gates.policy(40, slack=4, allow_other_base=True)).detach()
    for changed in ({"num_hidden_layers": 1}, {"num_attention_heads": 2}):
        with pytest.raises(GateError, match="another model"):
            attach(zoo.fresh("qwen3", **changed), gates.policy(40, slack=4, allow_other_base=True))


@pytest.mark.parametrize("method", ["foresightkv", "lookahead_kv"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_gates_serve_a_model_whose_weights_are_elsewhere(tmp_path, method, where):
    """Offloaded weights are meta tensors that hooks fill while a module runs."""
    from accelerate import cpu_offload, disk_offload

    policy = random_gates(method, "llama").policy(20, slack=4, sinks=2, recent=3)
    tokenizer, options = testbed.build_tokenizer(), {"max_new_tokens": 4, "record": True}
    (expected,) = generate(zoo.build("llama"), tokenizer, policy, IDS.tolist(), **options)
    away = zoo.fresh("llama")
    cpu_offload(away, "cpu") if where == "cpu" else disk_offload(away, str(tmp_path), "cpu")
    assert away.device.type == "meta"
    (found,) = generate(away, tokenizer, policy, IDS.tolist(), **options)
    assert found.tokens == expected.tokens
    assert found.trace is not None and expected.trace is not None and expected.trace.evictions > 0
    assert torch.equal(found.trace.expiry, expected.trace.expiry)


def test_weights_that_were_never_loaded_have_no_fingerprint():
    with pytest.raises(GateError, match="have not been loaded"):
        weight_hash(zoo.fresh("llama").to("meta"))


def test_gates_are_not_spread_over_devices():
    spread = zoo.fresh("llama")
    spread.model.layers[1].to("meta")
    with pytest.raises(GateError, match=r"compute on cpu and meta.*one device"):
        attach(spread, methods.foresightkv.policy(200, gate=random_gates("foresightkv", "llama").gate))
    with pytest.warns(UnusedCacheWarning):
        attach(spread, random_policy()).detach()


def test_any_changed_tensor_changes_the_fingerprint():
    base = zoo.fresh("llama", num_hidden_layers=5)
    seen = {weight_hash(base)}
    for parameter in base.parameters():
        with torch.no_grad():
            parameter += 1.0
        seen.add(weight_hash(base))
    assert len(seen) == 1 + len(list(base.parameters()))
    assert weight_hash(base) == weight_hash(base.to(torch.bfloat16))


def prompt_evictions(base: PreTrainedModel, schedule: str, pieces: list[int], **given: Any) -> list[int]:
    with attach(base, random_policy(schedule=schedule), record=True, **given) as cache, torch.no_grad():
        for part in IDS.split([*pieces, *([1] * (40 - sum(pieces)))], dim=1):
            base(part, past_key_values=cache)
    return sorted(set(cache.trace().expiry.flatten().tolist()) - {2**31 - 1})


@pytest.mark.parametrize("schedule", ["prefill_end", "prefill_only"])
def test_pieces_of_a_prompt_of_known_length_change_nothing(schedule):
    base = zoo.build("llama")
    whole = prompt_evictions(base, schedule, [30])
    assert whole[0] == 30 and (len(whole) > 1) == (schedule == "prefill_end")
    for pieces in ([16, 14], [29, 1], [10, 10, 10]):
        assert prompt_evictions(base, schedule, pieces, prompt_length=[30]) == whole
    assert prompt_evictions(base, schedule, [40], prompt_length=[30]) == whole, "prompt and answer in one forward"


@pytest.mark.parametrize("options", [{"schedule": "prefill_end"}, {"prompt": True}])
def test_pieces_of_a_prompt_of_unknown_length_are_said(options):
    base = zoo.build("llama")
    with attach(base, random_policy(**options)) as cache, torch.no_grad():
        base(IDS[:, :16], past_key_values=cache)
        with pytest.warns(PromptInPiecesWarning, match="prompt_length"):
            base(IDS[:, 16:30], past_key_values=cache)
        base(IDS[:, 30:31], past_key_values=cache)


def test_bytes_are_a_hard_total_with_a_protected_prompt_too():
    base = zoo.build("llama")
    with pytest.raises(BudgetError, match="hard total"):
        random_policy("64KiB", schedule="prefill_end")
    per_slot = 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, width, bytes
    total = 38 * per_slot
    with attach(base, random_policy(f"{total}B", prompt=True), prompt_length=[20]) as cache, torch.no_grad():
        base(IDS, past_key_values=cache)
    assert cache.peak_nbytes <= total
    assert (cache.positions(0)[0, 0] < 20).sum() >= 20, "the prompt is held"
    with (
        attach(base, random_policy(f"{total}B", prompt=True), prompt_length=[35]) as cache,
        torch.no_grad(),
        pytest.raises(BudgetError, match="protected prompt"),
    ):
        base(IDS, past_key_values=cache)


@pytest.mark.parametrize("options", [{"prompt": True, "budget": 32}, {"sinks": 20, "budget": 40}])
def test_a_recent_window_that_grows_with_the_budget_leaves_guards_alone(options):
    base = zoo.build("llama")
    policy = methods.h2o.policy(**{"slack": 4, "sinks": 2, **options})
    ids = torch.cat([IDS, IDS + 40, IDS], dim=1)
    with attach(base, policy, record=True, prompt_length=[30]) as cache, torch.no_grad():
        base(ids, past_key_values=cache)
    expiry = cache.trace().expiry
    guarded = 30 if options.get("prompt") else 20
    assert cache.trace().evictions > 0 and (expiry[..., :guarded] == 2**31 - 1).all()


def test_golden_refuses_labels_and_guards_of_another_roll():
    base = zoo.build("llama")
    mask = torch.ones_like(IDS)
    labels, _ = golden_labels(base, IDS, mask, block=11)  # as many blocks as of 10 or 13
    for block in (10, 13):
        with pytest.raises(LabelError, match="another block"):
            golden(labels, budget=30, block=block, guard=Guard(2, 3))
    trace = golden_trace(base, IDS, mask, budget=20, block=4, guard=Guard(0, 0))
    assert methods.golden.policy(20, trace=trace).guard == Guard(0, 0)
    with pytest.raises(TraceError, match="was rolled with"):
        methods.golden.policy(20, trace=trace, sinks=4, recent=8)


def test_multimodal_models_read_text_and_nothing_else():
    """Through the class that AutoModelForCausalLM opens; how its encoders attend is what it was afterwards."""
    base = zoo.fresh("gemma3_multimodal")
    base.set_attn_implementation({"": "eager", "text_config": "eager", "vision_config": "sdpa"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StockLayersWarning)
        with attach(base, random_policy(), record=True) as cache:
            base.generate(IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache, max_new_tokens=4)
            assert cache.trace().evictions > 0
            pixels = torch.zeros(1, 3, 28, 28)
            for given in ({"pixel_values": pixels}, {"mm_encoder_outputs": {"image": pixels}}):
                with pytest.raises(ModelError, match="text of multimodal models only"):
                    base(IDS, past_key_values=cache, **given)
    assert base.config.vision_config._attn_implementation == "sdpa"
    assert base.config.get_text_config()._attn_implementation == "eager"
