"""The oracle against a brute force in plain Python floats, written from the papers' tables and not from the code."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learnevict.errors import BudgetError, LabelError, UsageError
from learnevict.oracle import (
    GOLDEN,
    H2O,
    INDEX_MEM,
    JUDGE_Q,
    KVP,
    KVZAP,
    LOCRET,
    PRESETS,
    Reducers,
    future_attention,
    golden,
    horizon,
    per_head_output_weight,
    pool_groups,
    target,
)
from learnevict.policy import Guard
from learnevict.signals import NEVER
from tests.closeness import close

BATCH, QUERY_HEADS, HEADS, SIZE, WIDTH = 2, 4, 2, 4, 6
GROUP = QUERY_HEADS // HEADS


def mask(kind: str, length: int) -> torch.Tensor | None:
    """Real tokens: all, left-padded, or padded anywhere."""
    if kind == "none":
        return None
    valid = torch.ones(BATCH, length, dtype=torch.bool)
    valid[1, : length // 3] = False
    if kind == "anywhere":
        valid[0, length // 2 :: 3] = False
        valid[1, -2:] = False
    return valid


def layer(length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    make = {
        "query": (BATCH, QUERY_HEADS, length, SIZE),
        "key": (BATCH, HEADS, length, SIZE),
        "value": (BATCH, HEADS, length, SIZE),
        "output_weight": (QUERY_HEADS, WIDTH, SIZE),
        "hidden_norm": (BATCH, length),
    }
    made = {name: 1.5 * torch.randn(shape, dtype=torch.float64) for name, shape in make.items()}
    return made | {"hidden_norm": made["hidden_norm"].abs() + 0.5}


def inputs(reduce: Reducers, length: int, block: int, extra: tuple[str, ...]) -> dict:
    """Everything future_attention needs for `reduce`, and the named extras."""
    data = layer(length)
    chosen = {"query": data["query"], "key": data["key"]}
    if reduce.value == "contribution":
        chosen |= {name: data[name] for name in ("value", "output_weight", "hidden_norm")}
    if reduce.needs_queries or "queries" in extra:
        chosen["queries"] = torch.rand(BATCH, length) < 0.6
    if "keys per block" in extra:
        chosen["keys"] = torch.rand(BATCH, math.ceil(length / block), length) < 0.5
    elif reduce.needs_keys or "keys" in extra:
        chosen["keys"] = torch.rand(BATCH, length) < 0.5
    if "softcap" in extra:
        chosen["softcap"] = 0.7
    if "sinks" in extra:
        chosen["sinks"] = torch.randn(QUERY_HEADS, dtype=torch.float64)
    if "scaling" in extra:
        chosen["scaling"] = 0.3
    return chosen


def written(given: dict, b: int, h: int, i: int) -> float:
    """Norm of what query head h writes into the stream for key i."""
    return float((given["output_weight"][h] @ given["value"][b, h // GROUP, i]).norm())


def cast(given: dict, dtype: torch.dtype) -> dict:
    """The same inputs in another precision; masks stay masks."""
    return {name: part.to(dtype) if part.is_floating_point() else part for name, part in given.items()}


def dense(block: int, reduce: Reducers, valid: torch.Tensor | None, given: dict) -> dict:
    """One dict per row: {(q-head, rank of query, key column): per-query value}, with columns of its real tokens."""
    query, key = given["query"].tolist(), given["key"].tolist()
    rows = []
    for b in range(BATCH):
        columns = [i for i in range(len(key[0][0])) if valid is None or valid[b, i]]
        values, norms = {}, {}
        if reduce.value == "contribution":
            norms = {(h, i): written(given, b, h, i) for h in range(QUERY_HEADS) for i in columns}
        for h in range(QUERY_HEADS):
            for t, column in enumerate(columns):
                seen = {}
                for i in columns[: t + 1]:
                    if "keys" in given:
                        allowed = given["keys"][b] if given["keys"].ndim == 2 else given["keys"][b, t // block]
                        if not allowed[i]:
                            continue
                    product = sum(x * y for x, y in zip(query[b][h][column], key[b][h // GROUP][i], strict=True))
                    logit = product * given.get("scaling", SIZE**-0.5)
                    seen[i] = given["softcap"] * math.tanh(logit / given["softcap"]) if "softcap" in given else logit
                total = sum(math.exp(x) for x in seen.values())
                total += math.exp(given["sinks"][h]) if "sinks" in given else 0
                for i, logit in seen.items():
                    values[h, t, i] = logit if reduce.value == "logit" else math.exp(logit) / total
                    if norms:
                        values[h, t, i] *= norms[h, i] / float(given["hidden_norm"][b, column])
        rows.append((columns, values))
    return rows


def pooled(kind: str, numbers: list[float]) -> float:
    return {"mean": sum(numbers) / len(numbers), "sum": sum(numbers), "max": max(numbers)}[kind]


def brute(block: int, reduce: Reducers, valid: torch.Tensor | None, given: dict) -> torch.Tensor:
    """Block labels, one key and one block at a time."""
    length = given["query"].shape[2]
    heads = QUERY_HEADS if reduce.per_query_head else HEADS
    empty = -math.inf if reduce.value == "logit" or reduce.log else 0.0
    labels = torch.full((BATCH, heads, length, math.ceil(length / block)), empty, dtype=torch.float64)
    for b, (columns, values) in enumerate(dense(block, reduce, valid, given)):
        for m in range(math.ceil(len(columns) / block)):
            ranks = range(m * block, min((m + 1) * block, len(columns)))
            counted = [t for t in ranks if "queries" not in given or given["queries"][b, columns[t]]]
            for i in columns:
                per_head = []
                for h in range(QUERY_HEADS):
                    numbers = [values.get((h, t, i), empty if reduce.value == "logit" else 0.0) for t in counted]
                    per_head.append(pooled(reduce.query, numbers) if numbers else None)
                if per_head[0] is None:
                    continue
                if not reduce.per_query_head:
                    parts = [per_head[c * GROUP : (c + 1) * GROUP] for c in range(HEADS)]
                    per_head = [pooled(reduce.group, part) for part in parts]
                for head, number in enumerate(per_head):
                    labels[b, head, i, m] = (math.log(number) if number else -math.inf) if reduce.log else number
    return labels


CASES = [
    ("none", 4, ()),
    ("left", 5, ("softcap", "sinks")),
    ("anywhere", 3, ("queries", "scaling")),
    ("anywhere", 17, ("sinks", "keys")),
    ("left", 1, ("keys per block", "softcap")),
]


@pytest.mark.parametrize(("padding", "block", "extra"), CASES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_reduction_matches_brute_force(name, padding, block, extra):
    """Regression 11: rank and GQA order of every aggregation row, and 3: partial blocks are not diluted by padding."""
    reduce, length = PRESETS[name], 17
    chosen, valid = inputs(reduce, length, block, extra), mask(padding, length)
    labels = future_attention(**chosen, block=block, valid=valid, reduce=reduce, out_dtype=torch.float64)
    close(labels, brute(block, reduce, valid, chosen), 1e-9)
    assert torch.isfinite(labels).any()


LOGITS = replace(LOCRET, needs_queries=False)


@pytest.mark.parametrize("reduce", [GOLDEN, LOGITS, Reducers(query="max"), Reducers(query="sum", group="sum")])
def test_blocks_longer_than_a_tile(reduce):
    chosen = inputs(reduce, 150, 140, ())
    labels = future_attention(**chosen, block=140, reduce=reduce, out_dtype=torch.float64)
    close(labels, brute(140, reduce, None, chosen), 1e-9)


def test_value_norm_without_projection():
    reduce = Reducers(value="contribution", query="sum", group="none")
    data = layer(11)
    chosen = {name: data[name] for name in ("query", "key", "value")}
    labels = future_attention(**chosen, block=4, reduce=reduce, out_dtype=torch.float64)
    plain = brute(4, replace(reduce, value="prob"), None, chosen)
    close(labels, plain * data["value"].norm(dim=-1).repeat_interleave(GROUP, 1).unsqueeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_float32(dtype):
    chosen = cast(inputs(GOLDEN, 40, 8, ()), dtype)
    labels = future_attention(**chosen, block=8)
    exact = future_attention(**cast(chosen, torch.float64), block=8, out_dtype=torch.float64)
    assert labels.dtype == torch.float32
    close(labels, exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_reduction_in_float32(name):
    """As models hand them over: blocks of more than one tile, a last one that is not full, a padded row."""
    reduce, block, length = PRESETS[name], 131, 300
    chosen, valid = cast(inputs(reduce, length, block, ()), torch.float32), mask("left", length)
    labels = future_attention(**chosen, block=block, valid=valid, reduce=reduce)
    exact = brute(block, reduce, valid, cast(chosen, torch.float64))
    there = exact.isfinite()
    assert labels.dtype == torch.float32 and torch.equal(labels.isfinite(), there)
    close(labels, exact, where=there)


def test_partial_block_is_a_mean_over_real_rows():
    """Regression 3: attention of a partial block sums to one, as a mean over its real rows must."""
    labels = future_attention(**inputs(GOLDEN, 10, 4, ()), block=4, out_dtype=torch.float64)
    close(labels.sum(2), torch.ones(BATCH, HEADS, 3, dtype=torch.float64))


def test_padding_changes_nothing():
    chosen, valid = inputs(GOLDEN, 17, 4, ("sinks",)), mask("left", 17)
    together = future_attention(**chosen, block=4, valid=valid)
    alone = {name: x if name == "sinks" else x[1:, :, 5:] for name, x in chosen.items()}
    assert torch.equal(together[1:, :, 5:, :3], future_attention(**alone, block=4))
    assert not together[1, :, :5].any()
    assert not together[1, :, :, 3:].any()


def test_targets_in_the_words_of_the_papers():
    """Horizons of 7.1, from dense attention: the group comes last in KVP, the past and not the future in H2O."""
    block, length, valid = 3, 11, mask("left", 11)
    chosen = inputs(GOLDEN, length, block, ())
    rows = dense(block, GOLDEN, valid, chosen)
    reach = {name: future_attention(**chosen, block=block, valid=valid, reduce=PRESETS[name]) for name in PRESETS_PLAIN}
    got = {name: target(labels, PRESETS[name], HEADS, valid=valid) for name, labels in reach.items()}
    cut = 2
    for b, (columns, values) in enumerate(rows):
        for i in columns:
            late = [[values.get((h, t, i), 0.0) for t in range(cut * block, len(columns))] for h in range(QUERY_HEADS)]
            early = [[values.get((h, t, i), 0.0) for t in range((cut + 1) * block)] for h in range(QUERY_HEADS)]
            for c in range(HEADS):
                group = range(c * GROUP, (c + 1) * GROUP)
                close(got["kvp"][b, c, i, cut], max(sum(late[h]) for h in group), scale=1.0)
                past = sum(sum(early[h]) for h in group) / GROUP
                close(got["h2o"][b, c, i, cut], past, scale=1.0)
            for h in range(QUERY_HEADS):
                peaks = {j: max(values.get((h, t, j), 0.0) for t in range(cut * block, len(columns))) for j in columns}
                share = math.exp(peaks[i]) / sum(math.exp(x) for x in peaks.values())
                close(got["indexmem"][b, h, i, cut], share, scale=1.0)


PRESETS_PLAIN = ("kvp", "h2o", "indexmem")


@pytest.mark.parametrize("window", [None, 1, 2, 9])
def test_horizon(window):
    labels = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    for m in range(7):
        ahead = labels[..., m : None if window is None else m + window]
        close(horizon(labels, "max", window=window)[..., m], ahead.amax(-1))
        close(horizon(labels, "sum", window=window)[..., m], ahead.sum(-1))
        faded = sum(0.5**j * labels[..., m + j] for j in range(7 - m))
        close(horizon(labels, "discounted", discount=0.5)[..., m], faded)
        close(horizon(labels, "past")[..., m], labels[..., : m + 1].sum(-1))


def test_per_head_output_weight_is_the_projection():
    value, weight = torch.randn(QUERY_HEADS, SIZE), torch.randn(WIDTH, QUERY_HEADS * SIZE)
    per_head = per_head_output_weight(weight, QUERY_HEADS)
    close(torch.einsum("hed,hd->e", per_head, value), weight @ value.flatten())


SCORES = {
    "max": lambda ahead: max(ahead, default=0.0),
    "sum": sum,
    "discounted": lambda ahead: sum(0.5**j * x for j, x in enumerate(ahead)),
}


def naive_row(labels, guard, prompt, case):
    """Returns the expiry of one row and head in unpadded positions, by deleting and recomputing; labels [tokens][blocks]."""
    block, target_size = case["block"], case["budget"] - (case["block"] == 1)
    expiry, held = [NEVER] * len(labels), []
    for m in range(len(labels) // block):
        held += range(m * block, (m + 1) * block)
        spared = set(range(guard.sinks)) | set(held[len(held) - guard.recent :]) | set(range(prompt))
        oldest = [i for i in held if i >= prompt][:target_size]
        while len([i for i in held if i >= prompt]) > target_size:
            able = [i for i in held if i not in spared and i < m * block]
            if case["candidates"] == "oldest":
                able = [i for i in held if i in oldest and i not in spared]
            victim = min(able, key=lambda i: (SCORES[case["horizon"]](labels[i][m + 1 :]), i))
            held.remove(victim)
            expiry[victim] = (m + 1) * block
    return expiry


@st.composite
def rolls(draw):
    """A small batch with labels of few values, so that ties are common and sums exact."""
    block, length = draw(st.integers(1, 5)), draw(st.integers(1, 24))
    guard = Guard(draw(st.integers(0, 4)), draw(st.integers(0, 7)), draw(st.booleans()))
    valid = torch.tensor([[draw(st.integers(0, 4)) > 0 for _ in range(length)] for _ in range(BATCH)])
    smallest = guard.sinks + max(guard.recent, block) + (block == 1)
    shape = (draw(st.integers(1, 2)), BATCH, HEADS, length, math.ceil(length / block))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    labels = torch.randint(0, draw(st.integers(2, 40)), shape, generator=generator) / 64.0
    return {
        "labels": labels,
        "valid": valid,
        "guard": guard,
        "block": block,
        "budget": smallest + draw(st.integers(0, 6)),
        "prompt": [draw(st.integers(0, int(row.sum()))) for row in valid],
        "horizon": draw(st.sampled_from(list(SCORES))),
        "candidates": draw(st.sampled_from(["all", "oldest"])),
    }


@settings(deadline=None, max_examples=150)
@given(rolls())
def test_golden_is_delete_and_recompute(case):
    labels, valid, guard = case["labels"], case["valid"], case["guard"]
    trace = golden(
        labels,
        budget=case["budget"],
        block=case["block"],
        guard=guard,
        valid=valid,
        prompt_length=case["prompt"],
        horizon=case["horizon"],
        discount=0.5 if case["horizon"] == "discounted" else None,
        candidates=case["candidates"],
    )
    assert (trace.source, trace.budget, trace.period) == ("golden", case["budget"], case["block"])
    for b in range(BATCH):
        columns = valid[b].nonzero().flatten().tolist()
        prompt = case["prompt"][b] if guard.prompt else 0
        for index in range(labels.shape[0]):
            for head in range(HEADS):
                expected = [NEVER] * labels.shape[3]
                ends = naive_row(labels[index, b, head][columns].tolist(), guard, prompt, case)
                for i, end in enumerate(ends):
                    expected[columns[i]] = NEVER if end == NEVER else columns[end - 1] + 1
                assert trace.expiry[index, b, head].tolist() == expected


def test_golden_is_the_papers_loop():
    """ForesightKV's pseudo-code: remaining ids, the oldest `budget` are candidates, drop a block of them per step."""
    budget, block, length = 12, 4, 41
    labels = torch.rand(1, 2, length, math.ceil(length / block))
    for candidates in ("oldest", "all"):
        trace = golden([labels], budget=budget, block=block, guard=Guard(0, 0), candidates=candidates)
        for head in range(2):
            remaining, step, expected = list(range(length)), 0, {}
            while len(remaining) > budget + block:
                m = 1 + budget // block + step
                wanted = labels[0, head, :, m:].amax(-1)
                for i in sorted(remaining[:budget], key=lambda i: wanted[i].item())[:block]:
                    expected[i] = m * block
                    remaining.remove(i)
                step += 1
            got = {
                i: end
                for i, end in enumerate(trace.expiry[0, 0, head].tolist())
                if end <= (length - 1) // block * block
            }
            assert got == expected
            assert len(got) == 28


