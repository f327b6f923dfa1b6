"""The laws of eviction over every method and every kind of model.

By default each method meets each law on another model, so that every pair of (law, method), (law, model) and (method, model)
occurs. `pytest -m full` runs the whole product. The cells are printed at the end with the evictions that really happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from learnevict import EvictingCache, Gates, attach, replay
from learnevict.infer.layer import EvictingLayer
from learnevict.signals import NEVER
from tests.laws import zoo
from tests.laws.cases import AMPLE, BUDGET, EXEMPT, LEARNED, RECENT, SINKS, VARIANTS, Case, random_gates
from tests.laws.judge import judge, stock
from tests.laws.run import PADS, PROMPT, Reader, held, occupied, pieces, read

CLOSE = 1e-4  # float32 sums in another order
SAME = 1e-5
SAME_TRAINED = 1e-4  # its logits reach 25, where float32 itself rounds at 3e-5
pytestmark = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")


def distance(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Largest difference of logits at real tokens."""
    return (one - other)[mask.bool()].abs().max().item()


def same(case: Case) -> float:
    """How far logits may be from the stock model's where nothing was evicted."""
    return SAME_TRAINED if case.model_name in zoo.TRAINED else SAME


def bounded(case: Case) -> int:
    """Never more than budget + slack slots per head, by count and by the bytes of real storage."""
    run, rows = case.run, len(PADS)
    cache, config = run.cache, case.model.config.get_text_config()
    layers = [cache.layers[index] for index in cache.evicting]
    if not layers:
        return case.count
    heads, ragged = config.num_key_value_heads, run.policy.allocator.ragged
    peak = BUDGET + case.slack
    for moment in run.moments:
        counts = torch.stack([(held >= 0).sum((1, 2)) for held in moment.positions.values()]).sum(0)
        assert bool((counts <= len(layers) * heads * peak).all()), (
            f"{counts.tolist()} slots after {moment.length} tokens"
        )
        seen = moment.length - torch.tensor(PADS, device=counts.device)
        settled = (seen % max(case.slack, 1) == 0) & (seen > 2 * BUDGET)
        full = len(layers) * heads * (BUDGET - (case.slack == 0))
        assert bool((counts[settled] == full).all()), f"{counts.tolist()} slots after an event, budget {full}"
    one = sum(part.shape[-1] * part.element_size() for part in (layers[0].store.keys, layers[0].store.values))
    most = len(layers) * rows * heads * peak * one * (1.05 if ragged else 1.0)
    for layer in layers:
        real = {part.untyped_storage().data_ptr(): part for part in (layer.store.keys, layer.store.values)}
        assert sum(part.untyped_storage().nbytes() for part in real.values()) == layer.nbytes
    stay = cache.nbytes - sum(layer.nbytes for layer in layers)
    assert sum(layer.nbytes for layer in layers) <= most
    assert max(moment.nbytes for moment in run.moments) - stay <= most
    assert sum(layer.peak_nbytes for layer in layers) <= most
    return case.count


def identity(case: Case) -> int:
    """A budget that holds everything changes no logit."""
    run = case.fresh_run(budget=AMPLE)
    expected = stock(case.model, run.ids, run.mask)
    assert run.evictions == 0
    assert distance(run.logits, expected, run.mask) <= same(case)
    real = run.mask.bool()
    assert torch.equal(run.logits[real].argmax(-1), expected[real].argmax(-1))
    return 0


def masking(case: Case) -> int:
    """Evicting is masking: the same logits from a stock model told what each head may see, and from replay."""
    run = case.run
    if not run.cache.evicting:
        assert distance(run.logits, stock(case.model, run.ids, run.mask), run.mask) <= same(case)
        return case.count
    expiry = run.trace.expiry
    assert distance(run.logits, judge(case.model, run.ids, run.mask, expiry), run.mask) <= CLOSE
    with torch.no_grad():
        again = replay(case.model, run.ids, run.trace, run.mask).logits
    assert distance(run.logits, again, run.mask) <= CLOSE
    for moment in run.moments:
        for index, position in moment.positions.items():
            assert occupied(position) == held(expiry, run.mask, moment.length)[index]
    if case.evicts:
        full = distance(run.logits, stock(case.model, run.ids, run.mask), run.mask)
        assert full > 100 * CLOSE, "eviction changed nothing worth noticing, so this case shows nothing"
    return case.count


