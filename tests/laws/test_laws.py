"""The laws of eviction over every method and every kind of model.

By default each method meets each law on another model, so that every pair of (law, method), (law, model) and (method, model)
occurs. `pytest -m full` runs the whole product. The cells are printed at the end with the evictions that really happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import jaxtyping
import pytest
import torch

from learnevict import EvictingCache, Gates, attach, methods, replay
from learnevict.errors import CacheError
from learnevict.infer.layer import EvictingLayer
from learnevict.policy.policy import governor
from learnevict.signals import NEVER
from tests.closeness import close, distance
from tests.laws import zoo
from tests.laws.cases import AMPLE, BUDGET, ENDLESS, EXEMPT, LEARNED, LONG, RECENT, SINKS, VARIANTS, Case, random_gates
from tests.laws.naive import masked_logits, stock
from tests.laws.policies import hashed
from tests.laws.run import PADS, PROMPT, TURN, Reader, Run, SecondTurn, batch, held, occupied, pieces, read

CLOSE = 1e-4  # of the largest logit: float32 sums in another order, layer upon layer
SAME = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")


def bounded(case: Case) -> int:
    """Never more than budget + slack slots per head, by count and by the bytes of real storage."""
    if case.run.cache.evicting:
        budget = int(case.run.policy.budget.amount)
        check_slots(case.run, budget)
        check_bytes(case.run, budget)
    return case.count


def shares(run: Run, budget: int) -> list[int]:
    """Slots per head of every evicting layer after an event."""
    policy, num = run.policy, len(run.cache.evicting)
    own = [policy.allocator.layer_budget(budget, rank, num, policy.floor) for rank in range(num)]
    assert sum(own) == num * budget
    return [slots - (policy.schedule.slack == 0) for slots in own]


def held_shares(run: Run, budget: int) -> list[int]:
    """The same with slots in few bits, of which more go into the bytes."""
    store, layers = run.policy.store, (run.cache.layers[index] for index in run.cache.evicting)
    return [
        sum(store.split(share, run.policy.floor, *layer.storage.slot_bytes))
        for share, layer in zip(shares(run, budget), layers, strict=True)
    ]


def check_slots(run: Run, budget: int) -> None:
    """In every head at most the layer's share and the fresh tokens, after an event no less.

    Ragged heads: on average over the layer; scope "model": over all layers.
    """
    most_held = held_shares(run, budget)
    for moment in run.moments:
        for row, pad in enumerate(PADS):
            seen = max(moment.length - pad, 0)
            fresh = seen % run.policy.schedule.period
            if run.policy.scope == "model":
                counts = torch.stack([(position[row] >= 0).sum(-1) for position in moment.positions.values()]).float()
                assert float(counts.mean()) <= min(seen - fresh, shares(run, budget)[0]) + fresh
                assert fresh or float(counts.mean()) == min(seen, shares(run, budget)[0])
                continue
            for share, (index, position) in zip(most_held, moment.positions.items(), strict=True):
                counts = (position[row] >= 0).sum(-1)
                if run.policy.allocator.ragged:
                    counts = counts.sum(-1, keepdim=True) / len(counts)
                most = min(seen - fresh, share) + fresh
                where = f"layer {index}, row {row}: {counts.tolist()} slots after {seen} tokens, not {most}"
                assert bool((counts <= most).all()), where
                assert fresh or bool((counts == most).all()), where


def per_head(layer: EvictingLayer) -> int:
    """Bytes that heads take once, however many slots they hold: middle and reach of key channels."""
    return sum(part.nbytes for part in layer.store.stored if part.ndim == 4 and part.shape[2] == 1)


def check_bytes(run: Run, budget: int) -> None:
    """Storage is what the cache says, and no larger than budget + slack slots: layer by layer, and at any time in all."""
    cache, slack = run.cache, run.policy.schedule.slack
    layers = [cache.layers[index] for index in cache.evicting]
    parts = [layer.store.stored for layer in layers]
    slot = sum(part.shape[-1] * part.element_size() for part in (layers[0].store.keys, layers[0].store.values))
    each = len(PADS) * layers[0].store.position.shape[1] * slot * (1.05 if run.policy.allocator.ragged else 1.0)
    for layer, states, share in zip(layers, parts, shares(run, budget), strict=True):
        real = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in states}
        scales = sum(part.nbytes for part in states) - layer.nbytes
        assert sum(real.values()) - scales == layer.nbytes <= layer.peak_nbytes
        assert (scales > 0) == bool(run.policy.store.bits)
        assert run.policy.scope == "model" or sum(real.values()) <= each * (share + max(slack, 1)) + per_head(layer)
        assert run.policy.scope == "model" or layer.peak_nbytes <= each * (share + max(slack, 1))
    stock = [layer for layer in cache.layers if layer not in layers and layer.is_initialized]
    stay = sum(part.nbytes for layer in stock for part in (layer.keys, layer.values))
    assert cache.nbytes == run.moments[-1].nbytes == sum(layer.nbytes for layer in layers) + stay
    assert max(moment.nbytes for moment in run.moments) - stay <= each * len(layers) * (budget + slack)
    assert cache.peak_nbytes - stay <= each * len(layers) * (budget + slack)


def identity(case: Case) -> int:
    """A budget that holds everything changes no logit."""
    run = case.fresh_run(budget=AMPLE)
    expected = stock(case.model, run.ids, run.mask)
    assert run.evictions == 0
    close(run.logits, expected, SAME, run.mask)
    real = run.mask.bool()
    assert torch.equal(run.logits[real].argmax(-1), expected[real].argmax(-1))
    return 0


def masking(case: Case) -> int:
    """Evicting is masking: the same logits from a stock model told what each head may see, and from replay."""
    run = case.run
    if not run.cache.evicting:
        close(run.logits, stock(case.model, run.ids, run.mask), SAME, run.mask)
        return case.count
    expiry = run.trace.expiry
    close(run.logits, masked_logits(case.model, run.ids, run.mask, expiry), CLOSE, run.mask)
    with torch.no_grad():
        again = replay(case.model, run.ids, run.trace, run.mask).logits
    close(run.logits, again, CLOSE, run.mask)
    for moment in run.moments:
        for index, position in moment.positions.items():
            assert occupied(position) == held(expiry, run.mask, moment.length)[index]
    if case.evicts:
        full = distance(run.logits, stock(case.model, run.ids, run.mask), run.mask)
        assert full > 100 * CLOSE, "eviction changed nothing worth noticing, so this case shows nothing"
    return case.count


def rounding(run: Run) -> float:
    """How far logits of a row alone may be off: in few bits a number on the border of two codes may fall on either side."""
    return 10 * CLOSE if governor(run.policy).store.bits else CLOSE


def padding(case: Case) -> int:
    """A left-padded row answers and evicts as it does alone."""
    run = case.run
    for row, pad in enumerate(PADS):
        ids = run.ids[row : row + 1, pad:]
        mask = torch.ones_like(ids)
        alone = read(case.model, case.policy(ids, mask), ids, mask, pieces(PROMPT - pad, ids.shape[1]))
        close(run.logits[row : row + 1, pad:], alone.logits, rounding(run), mask)
        if run.cache.evicting:
            expiry = alone.trace.expiry
            shifted = torch.where(expiry == NEVER, NEVER, expiry + pad)
            assert torch.equal(run.trace.expiry[:, row : row + 1, :, pad:], shifted)
            assert bool((run.trace.expiry[:, row, :, :pad] == NEVER).all())
    return case.count


def isolation(case: Case) -> int:
    """Requests that take turns on one model, a stock cache among them, answer as they do one after the other."""
    model, texts = case.model, [case.text(seed) for seed in (0, 1)]
    policies = [case.policy(*text) for text in texts]
    with attach(model):
        caches = [EvictingCache(model.config, policy, record=True) for policy in policies]
        readers = [
            Reader(model, cache, *text, pieces(PROMPT, text[0].shape[1]))
            for cache, text in zip(caches, texts, strict=True)
        ]
        plain, logits = zoo.stock_cache(model), []
        ids, mask = texts[1]
        for moment, _ in zip(*readers, strict=True):
            start, stop = sum(part.shape[1] for part in logits), moment.length
            places = {"position_ids": readers[1].places[:, start:stop], "attention_mask": mask[:, :stop]}
            with torch.no_grad():
                logits.append(model(input_ids=ids[:, start:stop], past_key_values=plain, **places).logits)
    apart = [case.run, case.fresh_run(seed=1)]
    for reader, alone in zip(readers, apart, strict=True):
        close(reader.run().logits, alone.logits, CLOSE, alone.mask)
        if alone.cache.evicting:
            assert torch.equal(reader.cache.trace().expiry, alone.trace.expiry)
    close(torch.cat(logits, 1), stock(model, ids, mask), SAME, mask)
    return case.count


def gone(case: Case) -> int:
    """An evicted token never returns, and no token is held twice."""
    before: dict[int, list] = {}
    length = 0
    for moment in case.run.moments:
        for index, position in moment.positions.items():
            now = occupied(position)
            for row, heads in enumerate(now):
                for head, tokens in enumerate(heads):
                    assert len(set(tokens)) == len(tokens)
                    old = {token for token in tokens if token < length}
                    assert old <= set(before[index][row][head]) if length else not old
            before[index] = now
        length = moment.length
    return case.count


def guarded(case: Case) -> int:
    """Sinks, the recent window and the fresh block are held after every forward, in every head; the window may be the
    longer of the two, or the block."""
    for each in (case, replace(case, recent=LONG)):
        check_guards(each)
    return case.count


def check_guards(case: Case, run: Run | None = None) -> None:
    """Counted in the real tokens of a row, wherever its padding stands."""
    run, period = run or case.run, max(case.slack, 1)
    for moment in run.moments:
        for row, mask in enumerate(run.mask[:, : moment.length].bool()):
            tokens = mask.nonzero().flatten().tolist()
            block = max(len(tokens) - 1, 0) // period * period
            wanted = {*tokens[:SINKS], *tokens[max(0, len(tokens) - case.recent) :], *tokens[block:]}
            for index, position in moment.positions.items():
                for head in position[row]:
                    missing = wanted - set(head.tolist())
                    assert not missing, (
                        f"layer {index}, row {row}: {sorted(missing)} gone after {moment.length} columns"
                    )


def determinism(case: Case) -> int:
    """The same policy on the same text evicts the same tokens and gives the same bits."""
    again = case.fresh_run()
    assert torch.equal(again.logits, case.run.logits)
    if again.cache.evicting:
        assert torch.equal(again.trace.expiry, case.run.trace.expiry)
    return case.count


def turns(case: Case) -> int:
    """What follows the end of a row, and stands between its turns, is emptiness: each row goes on as it does alone."""
    turns = case.turns
    run = turns.read(case.model, case.policy(turns.ids, turns.mask))
    if not run.cache.evicting:
        return 0
    expiry = run.trace.expiry
    if (case.method, "masking") not in EXEMPT:
        assert distance(run.logits, masked_logits(case.model, run.ids, run.mask, expiry), run.mask) <= CLOSE
    check_guards(case, run)
    stock = len(run.cache.layers) - len(run.cache.evicting)
    for row in range(0 if stock else len(run.ids)):  # a stock sliding window counts columns
        one, real = turns.alone(row), run.mask[row].bool()
        alone = one.read(case.model, case.policy(one.ids, one.mask))
        assert distance(run.logits[row : row + 1, real], alone.logits, one.mask) <= rounding(run)
        column = torch.nn.functional.pad(real.nonzero().flatten() + 1, (1, 0)).int()
        ends = alone.trace.expiry
        there = torch.where(ends == NEVER, NEVER, column[ends.clamp_max(one.ids.shape[1]).long()])
        assert torch.equal(expiry[:, row : row + 1, :, real], there)
        assert bool((expiry[:, row, :, ~real] == NEVER).all())
    assert (run.evictions > 0) == case.evicts
    return run.evictions


def unchanged(case: Case) -> int:
    """Two turns with room for everything, rows ending early in the first, answer as a stock cache does; a mask that takes the
    padding behind their ends for text is refused."""
    model, turns = case.model, case.turns
    policy = case.policy(turns.ids, turns.mask, ENDLESS)
    right, wrong = ((0, TURN), (turns.end, 1), (None, TURN)), ((turns.end, TURN), (None, 1))
    for pad, size, ones in (*((*one, False) for one in right), *((*one, True) for one in wrong)):
        turn = SecondTurn(pad, size, ones)
        with attach(model, policy) as cache:
            if ones:
                with pytest.raises(CacheError, match="read padding"):
                    turn.read(model, cache, turns)
                continue
            found = turn.read(model, cache, turns)
        for logits, told in zip(found, stock_turns(case.model_name, turn), strict=True):
            close(logits, told, SAME)
    return 0


@cache
def stock_turns(model_name: str, turn: SecondTurn) -> list[torch.Tensor]:
    """What a stock cache answers, once for all methods."""
    case = Case("full", model_name)
    return turn.read(case.model, zoo.stock_cache(case.model), case.turns)


LAWS: dict[str, Callable[[Case], int]] = {
    law.__name__: law
    for law in (bounded, identity, masking, padding, isolation, gone, guarded, determinism, turns, unchanged)
}


def cells() -> Iterator[tuple[str, str, str]]:
    """(law, method, model) such that all pairs occur: a Latin square over the models that evict."""
    for m, method in enumerate(VARIANTS):
        for k in range(max(len(zoo.EVICTING), len(LAWS))):
            yield list(LAWS)[(m + k) % len(LAWS)], method, zoo.EVICTING[k % len(zoo.EVICTING)]
        yield "masking", method, zoo.STOCK_ONLY[m % len(zoo.STOCK_ONLY)]


PAIRWISE = [cell for cell in cells() if cell[1::-1] not in EXEMPT]
FURTHER = [("masking", "snapkv", model) for model in zoo.MORE]
PRODUCT = [
    (law, method, model)
    for model in (*zoo.MODELS, *zoo.MORE)
    for method in VARIANTS
    for law in LAWS
    if (method, law) not in EXEMPT and (law, method, model) not in PAIRWISE + FURTHER
]


QUICK = ("keep_only", "snapkv", "adakv/slack0", "h2o/together_slack0", "foresightkv/shares", "dbtrimkv", "lookahead_kv")
"""Methods that between them go all ways through the core: `scripts/check` asks these, and shapes are checked with them."""


@pytest.fixture
def shapes(method) -> Iterator[None]:
    """Checks of shapes, at every call, take as long as a law itself: each method has them in its own tests."""
    jaxtyping.config.update("jaxtyping_disable", method not in QUICK)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def check(law_matrix, law: str, method: str, model: str) -> None:
    law_matrix.record(law, method, model, LAWS[law](Case(method, model)))


@pytest.mark.law
@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize(
    ("law", "method", "model"),
    [pytest.param(*cell, marks=() if cell[1] in QUICK else pytest.mark.slow) for cell in PAIRWISE + FURTHER],
)
def test_law(law_matrix, law, method, model):
    check(law_matrix, law, method, model)


@pytest.mark.full
@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize(("law", "method", "model"), PRODUCT)
def test_law_in_full(law_matrix, law, method, model):
    check(law_matrix, law, method, model)


@pytest.mark.parametrize(("method", "law"), EXEMPT)
def test_an_exempt_method_really_breaks_the_law(method, law):
    with pytest.raises(AssertionError):
        LAWS[law](Case(method, "llama"))


def test_all_pairs_occur():
    """Of laws, methods and models; an exempt (method, law) may be missing, and with it nothing else."""
    seen = PAIRWISE
    assert {(method, law) for law, method, _ in seen} | set(EXEMPT) == {(m, law) for m in VARIANTS for law in LAWS}
    assert {(law, model) for law, _, model in seen} >= {(law, model) for law in LAWS for model in zoo.EVICTING}
    missing = {(m, model) for m in VARIANTS for model in zoo.EVICTING} - {(m, model) for _, m, model in seen}
    assert {method for method, _ in missing} <= {method for method, _ in EXEMPT}


@pytest.mark.parametrize(
    ("method", "budget", "slack", "page"), [("adakv", 424, 16, 11), ("lopsided", 124, 4, 3), ("adakv", 84, 0, 2)]
)
def test_pages_of_several_slots(method, budget, slack, page):
    """Ragged heads of large budgets: rounding to pages stays within 5 %, and nothing is lost or mixed up in them."""
    model, length = zoo.build("llama"), budget + 46
    terms = {"slack": slack, "sinks": SINKS, "recent": RECENT}
    policy = hashed(budget, ragged=True, **terms) if method == "lopsided" else methods.adakv.policy(budget, **terms)
    ids, mask = batch(zoo.tokens(model, len(PADS), length))
    run = read(model, policy, ids, mask, pieces(length - 20, length))
    assert run.evictions > 0
    for index in run.cache.evicting:
        counts = (run.cache.positions(index) >= 0).sum(-1)
        assert run.cache.layers[index].store.page == page
        assert bool((counts[:, :1] != counts[:, 1:]).any())
    check_slots(run, budget)
    check_bytes(run, budget)
    close(run.logits, masked_logits(model, ids, mask, run.trace.expiry), CLOSE, mask)


def save_and_load(method: str, model: str, folder: str) -> int:
    """Gates survive a folder bit for bit, and evict the same tokens."""
    gates = random_gates(method, model)
    gates.save_pretrained(folder)
    again = Gates.load(folder, zoo.build(model))
    state = again.state_dict()
    assert set(state) == set(gates.state_dict())
    assert all(torch.equal(state[name].to(part.device), part) for name, part in gates.state_dict().items())
    case = Case(method, model)
    run = case.run
    options = {"slack": case.slack, "sinks": SINKS, "recent": RECENT}
    other = read(case.model, again.to(zoo.DEVICE).policy(BUDGET, **options), run.ids, run.mask)
    assert torch.equal(other.trace.expiry, run.trace.expiry)
    assert torch.equal(other.logits, run.logits)
    return case.count


SAVED = [(method, model) for method in LEARNED for model in zoo.EVICTING]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "model"), SAVED[::4])
def test_gates_survive_save_and_load(law_matrix, tmp_path, method, model):
    law_matrix.record("save and load", method, model, save_and_load(method, model, str(tmp_path)))


@pytest.mark.full
@pytest.mark.parametrize(("method", "model"), [pair for pair in SAVED if pair not in SAVED[::4]])
def test_gates_survive_save_and_load_in_full(law_matrix, tmp_path, method, model):
    law_matrix.record("save and load", method, model, save_and_load(method, model, str(tmp_path)))


@pytest.mark.parametrize("model", [name for name in zoo.EVICTING if name != "gpt_oss"])
def test_bfloat16_under_a_forced_trace(model):
    """Step by step equals replay of the same trace, within bfloat16; that free runs agree is not promised."""
    case = Case("random", model)  # scores do not depend on rounding, so the trace is forced
    half = zoo.fresh(model).to(torch.bfloat16)
    ids, mask = case.text()
    run = read(half, case.policy(ids, mask), ids, mask)
    assert torch.equal(run.trace.expiry, case.run.trace.expiry)
    with torch.no_grad():
        again = replay(half, ids, run.trace, mask).logits
    rounding = distance(again, masked_logits(zoo.build(model), ids, mask, run.trace.expiry).to(again), mask)
    assert distance(run.logits, again, mask) <= 2 * max(rounding, 0.02)
    assert all(
        layer.store.keys.dtype == torch.bfloat16 for layer in run.cache.layers if isinstance(layer, EvictingLayer)
    )