def test_golden_with_padding_equals_rows_alone():
    labels, pad, block = torch.rand(3, 1, HEADS, 30, 8), 7, 4
    padded = torch.zeros(3, 2, HEADS, 37, 10)
    padded[:, 1:, :, pad:, :8] = labels
    padded[:, :1] = torch.rand(3, 1, HEADS, 37, 10)
    valid = torch.ones(2, 37, dtype=torch.bool)
    valid[1, :pad] = False
    chosen = {"budget": 11, "block": block, "guard": Guard(sinks=2, recent=3)}
    alone, together = golden(labels, **chosen), golden(list(padded), valid=valid, **chosen)
    assert alone.evictions == 3 * HEADS * (28 - 11)
    moved = torch.where(alone.expiry == NEVER, NEVER, alone.expiry + pad)
    assert torch.equal(together.expiry[:, 1:, :, pad:], moved)
    assert (together.expiry[:, 1, :, :pad] == NEVER).all()


@pytest.mark.parametrize("block", [1, 4])
def test_golden_holds_its_budget(block):
    """At every query at most budget + block slots are visible, and with slack 0 never more than the budget."""
    budget, length = 16, 64
    trace = golden([torch.rand(1, HEADS, length, length // block)], budget=budget, block=block, guard=Guard())
    peak = max(int(trace.held(t).max()) for t in range(length))
    assert peak == (budget if block == 1 else budget + block)
    assert (trace.expiry[..., :4] == NEVER).all()


def test_golden_leaves_short_rows_and_stock_layers_alone():
    labels = torch.rand(2, HEADS, 20, 5)
    trace = golden([None, labels], budget=20, block=4, guard=Guard())
    assert trace.expiry.shape == (2, 2, HEADS, 20)
    assert trace.evictions == 0
    assert golden([None, labels], budget=13, block=4, guard=Guard()).expiry[0].eq(NEVER).all()
    assert golden([None, labels], budget=13, block=4, guard=Guard()).evictions == 2 * HEADS * 7


def test_golden_refuses_budgets_without_room():
    """Regression 13: fewer slots than protected tokens is an error naming the smallest, never a negative top-k."""
    labels = [torch.rand(1, 1, 40, 10)]
    with pytest.raises(BudgetError, match="smallest that works is 14"):
        golden(labels, budget=13, block=4, guard=Guard(sinks=4, recent=10))
    assert golden(labels, budget=14, block=4, guard=Guard(sinks=4, recent=10)).evictions == 26
    with pytest.raises(BudgetError, match="smallest that works is 8"):
        golden(labels, budget=7, block=4, guard=Guard(sinks=4, recent=0))
    with pytest.raises(BudgetError, match="smallest that works is 6"):
        golden([torch.rand(1, 1, 9, 9)], budget=5, block=1, guard=Guard(sinks=4, recent=1))


@pytest.mark.parametrize(
    ("error", "labels", "change"),
    [
        (LabelError, torch.rand(1, 1, 40, 10), {"block": 8}),
        (LabelError, torch.full((1, 1, 40, 10), torch.nan), {}),
        (UsageError, torch.rand(1, 1, 40, 10), {"guard": Guard(prompt=True)}),
        (UsageError, torch.rand(1, 1, 40, 10), {"guard": Guard(prompt=True), "prompt_length": 41}),
        (UsageError, torch.rand(1, 1, 40, 10), {"discount": 0.5}),
        (UsageError, torch.rand(1, 1, 40, 10), {"horizon": "discounted"}),
    ],
)
def test_golden_refuses(error, labels, change):
    with pytest.raises(error):
        golden([labels], **{"budget": 20, "block": 4, "guard": Guard(), **change})


def test_layers_must_agree():
    with pytest.raises(LabelError, match="disagree"):
        golden([torch.rand(1, 1, 40, 10), torch.rand(1, 2, 40, 10)], budget=20, block=4, guard=Guard())


def test_inputs_that_are_missing_or_ignored_are_refused():
    data = layer(8)
    both = {"query": data["query"], "key": data["key"]}
    for reduce, extra in [
        (KVZAP, {}),
        (JUDGE_Q, {}),
        (replace(JUDGE_Q, needs_queries=False, needs_keys=True), {}),
        (GOLDEN, {"value": data["value"]}),
        (GOLDEN, {"hidden_norm": data["hidden_norm"]}),
        (GOLDEN, {"block": 0}),
    ]:
        with pytest.raises(UsageError):
            future_attention(**both, reduce=reduce, **extra)
    with pytest.raises(UsageError):
        Reducers(value="logit")
    with pytest.raises(UsageError):
        replace(KVP, group="none")
    with pytest.raises(UsageError):
        horizon(torch.rand(1, 4, 3), "past", window=2)
    with pytest.raises(LabelError):
        pool_groups(torch.rand(3, 4, 5), 2, "max")
    assert target(torch.rand(1, 4, 6, 2), INDEX_MEM, 2).shape == (1, 4, 6, 2)
    assert H2O.empty == 0.0


MEASURE = """
import torch
from pathlib import Path
from learnevict.oracle import future_attention

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024

torch.set_num_threads(2)
query, key = torch.randn(1, 8, 8192, 64), torch.randn(1, 2, 8192, 64)
future_attention(query[:, :, :300], key[:, :, :300])
Path("/proc/self/clear_refs").write_text("5")  # a process inherits the peak of the one that started it
resident = status("VmRSS")
labels = future_attention(query, key, block=128)
assert labels.shape == (1, 2, 8192, 64)
print((status("VmHWM") - resident) / 1e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_labels_of_a_long_document_stay_small():
    """8k tokens, 8 query and 2 kv heads: at most 125 MB above the inputs, labels included (one [T, T] takes 268).

    Were it quadratic, that would be 500 MB for 16k tokens; it is linear.
    """
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) <= 125
