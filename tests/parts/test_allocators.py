"""Heads of all layers that share one budget: the shares, one whole history against loops, real bytes, and reading in pieces."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from learnevict import attach, methods
from learnevict.config import Budget
from learnevict.errors import CacheError, UsageError
from learnevict.evals.viz import record
from learnevict.infer.generate import generate
from learnevict.infer.teacher_forcing import prefill, read_once, replay
from learnevict.parts.allocators import Together
from learnevict.policy import Guard, Policy, Schedule
from learnevict.signals import NEVER
from tests.closeness import close
from tests.laws import zoo
from tests.laws.naive import masked_logits, position_ids
from tests.laws.run import batch, pieces, read

SLACK, SINKS, RECENT, FLOOR = 4, 2, 3, 0.25
BUDGET = 20


def knorm(budget: int | str = BUDGET, slack: int = SLACK, floor: float = FLOOR, **options: Any) -> Policy:
    one = methods.knorm.policy(budget, slack=slack, sinks=SINKS, recent=RECENT, **options)
    return replace(one, scope="model", allocator=Together(floor))


# --- shares ---


def shares(scores: list[list[float]], safe: list[int], budget: int, floor: float) -> list[int]:
    """By loops: every head its floor, then the best of all the rest; of equal scores the lower head wins."""
    heads = len(scores)
    free = min(max(heads * budget - sum(safe), 0), sum(map(len, scores)))
    least = free * round(1000 * floor) // (1000 * heads)
    found = [min(least, len(part)) for part in scores]
    rest = sorted(
        (-value, head) for head in range(heads) for value in sorted(scores[head], reverse=True)[found[head] :]
    )
    for _, head in rest[: free - sum(found)]:
        found[head] += 1
    return [safe[head] + found[head] for head in range(heads)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("floor", [0.0, 0.2, 0.55, 1.0])
def test_counts(floor, ties):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(2, 5, 12, generator=generator)
        scores = (2 * scores).round() if ties else scores
        empty = torch.rand(2, 5, 12, generator=generator) < 0.2
        protected = (torch.rand(2, 5, 12, generator=generator) < 0.3) & ~empty
        scores = scores.masked_fill(empty, -torch.inf).masked_fill(protected, torch.inf)
        budget = torch.tensor([4 + seed % 7, 9])
        counts = Together(floor).counts(scores, protected, budget.int())
        for row in range(2):
            free = ~protected[row] & ~empty[row]
            rooms = [scores[row, head][free[head]].tolist() for head in range(5)]
            safe = protected[row].sum(-1).tolist()
            assert counts[row].tolist() == shares(rooms, safe, int(budget[row]), floor)
            assert int(counts[row].sum()) <= max(5 * int(budget[row]), sum(safe))


def test_the_floor_takes_nothing_from_a_head_that_wins():
    scores = torch.tensor([[[9.0, 8, 7, 6, 5, 4], [3.0, 2, 1, 0, -1, -2]]])
    nothing = torch.zeros_like(scores, dtype=torch.bool)
    assert Together(0.0).counts(scores, nothing, torch.tensor([3])).tolist() == [[6, 0]]
    assert Together(0.4).counts(scores, nothing, torch.tensor([3])).tolist() == [[5, 1]]
    assert Together(1.0).counts(scores, nothing, torch.tensor([3])).tolist() == [[3, 3]]


@pytest.mark.parametrize("floor", [-0.1, 1.1])
def test_a_floor_is_a_share(floor):
    with pytest.raises(UsageError, match="0 to 1"):
        Together(floor)


def test_uniform_heads_cannot_compete():
    with pytest.raises(UsageError, match="Together"):
        replace(methods.knorm.policy(BUDGET, slack=SLACK), scope="model")


# --- histories ---


def history(keys: dict[int, Any], length: int) -> dict[int, Any]:
    """Expiries by loops in float64; keys [H, T, d] by layer of one row."""
    heads = [(layer, head) for layer, part in keys.items() for head in range(len(part))]
    norms = {at: keys[at[0]][at[1]].double().norm(dim=-1).tolist() for at in heads}
    held: dict[tuple[int, int], list[int]] = {at: [] for at in heads}
    expiry = {at: [NEVER] * length for at in heads}
    for now in range(length):
        for at in heads:
            held[at].append(now)
        if (now + 1) % SLACK or sum(map(len, held.values())) <= len(heads) * BUDGET:
            continue
        safe = {at: [j for j in held[at] if j < SINKS or j > now - RECENT or j > now - SLACK] for at in heads}
        free = {at: [j for j in held[at] if j not in safe[at]] for at in heads}
        counts = shares(
            [[-norms[at][j] for j in free[at]] for at in heads], [len(safe[at]) for at in heads], BUDGET, FLOOR
        )
        for at, count in zip(heads, counts, strict=True):
            best = sorted(free[at], key=lambda j, at=at: (-norms[at][j], j), reverse=True)
            for j in best[count - len(safe[at]) :]:
                held[at].remove(j)
                expiry[at][j] = now + 1
    return expiry


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_a_history_equals_loops(name):
    """Keys depend on what was evicted below them, so they are read from a replay of the run itself."""
    model = zoo.build(name)
    ids, mask = batch(zoo.distinct_tokens(model, 2, 45), (0, 6))
    run = read(model, knorm(), ids, mask, [9, 20, *[1] * 16])
    seen: dict[int, Any] = {}
    with torch.no_grad():
        replay(model, ids, run.trace, mask, observe=lambda layer, received: seen.update({layer: received.key}))
    assert run.evictions > 0
    for row, pad in enumerate((0, 6)):
        wanted = history({layer: key[row, :, pad:] for layer, key in seen.items()}, 45 - pad)
        for (layer, head), expiry in wanted.items():
            found = run.trace.expiry[layer, row, head, pad:]
            assert torch.where(found == NEVER, NEVER, found - pad).tolist() == expiry
    amounts = {int(count) for index in run.cache.evicting for count in (run.cache.positions(index) >= 0).sum(-1)[0]}
    assert len(amounts) > 1, "all heads hold the same, so nothing was shared out"


@pytest.mark.parametrize("slack", [SLACK, 0])
def test_a_forced_trace_is_no_more_than_masking(slack):
    """The whole text in pieces, and step by step: the same trace, and logits of a stock model told what to see."""
    model = zoo.build("llama")
    ids, mask = batch(zoo.distinct_tokens(model, 3, 40))
    policy = knorm(slack=slack)
    run = read(model, policy, ids, mask, pieces(20, 40))
    with attach(model, policy, record=True) as cache, torch.no_grad():
        logits = prefill(model, cache, ids, mask)
    assert torch.equal(cache.trace().expiry, run.trace.expiry)
    close(logits, run.logits, 1e-4, mask)
    close(logits, masked_logits(model, ids, mask, run.trace.expiry), 1e-4, mask)


# --- storage ---


@pytest.mark.parametrize(("budget", "slack", "page"), [(304, 16, 8), (84, 0, 2)])
def test_real_bytes(budget, slack, page):
    """All layers together hold no more than uniform heads with as many slots, plus 5 % for pages; at any time, and as
    the meter says."""
    model, length = zoo.build("llama"), budget + 46
    policy = knorm(budget, slack, floor=0.1)
    ids, mask = batch(zoo.tokens(model, 3, length))
    most, slots = 0, budget + max(slack, 1)
    with attach(model, policy) as cache, torch.no_grad():
        prefill(model, cache, ids[:, : length - 20], mask[:, : length - 20], last=1)
        for step in range(length - 20, length):
            places = position_ids(mask)[:, step : step + 1]
            model(
                ids[:, step : step + 1], attention_mask=mask[:, : step + 1], position_ids=places, past_key_values=cache
            )
            parts = [part for layer in cache.layers for part in (layer.store.keys, layer.store.values)]
            real = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
            assert sum(real.values()) == cache.nbytes
            most = max(most, cache.nbytes)
    assert cache.layers[0].store.page == page
    per_slot = sum(
        part.shape[-1] * part.element_size() for part in (cache.layers[0].store.keys, cache.layers[0].store.values)
    )
    uniform = len(ids) * 2 * len(cache.layers) * per_slot * slots
    assert most <= cache.peak_nbytes <= 1.05 * uniform
    counts = torch.stack([(cache.positions(index) >= 0).sum(-1) for index in cache.evicting])
    assert int(counts.sum((0, 2)).max()) <= len(cache.layers) * 2 * slots
    assert bool((counts[0].sum(-1) != counts[1].sum(-1)).any()), "layers hold the same, so nothing was shared out"


class Reads(TorchFunctionMode):
    """Counts what the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(function, "__name__", "") in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu")
        return function(*args, **kwargs or {})


