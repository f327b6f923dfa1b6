"""EvictingCache and attach: budgets, guards, hooks, resets, and what happens when something goes wrong."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, LlamaModel

from learnevict import EvictingCache, attach, methods
from learnevict.errors import (
    BudgetError,
    CacheError,
    ModelError,
    NotAttachedError,
    StockLayersWarning,
    UnusedCacheWarning,
    UsageError,
)
from learnevict.infer.attach import attention_function
from learnevict.infer.generate import generate
from learnevict.infer.model.supported import evicting_layers
from learnevict.infer.teacher_forcing import replay
from learnevict.policy import Guard
from learnevict.signals import NEVER
from tests.closeness import SUMS, close, distance
from tests.laws import zoo
from tests.laws.naive import masked_logits, position_ids, stock
from tests.laws.policies import hashed
from tests.laws.run import PADS, PROMPT, Reader, batch, pieces, read

CLOSE = 1e-4
SOME = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")
LENGTH = 52


def text(model: Any, seed: int = 0, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    return batch(zoo.tokens(model, len(PADS), length, seed))


def alone(model: Any, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    ids = zoo.tokens(model, 1, length)
    return ids, torch.ones_like(ids)


def num_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- hooks ---


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hooks_are_counted_and_removed_with_the_last(implementation):
    model = zoo.fresh("llama")
    model.set_attn_implementation(implementation)
    assert num_hooks(model) == 0
    outer, inner = attach(model), attach(model, hashed())
    hooks = num_hooks(model)
    assert hooks > 0
    with inner as cache, attach(model) as nothing, torch.no_grad():
        assert nothing is None
        assert num_hooks(model) == hooks
        model(alone(model)[0], past_key_values=cache)
    outer.detach()
    outer.detach()
    assert num_hooks(model) == 0
    assert model.config._attn_implementation == implementation


def test_the_first_to_attach_may_be_the_first_to_leave():
    model = zoo.fresh("llama")
    ids, mask = text(model)
    outer, inner = attach(model), attach(model, hashed())
    outer.detach()
    run = Reader(model, inner.cache, ids, mask, pieces(PROMPT, LENGTH)).finish()
    assert int((run.cache.positions(0) >= 0).sum((1, 2)).max()) <= 2 * 24
    inner.detach()
    assert num_hooks(model) == 0


def test_an_exception_in_the_block_removes_the_hooks():
    model = zoo.fresh("llama")
    with pytest.raises(KeyError), attach(model, hashed()):
        raise KeyError
    assert num_hooks(model) == 0
    assert model.config._attn_implementation == "eager"


def test_a_decoder_without_head_can_be_attached():
    whole = zoo.build("llama")
    model = LlamaModel(whole.config)
    model.load_state_dict(whole.model.state_dict())
    model.set_attn_implementation("eager")
    ids, mask = alone(model)
    with attach(model.eval(), hashed(), record=True) as cache, torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask, past_key_values=cache).last_hidden_state
    close(whole.lm_head(hidden), masked_logits(whole, ids, mask, cache.trace().expiry), CLOSE)
    assert num_hooks(model) == 0


@pytest.mark.parametrize("cache", ["none", "stock"])
@SOME
def test_an_attached_model_serves_stock_caches(cache):
    model = zoo.build("gemma2")
    ids, mask = text(model)
    expected = stock(model, ids, mask)
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    with attach(model), torch.no_grad():
        held = zoo.stock_cache(model) if cache == "stock" else None
        found = model(ids, attention_mask=mask, position_ids=places, past_key_values=held, use_cache=held is not None)
    close(found.logits, expected, 1e-5, mask)


def test_a_cache_can_be_used_without_with():
    model = zoo.fresh("llama")
    ids, mask = text(model)
    cache = EvictingCache(model.config, hashed(), record=True)
    with pytest.raises(NotAttachedError, match="attach"), torch.no_grad():
        model(ids, past_key_values=cache)
    attachment = attach(model)
    cache.reset()
    run = Reader(model, cache, ids, mask, pieces(PROMPT, LENGTH)).finish()
    attachment.detach()
    assert torch.equal(run.trace.expiry, read(model, hashed(), ids, mask).trace.expiry)


def test_threads_attach_and_detach_one_model():
    """All at once, each with a cache of its own; now and then one reads."""
    model = zoo.fresh("llama")
    ids, mask = alone(model)
    expected = read(model, hashed(), ids, mask).logits

    def work(seed: int) -> float:
        apart = 0.0
        for turn in range(200):
            with attach(model) if turn % 50 else attach(model, hashed()) as cache:
                if cache is not None:
                    found = Reader(model, cache, ids, mask, pieces(PROMPT, LENGTH)).finish().logits
                    apart = max(apart, distance(found, expected))
        return apart

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert max(pool.map(work, range(4))) <= SUMS
    finally:
        sys.setswitchinterval(interval)
    assert num_hooks(model) == 0
    assert "generate" not in vars(model)
    assert model.config._attn_implementation == "eager"


def test_a_cache_that_was_forgotten_is_named():
    """Nothing else tells that the figures are those of a full cache."""
    model = zoo.build("llama")
    ids, _ = alone(model)
    with pytest.warns(UnusedCacheWarning, match=r"read nothing.*past_key_values=cache"), torch.no_grad():  # noqa: SIM117
        with attach(model, hashed()) as cache:
            model(ids)
    assert cache.nbytes == 0
    attachment = attach(model, hashed())
    with pytest.warns(UnusedCacheWarning, match="read nothing"):
        attachment.detach()
    attachment.detach()
    with pytest.raises(KeyError), attach(model, hashed()):
        raise KeyError


# --- when something goes wrong ---


def checkpointed(model: Any) -> None:
    model.train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (checkpointed, UsageError, r"gradient checkpointing.*eval\(\)"),
        (lambda model: model.set_attn_implementation("sdpa"), UsageError, r"set_attn_implementation\('sdpa'\).*before"),
        (lambda model: model.config.update({"use_cache": False}), None, ""),
    ],
)
def test_what_was_changed_on_the_model_is_named(spoil, error, match):
    model = zoo.fresh("llama")
    ids, mask = alone(model)
    with attach(model, hashed()) as cache, torch.no_grad():
        spoil(model)
        with nullcontext() if error is None else pytest.raises(error, match=match):
            model(ids, attention_mask=mask, past_key_values=cache)
        if error is not None:
            assert cache.get_seq_length() == 0
    assert num_hooks(model) == 0
    assert model.config._attn_implementation == ("sdpa" if "sdpa" in match else "eager")


def test_an_attention_function_set_while_attached_is_named_in_a_replay_too():
    model = zoo.fresh("llama")
    ids, mask = alone(model)
    trace = read(model, hashed(), ids, mask).trace
    with attach(model):
        model.set_attn_implementation("sdpa")
        with pytest.raises(UsageError, match="set_attn_implementation"):
            replay(model, ids, trace, mask)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 1}, r"num_layers 1 \(the model has 2\)"),
        ({"num_hidden_layers": 3}, "num_layers 3"),
        ({"num_key_value_heads": 4, "head_dim": 16}, "num_heads 4"),
    ],
)
def test_a_cache_of_another_model_is_refused(changes, match):
    model, other = zoo.build("llama"), zoo.fresh("llama", **changes)
    ids, _ = alone(model)
    cache = EvictingCache(other.config, hashed())
    with attach(model), torch.no_grad(), pytest.raises(CacheError, match=match):
        model(ids, past_key_values=cache)
    same = EvictingCache(zoo.fresh("llama").config, hashed())
    with attach(model), torch.no_grad():
        model(ids, past_key_values=same)
    assert same.get_seq_length() == LENGTH


@pytest.mark.parametrize("given", ["alone", "of all columns", "of its own column"])
def test_another_prompt_of_one_token_is_refused(given):
    """It was answered from the first prompt; a step at position 0 is right only where a row has read nothing yet."""
    model = zoo.build("llama")
    ids, mask = batch(zoo.tokens(model, 3, LENGTH), (0, 3, LENGTH))
    step, first = ids[:, :1], torch.zeros(3, 1, dtype=torch.long)
    masks = {
        "alone": None,
        "of all columns": nn.functional.pad(mask, (0, 1), value=1),
        "of its own column": mask[:, -1:],
    }
    with attach(model, hashed()) as cache, torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache)
        with pytest.raises(CacheError, match=r"a single token at position 0 of row 0.*cache.reset\(\)"):
            model(step, attention_mask=masks[given], position_ids=first, past_key_values=cache)
        assert cache.get_seq_length() == LENGTH, "nothing was read, so the conversation may go on"
        places = torch.tensor([[LENGTH], [LENGTH - 3], [0]])
        model(step, attention_mask=masks["of all columns"], position_ids=places, past_key_values=cache)
        assert cache.get_seq_length() == LENGTH + 1


def test_a_batch_of_no_rows_is_refused():
    model = zoo.build("llama")
    none, (ids, mask) = torch.zeros(0, 5, dtype=torch.long), alone(model)
    with attach(model, hashed()) as cache, torch.no_grad():
        for _ in range(2):  # a new cache, and a used one
            for read in (model, model.generate):
                with pytest.raises(CacheError, match="no rows"):
                    read(none, past_key_values=cache)
            if not cache.get_seq_length():
                model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UsageError, match="token ids must be"):
            cache.starts_with(none)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("by", ["argument", "generation_config"])
def test_generation_without_cache_is_refused(by):
    model = zoo.fresh("llama")
    ids, mask = alone(model)
    how = {"use_cache": False} if by == "argument" else {}
    model.generation_config.use_cache = by == "argument"
    with attach(model, hashed()) as cache, pytest.raises(UsageError, match=r"use_cache=False.*use_cache=True"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, **how)
    assert cache.get_seq_length() == 0
    tokenizer: Any = SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: str(ids))
    found = generate(model, tokenizer, hashed(), [ids[0].tolist()], max_new_tokens=9)[0]
    model.generation_config.use_cache = True
    assert generate(model, tokenizer, hashed(), [ids[0].tolist()], max_new_tokens=9)[0].tokens == found.tokens


@pytest.mark.parametrize("ragged", [False, True])
def test_a_text_that_begins_with_a_forward_of_padding(ragged):
    model = zoo.build("llama")
    ids, mask = batch(zoo.tokens(model, 3, LENGTH), (9, 12, 14))
    run = read(model, hashed(ragged=ragged), ids, mask, [9, 30, *[1] * (LENGTH - 39)])
    assert run.evictions > 0
    assert torch.equal(run.trace.expiry, read(model, hashed(ragged=ragged), ids, mask).trace.expiry)


def test_an_interrupted_forward_asks_for_a_reset():
    model = zoo.fresh("llama")
    ids, mask = text(model)
    expected = read(model, hashed(), ids, mask)

    def fail(*_: object) -> None:
        raise ValueError("no luck")

    with attach(model, hashed(), record=True) as cache:
        reader = iter(Reader(model, cache, ids, mask, pieces(PROMPT, LENGTH)))
        next(reader)
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="no luck"):
            next(reader)
        handle.remove()
        with pytest.raises(CacheError, match=r"interrupted.*reset"), torch.no_grad():
            model(ids[:, :1], past_key_values=cache)
        assert torch.equal(stock_while_attached(model, ids, mask), stock_while_attached(model, ids, mask))
        cache.reset()
        again = Reader(model, cache, ids, mask, pieces(PROMPT, LENGTH)).finish()
    assert torch.equal(again.logits, expected.logits)
    assert torch.equal(again.trace.expiry, expected.trace.expiry)
    close(stock(model, ids, mask), masked_logits(model, ids, mask, None), CLOSE, mask)


def stock_while_attached(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@SOME
def test_reset_forgets_everything(name, ragged):
    model = zoo.build(name)
    first, second = text(model, 1), text(model, 2, LENGTH - 6)
    with attach(model, hashed(ragged=ragged), record=True) as cache:
        Reader(model, cache, *first, pieces(PROMPT, LENGTH)).finish()
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.nbytes == cache.aux_nbytes == cache.peak_nbytes == 0
        again = Reader(model, cache, *second, pieces(PROMPT, LENGTH - 6)).finish()
    expected = read(model, hashed(ragged=ragged), *second)
    assert torch.equal(again.logits, expected.logits)
    assert torch.equal(again.trace.expiry, expected.trace.expiry)


def test_another_batch_size_is_refused():
    model = zoo.build("llama")
    ids, _ = text(model)
    with attach(model, hashed()) as cache, torch.no_grad():
        model(ids[:2, :9], past_key_values=cache)
        with pytest.raises(CacheError, match=r"2 rows, but 3 rows.*reset"):
            model(ids[:, 9:12], past_key_values=cache)
        model(ids[:2, 9:12], past_key_values=cache)
    assert cache.get_seq_length() == 12


def test_masks_that_are_not_two_dimensional_are_refused():
    model = zoo.build("llama")
    ids, _ = text(model)
    with attach(model, hashed()) as cache, torch.no_grad():
        for mask in (torch.zeros(3, 1, 9, 9), {"full_attention": None}):
            with pytest.raises(CacheError, match="2D"):
                model(ids[:, :9], attention_mask=mask, past_key_values=cache)


def test_continuous_batching_is_refused():
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(CacheError, match="PagedAttentionCache"):
        attention_function(torch.nn.Module(), states, states, states, None, cache=object())


def test_models_and_layers_that_cannot_be_served():
    class Odd:
        pass

    with pytest.raises(ModelError, match=r"kind \['Odd'\]"):
        evicting_layers([Odd()])
    bloom = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="BloomForCausalLM"):
        attach(bloom)
    assert num_hooks(bloom) == 0


def test_stock_layers_are_named_in_a_warning():
    model = zoo.build("gemma2")
    with pytest.warns(StockLayersWarning, match=r"layers \[0\] keep their stock cache.*2 of 3"):
        EvictingCache(model.config, hashed())
    with pytest.warns(StockLayersWarning, match="0 of 2"):
        EvictingCache(zoo.build("mistral_window").config, hashed())


@pytest.mark.parametrize("ragged", [False, True])
def test_a_policy_that_keeps_too_much_is_caught(ragged):
    """Otherwise its slots would be overwritten."""
    model = zoo.build("llama")
    ids, mask = text(model)

    def greedy(signals):
        return signals.occupied

    with pytest.raises(CacheError, match=r"keep\(signals\) must not exceed"):
        read(model, hashed(ragged=ragged, verb=greedy), ids, mask)


@pytest.mark.parametrize("ragged", [False, True])
def test_any_verb_may_govern(ragged):
    """keep(signals) may name fewer slots than the budget, differently many per head, or nothing at all (None)."""
    model = zoo.build("llama")
    ids, mask = text(model)

    def thrifty(signals):
        newest = signals.age < torch.tensor([6, 11]).view(1, 2, 1)
        return newest & signals.occupied

    for verb in (thrifty, lambda signals: None):
        run = read(model, hashed(ragged=ragged, verb=verb), ids, mask)
        expected = masked_logits(model, ids, mask, run.trace.expiry)
        close(run.logits, expected, CLOSE, mask)
        assert (run.evictions > 0) == (verb is thrifty)


# --- budgets ---


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("slack", [4, 0])
def test_a_share_follows_the_length(slack, ragged):
    """ceil(share of the tokens the row has seen) at each event, but no less than guards, fresh block and one."""
    model = zoo.build("llama")
    ids, mask = text(model, length=80)
    policy = hashed("25%", slack=slack, ragged=ragged)
    run = read(model, policy, ids, mask)
    period = max(slack, 1)
    assert policy.floor == 2 + max(3, period) + 1
    grown = set()
    for moment in run.moments:
        for row, pad in enumerate(PADS):
            seen = moment.length - pad
            if seen % period == 0:
                target = max(math.ceil(seen / 4), policy.floor) - (slack == 0)
                assert int((moment.positions[0][row] >= 0).sum()) == 2 * target
                grown.add(target)
    assert len(grown) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["random", "adakv", "pyramidkv"])
@SOME
def test_bytes_are_a_hard_total(method, dtype):
    """Keys and values of one row over all evicting layers, slack and page rounding included; nearly all of it is used."""
    model = zoo.fresh("llama", num_hidden_layers=3).to(dtype)
    ids, mask = alone(model, 90)
    per_slot = 3 * 2 * 2 * 8 * torch.empty(0, dtype=dtype).element_size()
    total = 45 * per_slot + 7
    policy = methods.load(method).policy(f"{total}B", slack=4, sinks=2, recent=3)
    run = read(model, policy, ids, mask)
    assert run.evictions > 0
    assert run.cache.peak_nbytes <= total
    assert run.cache.peak_nbytes >= 0.93 * total
    small = methods.load(method).policy(f"{9 * per_slot}B", slack=4, sinks=2, recent=3)
    with pytest.raises(BudgetError, match=r"give at least \d+ bytes"):
        read(model, small, ids, mask)


def test_the_smallest_budget_that_an_error_names_works():
    model = zoo.build("llama")
    ids, mask = text(model)
    for slack in (0, 4):
        with pytest.raises(BudgetError) as caught:
            hashed(3, slack=slack)
        smallest = int(str(caught.value).split("smallest that works is ")[1].split()[0])
        with pytest.raises(BudgetError):
            hashed(smallest - 1, slack=slack)
        run = read(model, hashed(smallest, slack=slack), ids, mask)
        assert run.evictions > 0
        assert int((run.moments[-1].positions[0] >= 0).sum(-1).max()) <= smallest + slack


@pytest.mark.parametrize("ragged", [False, True])
def test_slack_zero_never_holds_one_more(ragged):
    model = zoo.build("llama")
    ids, mask = text(model)
    run = read(model, hashed(12, slack=0, ragged=ragged), ids, mask)
    slots = len(PADS) * 2 * 12
    per_slot = 2 * 8 * 4
    assert run.cache.layers[0].peak_nbytes <= slots * per_slot * (1.05 if ragged else 1)
    assert run.cache.aux_nbytes > 0
    assert run.cache.full_nbytes == 2 * len(PADS) * 2 * LENGTH * per_slot


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_protected_prompt_stays_and_the_budget_counts_the_rest(given, ragged):
    """Given its length, the prompt may be read in one forward with the answer."""
    model = zoo.build("llama")
    ids, mask = text(model, length=70)
    prompt = 30
    lengths = [prompt - pad for pad in PADS]
    policy = hashed(12, ragged=ragged, protect=True)
    with attach(model, policy, record=True, prompt_length=lengths if given else None) as cache:
        sizes = [60, 5, 5] if given else pieces(prompt, 70)
        run = Reader(model, cache, ids, mask, sizes).finish()
    expiry = run.trace.expiry
    assert bool((expiry[..., :prompt] == NEVER).all())
    assert bool((expiry[..., prompt:] != NEVER).any())
    for row, length in enumerate(lengths):
        taken = int((run.moments[-1].positions[0][row] >= 0).sum())
        over = (70 - PADS[row]) % 4
        assert taken == 2 * (length + 12 + over)
    close(run.logits, masked_logits(model, ids, mask, expiry), CLOSE, mask)


def test_prompt_length_must_fit_the_batch():
    model = zoo.build("llama")
    ids, _ = text(model)
    with attach(model, hashed(protect=True), prompt_length=[4]) as cache, torch.no_grad():
        match = "1 entries, but 3 rows"
        with pytest.raises(CacheError, match=match):
            model(ids[:, :9], past_key_values=cache)


def test_layers_may_hold_different_budgets():
    model = zoo.fresh("llama", num_hidden_layers=3)
    ids, mask = text(model, length=72)
    policy = methods.load("pyramidkv").policy(20, slack=4, sinks=2, recent=3)
    run = read(model, policy, ids, mask)
    held = [int((run.moments[-1].positions[layer][0] >= 0).sum()) // 2 for layer in range(3)]
    assert sum(held) == 3 * 20
    assert held[0] > held[1] > held[2]
    assert held == [policy.allocator.layer_budget(20, rank, 3, policy.floor) for rank in range(3)]
    per_head = [layer.nbytes // (len(PADS) * 2 * 2 * 8 * 4) for layer in run.cache.layers]
    assert per_head == [slots + 4 for slots in held], "storage is sized layer by layer"


def test_prefill_end_evicts_once_the_prompt_is_read():
    model = zoo.build("llama")
    ids, mask = text(model)
    run = read(model, hashed(prompt="end"), ids, mask)
    ends = run.trace.expiry[run.trace.expiry != NEVER]
    assert int(ends.min()) == PROMPT
    assert int(ends.max()) > PROMPT
    only = read(model, hashed(prompt="end", decode=False), ids, mask)
    assert set(only.trace.expiry[only.trace.expiry != NEVER].tolist()) == {PROMPT}
    for found in (run, only):
        close(found.logits, masked_logits(model, ids, mask, found.trace.expiry), CLOSE, mask)


def test_a_long_prompt_needs_no_more_room_than_the_budget():
    """The event loop runs inside one forward; storage is given back where the prompt had to be held whole."""
    model = zoo.build("llama")
    ids, _ = alone(model, 300)
    per_slot = 2 * 2 * 2 * 8 * 4
    with attach(model, hashed(20)) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.peak_nbytes <= 24 * per_slot
    with attach(model, hashed(20, prompt="end")) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.peak_nbytes >= 300 * per_slot // 2, "a layer at a time holds the whole prompt"
    assert cache.nbytes <= 24 * per_slot


def test_a_row_of_padding_disturbs_nobody():
    model = zoo.build("llama")
    ids, mask = text(model)
    mask[1, :PROMPT] = 0
    run = read(model, hashed(), ids, mask)
    assert bool(run.logits.isfinite().all())
    expected = masked_logits(model, ids, mask, run.trace.expiry)
    close(run.logits, expected, CLOSE, mask)


# --- rows ---


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("after", [PROMPT, PROMPT + 6])
@SOME
def test_rows_can_be_selected_and_repeated(name, ragged, after):
    """In the middle of a block; the rows go on as they would have alone."""
    model = zoo.build(name)
    ids, mask = text(model)
    policy = hashed(ragged=ragged)
    expected = read(model, policy, ids, mask).logits
    with attach(model, policy) as cache:
        Reader(model, cache, ids[:, :after], mask[:, :after], pieces(PROMPT, after)).finish()
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([2, 2, 0, 0])
        places = (mask.cumsum(-1) - 1).clamp_min(0)[rows]
        for column in range(after, LENGTH):
            here = slice(column, column + 1)
            with torch.no_grad():
                found = model(
                    ids[rows, here],
                    attention_mask=mask[rows, : column + 1],
                    position_ids=places[:, here],
                    past_key_values=cache,
                ).logits
            close(found, expected[rows, here], CLOSE)


def test_cropping_is_refused():
    cache = EvictingCache(zoo.build("llama").config, hashed())
    assert not cache.is_croppable
    for croppable in (cache, cache.layers[0]):
        with pytest.raises(CacheError, match="cannot be cropped"):
            croppable.crop(3)


def test_guards_are_counted_in_tokens_of_the_row():
    """Left padding is no sink."""
    model = zoo.build("llama")
    ids, mask = text(model)
    run = read(model, hashed(14), ids, mask)
    assert run.policy.guard == Guard(2, 3)
    for row, pad in enumerate(PADS):
        for head in run.moments[-1].positions[0][row]:
            assert {pad, pad + 1} <= set(head.tolist())
            assert not set(range(pad)) & set(head.tolist())


def test_a_stock_cache_of_the_model_is_left_alone():
    """Making an EvictingCache registers nothing that other caches would pick up."""
    EvictingCache(zoo.build("llama").config, hashed())
    kinds = {type(layer).__name__ for layer in DynamicCache(config=zoo.build("llama").config).layers}
    assert kinds == {"DynamicLayer"}