def padding(case: Case) -> int:
    """A left-padded row answers and evicts as it does alone."""
    run = case.run
    for row, pad in enumerate(PADS):
        ids = run.ids[row : row + 1, pad:]
        mask = torch.ones_like(ids)
        alone = read(case.model, case.policy(ids, mask), ids, mask, pieces(PROMPT - pad, ids.shape[1]))
        assert distance(run.logits[row : row + 1, pad:], alone.logits, mask) <= CLOSE
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
        assert distance(reader.run().logits, alone.logits, alone.mask) <= CLOSE
        if alone.cache.evicting:
            assert torch.equal(reader.cache.trace().expiry, alone.trace.expiry)
    assert distance(torch.cat(logits, 1), stock(model, ids, mask), mask) <= same(case)
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
    """Sinks, the recent window and the fresh block are held after every forward, in every head."""
    period = max(case.slack, 1)
    for moment in case.run.moments:
        for row, pad in enumerate(PADS):
            seen = moment.length - pad
            block = max(seen - 1, 0) // period * period
            wanted = {*range(min(SINKS, seen)), *range(max(0, seen - RECENT), seen), *range(block, seen)}
            if case.slack == 0:  # the victim of this step is overwritten at the next one
                wanted.add(seen - 1)
            for index, position in moment.positions.items():
                for head in position[row]:
                    missing = {token + pad for token in wanted} - set(head.tolist())
                    assert not missing, f"layer {index}, row {row}: {sorted(missing)} gone after {moment.length} tokens"
    return case.count


def determinism(case: Case) -> int:
    """The same policy on the same text evicts the same tokens and gives the same bits."""
    again = case.fresh_run()
    assert torch.equal(again.logits, case.run.logits)
    if again.cache.evicting:
        assert torch.equal(again.trace.expiry, case.run.trace.expiry)
    return case.count


LAWS: dict[str, Callable[[Case], int]] = {
    law.__name__: law for law in (bounded, identity, masking, padding, isolation, gone, guarded, determinism)
}


def cells() -> Iterator[tuple[str, str, str]]:
    """(law, method, model) such that all pairs occur: a Latin square over the models that evict."""
    for m, method in enumerate(VARIANTS):
        for k, model in enumerate(zoo.EVICTING):
            yield list(LAWS)[(m + k) % len(LAWS)], method, model
        yield "masking", method, zoo.STOCK_ONLY[m % len(zoo.STOCK_ONLY)]


PAIRWISE = [cell for cell in cells() if cell[1::-1] not in EXEMPT]
PRODUCT = [
    (law, method, model)
    for model in zoo.MODELS
    for method in VARIANTS
    for law in LAWS
    if (method, law) not in EXEMPT and (law, method, model) not in PAIRWISE
]


def check(law_matrix, law: str, method: str, model: str) -> None:
    law_matrix.record(law, method, model, LAWS[law](Case(method, model)))


@pytest.mark.parametrize(("law", "method", "model"), PAIRWISE)
def test_law(law_matrix, law, method, model):
    check(law_matrix, law, method, model)


@pytest.mark.full
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


def round_trip(method: str, model: str, folder: str) -> int:
    """Gates survive save and load bit for bit, and evict the same tokens."""
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


ROUND_TRIPS = [(method, model) for method in LEARNED for model in zoo.EVICTING]


@pytest.mark.parametrize(("method", "model"), ROUND_TRIPS[::4])
def test_round_trip(law_matrix, tmp_path, method, model):
    law_matrix.record("round trip", method, model, round_trip(method, model, str(tmp_path)))


@pytest.mark.full
@pytest.mark.parametrize(("method", "model"), [pair for pair in ROUND_TRIPS if pair not in ROUND_TRIPS[::4]])
def test_round_trip_in_full(law_matrix, tmp_path, method, model):
    law_matrix.record("round trip", method, model, round_trip(method, model, str(tmp_path)))


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
    rounding = distance(again, judge(zoo.build(model), ids, mask, run.trace.expiry).to(again), mask)
    assert distance(run.logits, again, mask) <= 2 * max(rounding, 0.02)
    assert all(
        layer.store.keys.dtype == torch.bfloat16 for layer in run.cache.layers if isinstance(layer, EvictingLayer)
    )