def test_an_event_waits_once_and_a_step_never():
    """Positions that a user gives would be looked at besides: at once on a CPU, where nothing waits, else one step later."""
    model = zoo.build("qwen3")
    ids = zoo.distinct_tokens(model, 1, 60)
    with attach(model, knorm()) as cache, torch.no_grad():
        prefill(model, cache, ids[:, :40])
        found = []
        for step in range(40, 52):
            with Reads() as reads:
                model(ids[:, step : step + 1], past_key_values=cache)
            found.append(reads.count)
    assert found == [int((step + 1) % SLACK == 0) for step in range(40, 52)]


# --- reading ---


def counted(model: Any, calls: list[int]) -> Any:
    """Notes how many columns go through the first layer at a time."""
    return model.model.layers[0].register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))


@pytest.mark.parametrize("how", ["tokens", "embeddings", "chunks", "a tuple"])
def test_a_forward_may_reach_beyond_events(how):
    """It is read in pieces, and nobody but the layers sees them: the same trace, logits and hidden states."""
    model = zoo.build("llama")
    ids, mask = batch(zoo.distinct_tokens(model, 2, 40), (0, 3))
    expected, calls = read(model, knorm(), ids, mask), []
    with attach(model, knorm(), record=True) as cache, torch.no_grad():
        handle = counted(model, calls)
        given = {"position_ids": position_ids(mask), "attention_mask": mask, "past_key_values": cache}
        if how == "chunks":
            parts = [
                {**given, "position_ids": given["position_ids"][:, part]} for part in (slice(0, 23), slice(23, 40))
            ]
            parts[0]["attention_mask"] = mask[:, :23]
            found = torch.cat([model(ids[:, :23], **parts[0]).logits, model(ids[:, 23:], **parts[1]).logits], 1)
        elif how == "embeddings":
            out = model(inputs_embeds=model.get_input_embeddings()(ids), output_hidden_states=True, **given)
            found = out.logits
            assert [tuple(state.shape[:2]) for state in out.hidden_states] == [(2, 40)] * (len(cache.layers) + 1)
            assert torch.equal(model.lm_head(out.hidden_states[-1]), found)
        elif how == "a tuple":
            found = model(ids, return_dict=False, **given)[0]
        else:
            found = model(ids, **given).logits
        handle.remove()
    assert len(calls) > 10
    assert sum(calls) == 40
    assert torch.equal(cache.trace().expiry, expected.trace.expiry)
    close(found, expected.logits, where=mask)


@pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")
def test_what_pieces_cannot_return():
    """And a forward that went wrong after its first pieces asks for a reset."""
    model = zoo.build("gpt_oss")
    ids = zoo.distinct_tokens(model, 1, 30)
    with attach(model, knorm()) as cache, torch.no_grad():
        with pytest.raises(UsageError, match="router_logits cannot be joined"):
            model(ids, past_key_values=cache, output_router_logits=True)
        cache.reset()
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: cache.get_seq_length() and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, past_key_values=cache)
        handle.remove()
        assert cache.get_seq_length() == SLACK
        with pytest.raises(CacheError, match=r"interrupted.*reset"):
            model(ids[:, SLACK:], past_key_values=cache)


@pytest.mark.filterwarnings("ignore::learnevict.errors.PaddingReadWarning")
def test_pieces_of_one_token_are_read_as_parts_of_their_turn():
    """Padding in the middle of a conversation, where a piece of a turn is a single column; and what its mask hides."""
    model = zoo.build("llama")
    ids = zoo.distinct_tokens(model, 2, 40)
    mask = torch.ones_like(ids)
    mask[0, 16:21] = mask[1, 15] = 0  # events end pieces at columns 16 and 17
    mask[1, 11:15] = 0  # these were padding after all
    with attach(model, knorm(), record=True) as cache, torch.no_grad():
        calls: list[int] = []
        prefill(model, cache, ids[:, :15], torch.ones_like(ids[:, :15]))
        handle = counted(model, calls)
        found = prefill(model, cache, ids[:, 15:], mask)
        handle.remove()
    assert calls[:2] == [1, 1]
    expected = masked_logits(model, ids, mask, cache.trace().expiry)[:, 15:]
    close(found, expected, 1e-4, mask[:, 15:])
    for index in cache.evicting:
        held = cache.positions(index)
        assert not bool(torch.isin(held[0], torch.arange(16, 21)).any())
        assert not bool(torch.isin(held[1], torch.arange(11, 16)).any())


def test_texts_read_once_are_read_in_step():
    """Rows that start anywhere are moved until their events coincide: a third of the forwards, the same logits."""
    model = zoo.build("llama")
    ids, mask = batch(zoo.distinct_tokens(model, 4, 42), (0, 5, 6, 7))
    calls, found = [], []
    handle = counted(model, calls)
    for reader in (prefill, read_once):
        calls.clear()
        with attach(model, knorm()) as cache, torch.no_grad():
            found.append((reader(model, cache, ids, mask), len(calls), cache.nbytes, cache.full_nbytes))
    handle.remove()
    (apart, many, *size), (once, few, *same) = found
    close(apart, once, 1e-4, mask)
    assert (many, few) == (36, 11)
    assert size == same


def test_prefill_of_other_policies_is_one_forward():
    model = zoo.build("llama")
    ids, mask = batch(zoo.distinct_tokens(model, 2, 30), (0, 3))
    calls = []
    handle = counted(model, calls)
    with attach(model, methods.knorm.policy(BUDGET, slack=SLACK)) as cache, torch.no_grad():
        last = prefill(model, cache, ids, mask, last=1)
    handle.remove()
    assert (len(calls), tuple(last.shape[:2])) == (1, (2, 1))


def test_generation_reads_prompts_in_pieces():
    """A batch of prompts answers as each of them does alone, and its trace is that of the text read once more."""
    model = zoo.build("llama")
    prompts = zoo.distinct_tokens(model, 2, 31).tolist()
    prompts[1] = prompts[1][:22]
    tokenizer: Any = SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: str(ids))
    found = generate(model, tokenizer, knorm(), prompts, batch_size=2, record=True, max_new_tokens=10)
    for prompt, both in zip(prompts, found, strict=True):
        alone = generate(model, tokenizer, knorm(), [prompt], max_new_tokens=10)[0]
        assert alone.tokens == both.tokens
        text = torch.tensor([prompt + both.tokens[:-1]])
        expiry = record(model, knorm(), text[0].tolist(), len(prompt)).expiry
        assert both.trace is not None
        assert both.trace.evictions > 0
        assert torch.equal(both.trace.expiry, expiry)


def test_a_protected_prompt_is_the_text_that_is_read():
    """A prompt read in pieces by a fresh cache is protected whole, and nothing warns."""
    model = zoo.build("llama")
    ids = zoo.distinct_tokens(model, 1, 50)
    policy = replace(knorm(), guard=Guard(SINKS, RECENT, prompt=True))
    with attach(model, policy, record=True) as cache, torch.no_grad():
        prefill(model, cache, ids[:, :18])
        for step in range(18, 50):
            model(ids[:, step : step + 1], position_ids=torch.tensor([[step]]), past_key_values=cache)
    expiry = cache.trace().expiry
    assert bool((expiry[..., :18] == NEVER).all())
    assert bool((expiry[..., 18:] != NEVER).any())


def test_rows_that_are_reordered_keep_their_shares():
    model = zoo.build("llama")
    ids, mask = batch(zoo.distinct_tokens(model, 2, 44), (0, 3))
    turn = torch.tensor([1, 0])
    answers = []
    for order in (torch.tensor([0, 1]), turn):
        with attach(model, knorm()) as cache, torch.no_grad():
            prefill(model, cache, ids[:, :30], mask[:, :30])
            cache.reorder_cache(order)
            answers.append((prefill(model, cache, ids[order, 30:], mask[order]), cache.nbytes))
    (plain, num_bytes), (turned, same) = answers
    close(plain[turn], turned, 1e-4)
    assert num_bytes == same


def test_keeping_too_much_is_said():
    class Greedy(Policy):
        def keep_together(self, layers):
            return [signals.occupied for signals in layers]

    model = zoo.build("llama")
    ids = zoo.distinct_tokens(model, 1, 30)
    policy = Greedy(
        Budget(BUDGET), knorm().scorer, Together(), Schedule(SLACK), Guard(SINKS, RECENT), name="greedy", scope="model"
    )
    with attach(model, policy) as cache, torch.no_grad(), pytest.raises(CacheError, match="leaves"):
        prefill(model, cache, ids)
