"""The numbers of tables against hand computations and brute force; records that survive being killed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learnevict import testbed
from learnevict.cli import main
from learnevict.cli.eval import read_texts
from learnevict.errors import BudgetError, DataError, GateError, UsageError
from learnevict.evals import metrics, perplexity
from learnevict.evals.generation import agreement, answer, answer_golden
from learnevict.evals.methods import COMPARISON, EvaluatedMethod, EvaluationSettings, evaluated_method
from learnevict.evals.plan import EvaluatedModel, Key, Plan, check
from learnevict.evals.records import KEYS, ORACLE_KEYS, read_rows, write_rows
from learnevict.evals.report import write_report
from learnevict.evals.sample_log import SampleLog, log_path
from learnevict.evals.suite import run
from learnevict.evals.tasks import FamilyTask, TextBatch, family_tasks, read, resolve
from learnevict.evals.teacher_forced import measure, measure_golden, reference
from learnevict.files import locked
from learnevict.hub import Gates, weight_hash
from learnevict.hub.card_tables import budget, join
from learnevict.infer.attach import attach
from learnevict.infer.teacher_forcing import replay
from learnevict.methods import full, h2o, random, streaming_llm
from learnevict.oracle.collect import golden_trace
from learnevict.oracle.metrics import measure as measure_policy
from learnevict.parts.shares import Shares
from tests.interrupting import ctrl_c_after
from tools.results import pairs, sections, tables, tuning
from tools.results.label_table import Tried, TriedLabels, label_tables
from tools.results.records import Records, forget, of_run, read_results

SMALL = EvaluationSettings(slack=4, sinks=1, recent=2)


def tiny(vocabulary: int = 12, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, initializer_range=0.4, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


def texts(lengths=(37, 30, 41), prompt=11) -> TextBatch:
    """Random words with random checked marks, padded on the left."""
    torch.manual_seed(1)
    width = max(lengths)
    column = torch.arange(width)
    mask = torch.stack([(column >= width - length).long() for length in lengths])
    ids = torch.randint(0, 12, mask.shape) * mask
    marks = (torch.rand(mask.shape) < 0.5) & (mask.cumsum(-1) > 1)
    loss_mask = torch.stack([column >= width - length + prompt for length in lengths])
    return TextBatch(ids, mask, marks, loss_mask, [prompt] * len(lengths))


@pytest.fixture(scope="module")
def subject() -> EvaluatedModel:
    tokenizer = testbed.build_tokenizer()
    return EvaluatedModel(tiny(len(tokenizer)), tokenizer, "tiny")


def brute_scores(given: TextBatch, logits: torch.Tensor) -> list[tuple[int, int, float, int]]:
    """Right, checked, loss and response tokens of every row, in plain loops."""
    rows = []
    for row in range(len(given.input_ids)):
        right = seen = counted = 0
        loss = 0.0
        for column in range(1, given.input_ids.shape[1]):
            token = int(given.input_ids[row, column])
            guess = logits[row, column - 1].double()
            if given.answer_mask[row, column]:
                seen += 1
                right += int(int(guess.argmax()) == token)
            if given.loss_mask[row, column]:
                counted += 1
                loss += float(guess.logsumexp(0) - guess[token])
        rows.append((right, seen, loss, counted))
    return rows


def assert_same(scores, expected) -> None:
    assert scores["right"] == [row[0] for row in expected]
    assert scores["seen"] == [row[1] for row in expected]
    assert scores["spoken"] == [row[3] for row in expected]
    assert scores["loss"] == pytest.approx([row[2] for row in expected], rel=1e-4)


# --- metrics ---


def test_a_bootstrap_interval_is_that_of_all_resamples():
    above, below = [3.0, 0.0, 5.0, 2.0], [4.0, 3.0, 6.0, 2.0]
    drawn = [
        sum(above[i] for i in pick) / sum(below[i] for i in pick) for pick in itertools.product(range(4), repeat=4)
    ]
    found = metrics.ratio(above, below, draws=40_000)
    assert found.value == pytest.approx(10 / 15)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.02)
    assert metrics.ratio(above, below) == metrics.ratio(above, below)
    assert metrics.step_accuracy(above, below).value == pytest.approx(10 / 15)


def test_a_share_is_never_certain():
    """Wilson's interval: the shares p that are at most 1.96 of their own standard errors away from what was seen."""
    for right, num in ((40, 40), (0, 40), (13, 40), (1, 1)):
        found = metrics.share([1.0] * right + [0.0] * (num - right))
        shares = np.linspace(0, 1, 200_001)
        near = np.abs(right / num - shares) <= 1.959964 * np.sqrt(shares * (1 - shares) / num)
        assert found.value == right / num
        assert (found.low, found.high) == pytest.approx((shares[near].min(), shares[near].max()), abs=2e-5)
    assert metrics.share([1.0] * 40).low < 1 and metrics.mean([1.0] * 40).low == 1
    averaged = [0.5, 1.0, 0.25, 0.75]
    assert metrics.share(averaged) == metrics.mean(averaged)
    assert math.isnan(metrics.share([]).value)


def test_a_mean_of_shares_is_never_certain_either():
    """At 0 and at 1 it is Wilson's interval of one share of all samples; in between it holds the mean at least as often."""
    for right in (0.0, 1.0):
        found = metrics.mean_of_shares([[right] * 200] * 5)
        assert found == metrics.share([right] * 1000) and found.low < found.high
    families = [[1.0] * (20 * k) + [0.0] * (200 - 20 * k) for k in (1, 5, 9)]
    found, drawn = metrics.mean_of_shares(families), metrics.mean_share([(one, [1.0] * 200) for one in families])
    assert found.value == pytest.approx(drawn.value) == pytest.approx(0.5)
    assert found.low <= drawn.low and found.high >= drawn.high, (
        "families that differ make the mean surer, not less sure"
    )
    uneven = metrics.mean_of_shares([[1.0] * 10, [0.0] * 1000])
    assert (uneven.value, uneven.low) == (0.5, metrics.wilson(0.5, 20).low), "the smallest family decides"
    tries = [[0.5, 1.0, 0.25], [0.0, 0.5, 1.0]]
    assert metrics.mean_of_shares(tries) == metrics.mean_share([(one, [1.0] * 3) for one in tries])
    generator, inside = np.random.default_rng(0), 0
    for _ in range(400):
        drawn = [generator.random(60) < p for p in (0.999, 0.98, 0.99)]
        found = metrics.mean_of_shares([one.astype(float).tolist() for one in drawn])
        inside += found.low <= (0.999 + 0.98 + 0.99) / 3 <= found.high
    assert inside >= 0.94 * 400


def test_a_paired_difference_knows_the_pairs():
    seen = [10.0] * 50
    one = list(np.random.default_rng(0).integers(2, 10, 50).astype(float))
    better = [value + 1 for value in one]
    found = metrics.paired_difference(better, one, seen)
    assert found.value == pytest.approx(0.1) and found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
    assert metrics.paired_difference(one, one, seen) == metrics.Estimate(0.0, 0.0, 0.0)


def test_a_paired_test_counts_the_draws_in_which_nothing_is_gained():
    generator = np.random.default_rng(0)
    one, other = generator.integers(0, 10, 40).astype(float), generator.integers(0, 10, 40).astype(float)
    seen = [10.0] * 40
    found, p = pairs.paired_test([(one.tolist(), other.tolist(), seen)])
    again = np.random.default_rng([0, 0]).integers(0, 40, (10_000, 40))
    drawn = (one - other)[again].sum(-1) / 400
    assert p == pytest.approx(((drawn <= 1e-12).sum() + 1) / 10_001) and 0.01 < p < 0.99
    assert found.value == pytest.approx((one - other).sum() / 400)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    assert pairs.paired_test([((one + 1).tolist(), one.tolist(), seen)])[1] == pytest.approx(1 / 10_001)
    assert pairs.paired_test([(one.tolist(), one.tolist(), seen)])[1] == 1.0
    both = pairs.paired_test([((one + 1).tolist(), one.tolist(), seen), ([2.0, 4.0], [2.0, 0.0], [4.0, 4.0])])[0]
    assert both.value == pytest.approx((0.1 + 0.5) / 2), "families count alike"
    mean = metrics.mean_share([(one.tolist(), seen), ([1.0, 1.0], [2.0, 2.0])])
    assert mean.value == pytest.approx((one.sum() / 400 + 0.5) / 2) and mean.low < mean.value < mean.high
    whole = pairs.paired_test(
        [((one + 1).tolist(), one.tolist(), seen), ([2.0, 4.0], [2.0, 0.0], [4.0, 4.0])], pooled=True
    )[0]
    assert whole.value == pytest.approx((len(one) + 4) / (sum(seen) + 8))


def test_recovery_of_one_cell_is_the_ratio_of_sums():
    cell = metrics.RecoveryCell(method=[3, 4, 2], best=[1, 2, 2], golden=[5, 4, 3], seen=[5, 6, 4])
    found = metrics.recovery([cell])
    assert found.value == pytest.approx((2 + 2 + 0) / (4 + 2 + 1))
    assert found == metrics.ratio([2, 2, 0], [4, 2, 1])


def test_recovery_pools_families_alike_and_leaves_narrow_cells_out():
    wide = metrics.RecoveryCell(method=[60, 70], best=[40, 50], golden=[90, 90], seen=[100, 100])
    short = metrics.RecoveryCell(method=[1, 1], best=[0, 1], golden=[2, 2], seen=[2, 2])
    narrow = metrics.RecoveryCell(method=[0, 0], best=[50, 50], golden=[52, 52], seen=[100, 100])
    assert wide.scored and short.scored and not narrow.scored
    found = metrics.recovery([wide, short, narrow])
    assert found.value == pytest.approx((0.2 + 0.25) / (0.45 + 0.75))
    assert found.low <= found.value <= found.high
    assert math.isnan(metrics.recovery([narrow]).value) and math.isnan(metrics.recovery([]).value)


def test_golden_beaten_is_more_than_all():
    cell = metrics.RecoveryCell(method=[9, 9], best=[5, 5], golden=[8, 8], seen=[10, 10])
    assert metrics.recovery([cell]).value == pytest.approx(4 / 3)


# --- teacher-forced ---


def test_the_full_cache_scores_as_the_model_itself():
    model, given = tiny(), texts()
    found = measure(model, given, None)
    rows = []
    for row, (ids, mask) in enumerate(zip(given.input_ids, given.attention_mask, strict=True)):
        alone = model(input_ids=ids[mask.bool()][None]).logits
        logits = torch.zeros(1, *ids.shape, alone.shape[-1])
        logits[0, mask.bool()] = alone[0]
        part = TextBatch(ids[None], mask[None], given.answer_mask[[row]], given.loss_mask[[row]], [11])
        rows += brute_scores(part, logits)
    assert_same(found, rows)
    assert found["end"] == found["full"] == 2 * 2 * 2 * 8 * 4 * 41


@pytest.mark.parametrize("method", [h2o, random, streaming_llm])
def test_a_teacher_forced_pass_is_the_replay_of_its_trace(method):
    model, given = tiny(), texts()
    policy = method.policy(14, **SMALL.options)
    found = measure(model, given, policy)
    with attach(model, policy, record=True) as cache, torch.no_grad():
        model(input_ids=given.input_ids, attention_mask=given.attention_mask, past_key_values=cache)
    trace = cache.trace()
    assert trace.evictions > 100
    logits = replay(model, given.input_ids, trace, given.attention_mask).logits
    assert_same(found, brute_scores(given, logits))
    assert found["peak"] < found["full"]


def test_golden_scores_are_those_of_its_trace_for_each_row_alone():
    model, given = tiny(), texts()
    found = measure_golden(model, given, 14, SMALL)
    rows = []
    for row, mask in enumerate(given.attention_mask.bool()):
        ids = given.input_ids[[row]][:, mask]
        trace = golden_trace(model, ids, budget=14, block=4, guard=SMALL.guard)
        assert trace.evictions > 30
        part = TextBatch(
            ids, torch.ones_like(ids), given.answer_mask[[row]][:, mask], given.loss_mask[[row]][:, mask], [11]
        )
        rows += brute_scores(part, replay(model, ids, trace).logits)
    assert_same(found, rows)
    assert found["peak"] < found["full"]


def test_reading_marks_checked_and_spoken_words(subject):
    samples = [testbed.generate(family, 3) for family in ("recall", "dialogue")]
    given = read(subject.tokenizer, samples)
    for row, sample in enumerate(samples):
        words = subject.tokenizer.convert_ids_to_tokens(given.input_ids[row])
        said = [word for word, mark in zip(words, given.loss_mask[row], strict=True) if mark]
        assert " ".join(said) == sample.response
        checked = [word for word, mark in zip(words, given.answer_mask[row], strict=True) if mark]
        assert checked == [w for w, mark in zip(sample.text.split(), sample.answer_mask, strict=True) if mark]
        assert given.prompt_length[row] + len(said) == int(given.attention_mask[row].sum())


# --- free generation ---


def test_golden_with_room_for_all_writes_the_full_text_again(subject):
    samples = [testbed.generate("recall", seed, level=0) for seed in range(2)]
    how = (subject.model, subject.tokenizer, FamilyTask("recall"))
    stock = answer(*how, samples, None, max_new_tokens=12)
    roomy = answer_golden(*how, samples, 300, COMPARISON, max_new_tokens=12)
    assert roomy["agreed"] == [1.0, 1.0] and roomy["tokens"] == stock["tokens"] == [12, 12]
    samples = [testbed.generate("recall", seed) for seed in range(2)]
    tight = answer_golden(*how, samples, 24, COMPARISON, max_new_tokens=12)
    assert min(tight["agreed"]) < 1.0 and tight["peak"] < tight["full"]


def test_right_answers_count(subject, monkeypatch):
    sample = testbed.generate("recall", 0, level=0)
    said = subject.tokenizer(sample.response)["input_ids"]

    def speak(**given):
        rows = given["input_ids"].shape[0]
        model = subject.model
        model(input_ids=given["input_ids"], past_key_values=given["past_key_values"])
        wrong = [said[0]] * (len(said) - 1) + said[-1:]
        new = torch.tensor([said if row == 0 else wrong for row in range(rows)])
        return torch.cat([given["input_ids"], new], -1)

    monkeypatch.setattr(subject.model, "generate", speak)
    task = FamilyTask("recall")
    found = answer(subject.model, subject.tokenizer, task, [sample], full.policy(), temperature=1.0, tries=2)
    assert found["exact"] == [0.5] and found["tokens"] == [2 * len(said)]


def test_agreement_ends_with_the_first_other_token():
    assert agreement([1, 2, 3], [1, 2, 3]) == 1.0
    assert agreement([1, 2, 3], [1, 5, 3]) == pytest.approx(1 / 3)
    assert agreement([1, 2], [1, 2, 7, 8]) == 0.5


# --- the log of samples and the suite ---


def test_a_log_recovers_whole_lines_and_refuses_strangers(tmp_path):
    path, key = tmp_path / "deep" / "r.samples.jsonl", Key("h2o", "recall", "1/4", "teacher")
    first = SampleLog(path, {"model": "a", "rules": {"slack": 4}})
    assert first.missing(key, range(4), {"variant": "paper"}) == [0, 1, 2, 3]
    first.add(key, [0, 2], {"right": [5, 6], "peak": 7.5})
    with path.open("a") as file:
        file.write('{"method": "h2o", "fam')
    with pytest.raises(UsageError, match="--resume"):
        SampleLog(path, {"model": "a", "rules": {"slack": 4}})
    with pytest.raises(UsageError, match=r"another configuration: model 'a' \(now 'b'\)"):
        SampleLog(path, {"model": "b", "rules": {"slack": 4}}, resume=True)
    again = SampleLog(path, {"rules": {"slack": 4}, "model": "a"}, resume=True)
    assert again.missing(key, range(4), {"variant": "paper"}) == [1, 3]
    assert again.missing(key, range(4), {"variant": "paper"}, ("right",)) == [1, 3]
    assert again.missing(key, range(4), {"variant": "paper"}, ("right", "wanted")) == [0, 1, 2, 3]
    assert again.column(key, [0, 2], "batch") == [2, 2]
    with pytest.raises(UsageError, match="variant"):
        again.missing(key, range(4), {"variant": "kvpress"})
    again.add(key, [1], {"right": [9], "peak": 1})
    found = SampleLog(path, None, resume=True)
    assert found.configuration["model"] == "a"
    assert found.column(key, [0, 1, 2], "right") == [5, 9, 6] and found.column(key, [2, 1], "peak") == [7.5, 1]
    assert found.column(key, [0, 3], "right") is None
    other = tmp_path / "poem.jsonl"
    other.write_text("roses\n")
    with pytest.raises(DataError, match="not written by this program"):
        SampleLog(other, {}, resume=True)
    with pytest.raises(DataError, match="--out"):
        SampleLog(other / "below.jsonl", {})


def small_plan(**changes) -> Plan:
    tasks = family_tasks(changes.pop("families", ("recall",)))
    return Plan(**{**dict(tasks=tasks, budgets=("1/4", "40"), num_samples=5, batch_size=2), **changes})


QUARTER = resolve("1/4", FamilyTask("recall").mean_length)


@pytest.fixture(scope="module")
def finished(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "recall.jsonl"
    field = [evaluated_method(name) for name in ("full", "random", "golden")]
    return out, *run(small_plan(free="none"), subject, field, out)


def test_rows_say_all_that_was_promised(finished, subject):
    out, rows, log = finished
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("full", None), ("random", QUARTER), ("golden", QUARTER), ("random", 40), ("golden", 40)
    ]  # fmt: skip
    for row in rows:
        assert tuple(row)[: len(KEYS)] == KEYS and row["samples"] == 5 and row["exact_match"] is None
        assert row["ci_low"] <= row["step_accuracy"] <= row["ci_high"]
        assert row["kv_bytes_peak"] <= row["kv_bytes_full"] * 1.1
    assert rows[0]["loss_ratio"] == 1.0 and rows[1]["loss_ratio"] != 1.0
    assert [row["budget_share"] for row in rows] == [None, "1/4", "1/4", None, None]
    assert read_rows(out) == json.loads(json.dumps(rows))
    given = read(subject.tokenizer, [testbed.generate("recall", seed) for seed in range(5)])
    again = measure(subject.model, given, random.policy(40, **COMPARISON.options))
    assert log.column(Key("random", "recall", "40", "teacher"), range(5), "right") == again["right"]
    assert rows[3]["step_accuracy"] == pytest.approx(sum(again["right"]) / sum(again["seen"]))


def test_a_killed_run_goes_on_and_ends_the_same(finished, subject, tmp_path):
    _, rows, _ = finished
    out, done = tmp_path / "recall.jsonl", []
    field = [evaluated_method(name) for name in ("full", "random", "golden")]

    def stop(label: str, number: int) -> None:
        done.append(number)
        if len(done) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small_plan(free="none"), subject, field, out, advance=stop)
    lines = len(log_path(out).read_text().splitlines())
    done.clear()
    again, _ = run(
        small_plan(free="none", batch_size=3), subject, field, out, resume=True, advance=lambda _, n: done.append(n)
    )
    assert 3 < lines < 12 and sum(done) == 5 * 5
    for old, new in zip(rows, again, strict=True):
        assert {k: new[k] for k in ("method", "budget", "step_accuracy", "ci_low", "ci_high")} == {
            k: old[k] for k in ("method", "budget", "step_accuracy", "ci_low", "ci_high")
        }
        assert new["loss_ratio"] == pytest.approx(old["loss_ratio"], rel=1e-4)
    with pytest.raises(UsageError, match="rules"):
        run(small_plan(free="none", settings=SMALL), subject, field, out, resume=True)


def test_a_run_goes_on_only_with_rows_of_its_own(subject, tmp_path):
    out, field = tmp_path / "rows.jsonl", [evaluated_method("random")]
    plan = small_plan(free="none", num_samples=2, budgets=("1/4",))
    out.write_text("my notes\n")
    for resume, error in ((False, UsageError), (True, DataError)):
        with pytest.raises(error, match="choose another --out"):
            run(plan, subject, field, out, resume=resume)
    assert out.read_text() == "my notes\n" and not log_path(out).exists()
    out.unlink()
    write_rows(out, [dict.fromkeys(KEYS) | {"method": "h2o", "family": "recall"}])
    with pytest.raises(UsageError, match="the numbers behind them, is missing"):
        run(plan, subject, field, out, resume=True)
    out.write_text("")
    assert len(run(plan, subject, field, out)[0]) == 1


def test_results_that_share_a_log_are_not_written_at_once(subject, tmp_path):
    """r.json and r.jsonl have one log."""
    plan = small_plan(free="none", num_samples=2, budgets=("1/4",))
    for name, other in (("r.json", "r.jsonl"), ("r.jsonl", "r.json"), ("r.json", "r.json")):
        held, said = locked(log_path(tmp_path / other)), "another process is writing"
        with locked(tmp_path / other), held, pytest.raises(UsageError, match=said):
            run(plan, subject, [evaluated_method("random")], tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_resuming_loses_no_row(subject, tmp_path):
    """Other methods, families and budgets stay where they are; what is measured again takes its old place."""
    out = tmp_path / "rows.jsonl"
    plan = small_plan(free="none", num_samples=2, budgets=("1/4",), families=("recall", "dialogue"))
    run(plan, subject, [evaluated_method("full"), evaluated_method("random")], out)
    before = read_rows(out)
    size = len(before)

    def grown(label: str, number: int) -> None:
        nonlocal size
        assert size <= len(read_rows(out))
        size = len(read_rows(out))

    for changes, name in ((dict(tasks=family_tasks(["recall"])), "h2o"), (dict(budgets=("40",)), "random")):
        found, _ = run(
            dataclasses.replace(plan, **changes), subject, [evaluated_method(name)], out, resume=True, advance=grown
        )
        assert {row["method"] for row in found} == {name}
    after = read_rows(out)
    assert after[: len(before)] == before
    assert [(row["family"], row["method"], row["budget_share"]) for row in after[len(before) :]] == [
        ("recall", "h2o", "1/4"), ("recall", "random", None), ("dialogue", "random", None)
    ]  # fmt: skip


def test_a_file_of_rows_has_one_range_of_samples(subject, tmp_path):
    """Rows that would stay beside others are refused; if all are measured anew none of the former is left."""
    out, field = tmp_path / "rows.jsonl", [evaluated_method("full"), evaluated_method("random")]
    plan = small_plan(free="none", num_samples=4, budgets=("1/4",), oracle=False)
    before, _ = run(plan, subject, field, out)
    for changes in (dict(num_samples=2), dict(num_samples=5), dict(seed=1)):
        with pytest.raises(
            UsageError, match=r"4 samples from seed 0 \(full on recall\).*--samples 4 --seed 0, or name all"
        ):
            run(dataclasses.replace(plan, **changes), subject, field[1:], out, resume=True)
    assert read_rows(out) == json.loads(json.dumps(before))
    ranges = []
    fewer = dataclasses.replace(plan, num_samples=2)
    run(
        fewer,
        subject,
        field,
        out,
        resume=True,
        advance=lambda *_: ranges.append({r["samples"] for r in read_rows(out)}),
    )
    assert [row["samples"] for row in read_rows(out)] == [2, 2] and all(len(found) == 1 for found in ranges)
    done = []
    again, _ = run(plan, subject, field, out, resume=True, advance=lambda _, number: done.append(number))
    assert again == before and done == [4, 4], "the former numbers are in the log"


def test_what_was_measured_without_the_oracle_is_measured_again_for_it(subject, tmp_path):
    """And is as good as before for a run that does not ask for it."""
    out, field = tmp_path / "rows.jsonl", [evaluated_method("full"), evaluated_method("random")]
    plan = small_plan(free="none", num_samples=4, budgets=("1/4",), oracle=False)
    steps = []
    advance = lambda label, number: steps.append((label.split()[1], number))  # noqa: E731
    run(plan, subject, field, out)
    run(plan, subject, field, out, resume=True, advance=advance)
    assert steps == [("full", 4), ("random", 4)]
    steps.clear()
    rows, _ = run(dataclasses.replace(plan, oracle=True), subject, field, out, resume=True, advance=advance)
    assert steps == [("full", 4), ("random", 0), ("random", 2), ("random", 2)]
    fresh, _ = run(dataclasses.replace(plan, oracle=True), subject, field)
    assert rows == fresh and rows[1]["top_recall"] < 1
    steps.clear()
    assert run(plan, subject, field, out, resume=True, advance=advance)[0] == rows
    assert steps == [("full", 4), ("random", 4)]


def test_free_rows_have_tokens_and_speed(subject):
    plan = small_plan(num_samples=2, budgets=("64",), teacher=False, free="all")
    rows, log = run(plan, subject, [evaluated_method("streaming_llm")])
    (row,) = rows
    key = Key("streaming_llm", "recall", "64", "free")
    tokens, seconds = (sum(log.column(key, plan.seeds, name)) for name in ("tokens", "seconds"))
    assert row["tokens_per_second"] == pytest.approx((tokens - 2) / seconds), "the clock starts after first tokens"
    assert row["exact_low"] == 0.0 and row["exact_high"] > 0.5
    assert row["exact_match"] == 0.0 and row["tokens_generated"] == 34 and row["tokens_per_second"] > 0
    assert row["step_accuracy"] is None and row["kv_bytes_peak"] < row["kv_bytes_full"]


@pytest.mark.parametrize(
    ("plan", "field", "error", "words"),
    [
        (small_plan(tasks=2 * family_tasks(["recall"])), ["full"], UsageError, "tasks of different names"),
        (
            small_plan(tasks=(FamilyTask("recall"), FamilyTask("program", "validation"))),
            ["full"],
            UsageError,
            "one origin",
        ),
        (small_plan(budgets=("1/4", "1/4")), ["full"], UsageError, "1/4, 1/4: give each only once"),
        (small_plan(budgets=("4/3",)), ["random"], BudgetError, "share"),
        (small_plan(budgets=("20",)), ["random"], BudgetError, "smallest"),
        (small_plan(budgets=("20",)), ["golden"], BudgetError, "smallest"),
        (small_plan(), ["random", "random"], UsageError, "once"),
        (small_plan(tries=3), ["full"], UsageError, "temperature"),
        (small_plan(temperature=float("nan")), ["full"], UsageError, "0 .greedy. or more, not nan"),
        (small_plan(temperature=1.0, free="all"), ["golden"], UsageError, "greedy"),
        (small_plan(teacher=False, free="none"), ["full"], UsageError, "nothing"),
        (small_plan(num_samples=0), ["full"], UsageError, "at least 1"),
    ],
)
def test_an_impossible_plan_is_refused_beforehand(plan, field, error, words):
    with pytest.raises(error, match=words):
        check(plan, [evaluated_method(name) for name in field])


def test_families_are_those_of_the_testbed():
    with pytest.raises(UsageError, match="choose program"):
        family_tasks(["sudoku"])
    with pytest.raises(UsageError, match="recall, recall: give each only once"):
        family_tasks(["recall", "recall"])


def test_methods_need_parts_that_fit():
    with pytest.raises(GateError, match="--ckpt"):
        evaluated_method("foresightkv")
    with pytest.raises(UsageError, match="no option"):
        check(small_plan(), [evaluated_method("random", settings={"colour": "red"})])


def test_budgets_are_shares_of_the_mean_length():
    lengths = [len(testbed.generate("recall", seed, split="validation").answer_mask) for seed in range(200)]
    task = FamilyTask("recall")
    assert task.mean_length() == pytest.approx(sum(lengths) / 200)
    assert resolve("1/4", task.mean_length) == round(sum(lengths) / 800)
    assert resolve("64", task.mean_length) == 64 and resolve("25%", task.mean_length) == "25%"
    assert task.mean_length(prompt=False) < 20


def test_a_lenient_plan_says_what_is_not_possible(subject, tmp_path):
    plan = small_plan(budgets=("20", "64"), num_samples=2, free="none", lenient=True)
    out = tmp_path / "rows.jsonl"
    rows, _ = run(plan, subject, [evaluated_method("random"), evaluated_method("golden")], out)
    assert [(row["method"], row["budget"], row["samples"]) for row in rows] == [
        ("random", 20, 2), ("golden", 20, 2), ("random", 64, 2), ("golden", 64, 2)
    ]  # fmt: skip
    assert all("smallest that works is 21" in row["impossible"] and row["step_accuracy"] is None for row in rows[:2])
    assert all("impossible" not in row and row["step_accuracy"] is not None for row in rows[2:])
    assert "not possible" in sections.folded(
        "recall", sections.family_parts(read_results([out]), "recall", "teacher", None)
    )


def test_what_is_measured_can_be_dropped_and_measured_anew(subject, tmp_path):
    out = tmp_path / "rows.jsonl"
    plan = small_plan(free="none", num_samples=2, budgets=("64",))
    field = [evaluated_method("random"), evaluated_method("h2o"), evaluated_method("h2o", name="h2o variant=kvpress")]
    before, _ = run(plan, subject, field, out)
    assert forget(out, "h2o") == (2, 2)
    assert [row["method"] for row in read_rows(out)] == ["random"]
    assert "h2o" not in log_path(out).read_text() and len(log_path(out).read_text().splitlines()) == 3
    assert forget(out, "h2o") == forget(tmp_path / "none", "h2o") == (0, 0)
    again, _ = run(plan, subject, field, out, resume=True)
    assert [row["step_accuracy"] for row in again] == [row["step_accuracy"] for row in before]
    (tmp_path / "poem.samples.jsonl").write_text("roses\n")
    with pytest.raises(DataError, match="not written by this program"):
        forget(tmp_path / "poem.jsonl", "h2o")


def test_rows_tell_how_near_the_oracle_is(finished, subject):
    """The columns are those of learnevict.oracle.metrics, and golden is their measure."""
    rows = finished[1]
    full_row, random_row, golden_row = rows[:3]
    assert all(full_row[name] is None for name in ORACLE_KEYS)
    assert (golden_row["oracle_gap_closed"], golden_row["top_recall"], golden_row["regret"]) == (1.0, 1.0, 1.0)
    assert random_row["oracle_gap_closed"] == 0.0 and random_row["top_recall"] < 1 < random_row["regret"]
    assert random_row["attention_kept_min"] < random_row["attention_kept"] < golden_row["attention_kept"] < 1
    given = read(subject.tokenizer, [testbed.generate("recall", seed) for seed in range(5)])
    policy = random.policy(QUARTER, **COMPARISON.options)
    figures = measure_policy(subject.model, policy, reference(subject.model, given, COMPARISON)).figures()
    for name in ORACLE_KEYS[1:]:
        assert random_row[name] == pytest.approx(figures[name], rel=1e-3), name
    plan = small_plan(free="none", oracle=False, num_samples=2, budgets=("64",))
    (row,) = run(plan, subject, [evaluated_method("random")])[0]
    assert row["top_recall"] is None and row["step_accuracy"] is not None


class Initials:
    """A task that is not the testbed's: write the first letters of words; scored by share, without a reference text."""

    name, modes, max_new_tokens, origin = "initials", ("free",), 6, {"tasks": "1", "split": "test"}
    graded = True

    def mean_length(self, *, prompt: bool = True) -> float:
        return 48.0

    def samples(self, seeds):
        return [f"<bos> <user> {'fact ann river stone ; ' * (7 + seed)}" for seed in seeds]

    def prompt(self, tokenizer, sample):
        return tokenizer(sample)["input_ids"]

    def reference(self, tokenizer, samples):
        raise NotImplementedError

    def score(self, sample, answer):
        return len(answer.split()) / (10 + len(sample.split()))


def test_any_task_goes_through_the_suite_its_log_and_its_reports(subject, tmp_path):
    plan, out = Plan((Initials(),), ("1/2",), num_samples=3, batch_size=2, free="all"), tmp_path / "rows.jsonl"
    field = [evaluated_method(name) for name in ("full", "random")]
    rows, log = run(plan, subject, field, out)
    assert [(row["family"], row["method"], row["budget"]) for row in rows] == [
        ("initials", "full", None), ("initials", "random", 24)
    ]  # fmt: skip
    expected = [6 / (10 + 2 + 5 * (7 + seed)) for seed in range(3)]
    assert log.column(Key("random", "initials", "1/2", "free"), range(3), "score") == pytest.approx(expected, abs=1e-6)
    assert rows[1]["score"] == pytest.approx(sum(expected) / 3, abs=1e-6) and rows[1]["exact_match"] == 0
    assert rows[1]["step_accuracy"] is None
    assert rows[1]["kv_bytes_peak"] < rows[1]["kv_bytes_full"] and rows[1]["split"] == "test"
    again, _ = run(plan, subject, [*field, evaluated_method("h2o")], out, resume=True)
    assert again[:2] == rows and len(read_rows(out)) == 3
    assert "## initials" in write_report(again, tmp_path / "report")[0].read_text()
    with pytest.raises(UsageError, match="nothing to measure"):
        check(dataclasses.replace(plan, free="none"), field)


# --- tuning ---


def test_tuning_chooses_the_best_setting_and_method_of_each_cell(tmp_path):
    field = [
        EvaluatedMethod("h2o", "h2o"), EvaluatedMethod("h2o mean", "h2o", settings={"variant": "kvpress"}),
        EvaluatedMethod("random", "random")
    ]  # fmt: skip
    accuracy = {("h2o", "1/4"): 0.5, ("h2o mean", "1/4"): 0.6, ("random", "1/4"): 0.55}
    accuracy |= {("h2o", "1/8"): 0.4, ("h2o mean", "1/8"): 0.4, ("random", "1/8"): 0.41}
    rows = [
        {"method": name, "family": "recall", "budget": 50, "budget_share": share, "step_accuracy": value}
        for (name, share), value in accuracy.items()
    ]
    found = tuning.choose(rows, field, {"model": "a"})
    assert found.settings["recall"]["1/4"] == {"h2o": {"variant": "kvpress"}, "random": {}}
    assert found.settings["recall"]["1/8"]["h2o"] == {}
    assert (found.best("recall", "1/4"), found.best("recall", "1/8")) == ("h2o", "random")
    assert found.of("h2o") == {("recall", "1/4"): {"variant": "kvpress"}} and found.of("tova") == {}
    tuning.save(found, tmp_path / "tuned.json")
    assert tuning.load(tmp_path / "tuned.json") == found
    tuned = evaluated_method("h2o", tuned=found.of("h2o"))
    assert tuned.policy(64, COMPARISON, tuned.options("recall", "1/4")).scorer.mean
    assert not tuned.policy(64, COMPARISON, tuned.options("recall", "1/8")).scorer.mean
    with pytest.raises(UsageError, match="not tuned"):
        found.best("program", "1/4")
    with pytest.raises(DataError, match="no tuned"):
        tuning.load(tmp_path / "nothing.json")


def test_processes_that_tune_side_by_side_lose_nothing(tmp_path, monkeypatch):
    """Another process writes its family while this one is between reading and writing; whatever the order, both are in."""
    record, whole, folder = {"weights": "a"}, tmp_path / "tuned.json", tmp_path / "tuning"

    def tuned(family: str) -> tuning.Tuned:
        return tuning.Tuned(record, {family: {"1/4": {"h2o": {}}}}, {family: {"1/4": {"h2o": 0.5}}})

    tuning.save(tuned("ledger"), whole)
    save, began = tuning.save, []

    def meanwhile(given: tuning.Tuned, path) -> None:
        if path == whole and not began:
            began.append(1)
            tuning.save_part(tuned("recall"), folder / "recall.tuned.json", whole)
        save(given, path)

    monkeypatch.setattr(tuning, "save", meanwhile)
    tuning.save_part(tuned("program"), folder / "program.tuned.json", whole)
    found = tuning.load(whole)
    assert set(found.settings) == {"ledger", "program", "recall"}
    assert {path.name for path in tmp_path.iterdir()} == {"tuned.json", "tuning"}


def test_what_was_tuned_under_other_conditions_is_not_lost(tmp_path):
    """In the whole, in a part of another family and in one's own: refused before anything is written."""

    def tuned(family: str, weights: str) -> tuning.Tuned:
        return tuning.Tuned({"weights": weights}, {family: {"1/4": {"h2o": {}}}}, {family: {"1/4": {"h2o": 0.5}}})

    whole, folder = tmp_path / "tuned.json", tmp_path / "tuning"
    part = folder / "recall.tuned.json"
    for path in (whole, folder / "dialogue.tuned.json", part):
        tuning.save(tuned("dialogue", "other"), path)
        with pytest.raises(UsageError, match=rf"{path} holds settings of dialogue .*\(weights\).*remove {whole} and"):
            tuning.save_part(tuned("recall", "mine"), part, whole)
        assert tuning.load(path) == tuned("dialogue", "other")
        path.unlink()
    tuning.save_part(tuned("recall", "mine"), part, whole)
    assert tuning.load(whole) == tuning.load(part) == tuned("recall", "mine")


def test_budgets_tuned_later_stand_beside_earlier_ones(tmp_path):
    whole, part = tmp_path / "tuned.json", tmp_path / "tuning" / "recall.tuned.json"

    def tuned(accuracy: dict[str, float]) -> tuning.Tuned:
        by_budget = {budget: {"h2o": value} for budget, value in accuracy.items()}
        settings = {budget: {"h2o": {}} for budget in accuracy}
        return tuning.Tuned({"weights": "a"}, {"recall": settings}, {"recall": by_budget})

    tuning.save_part(tuned({"1/4": 0.5, "1/8": 0.4}), part, whole)
    tuning.save_part(tuned({"1/8": 0.3, "1/12": 0.2}), part, whole)
    both = tuned({"1/4": 0.5, "1/8": 0.3, "1/12": 0.2})
    assert tuning.load(whole) == tuning.load(part) == both


def test_every_setting_of_every_grid_makes_a_policy():
    field = tuning.candidates(tuning.training_free())
    assert len({one.name for one in field}) == len(field) > 20
    methods = {one.method for one in field}
    assert {"random", "snapkv", "keydiff"} <= methods and not {"golden", "full", "lexical"} & methods
    check(small_plan(budgets=("1/8",)), field)


def test_tuned_settings_belong_to_the_tables_they_were_tuned_with():
    base = tiny()
    gates = Gates.make("lexical", base)
    settings = {"recall": {"1/4": {"lexical": {"bonus": 0.1}, "h2o": {}}}}
    found = tuning.Tuned({"weights": "w", "gates": {"lexical": weight_hash(gates)}}, settings, {})
    found.check("w", {"lexical": gates, "h2o": None, "foresightkv": Gates.make("foresightkv", base)})
    with pytest.raises(UsageError, match="lexical were tuned with other gates"):
        dataclasses.replace(found, record={"weights": "w"}).check("w", {"lexical": gates})
    with pytest.raises(UsageError, match="other weights"):
        found.check("v")


def test_the_page_refuses_two_gates_under_one_name():
    def results(gates: str) -> Records:
        log = SampleLog(None, {})
        log.missing(Key("lexical", "recall", "1/4", "teacher"), [0], {"method": "lexical", "gates": gates})
        return Records([], {"recall": log})

    tables.check_same_origin([results("a"), results("a")], None)
    with pytest.raises(DataError, match=r"lexical: a, b.*--replace lexical"):
        tables.check_same_origin([results("a"), results("b")], None)
    tuned = tuning.Tuned({"weights": "w", "tasks": "t", "gates": {"lexical": "b"}}, {}, {})
    with pytest.raises(DataError, match="lexical: a, b"):
        tables.check_same_origin([results("a")], tuned)


def test_labels_tried_are_kept_and_shown(tmp_path):
    path = tmp_path / "labels.json"
    found = TriedLabels.open(path, {"samples": 2, "split": "validation"})
    for name, right in (("golden", [3, 4]), ("better", [5, 6])):
        found.add(Tried("recall", "1/8", 40, name, right, [8, 8], 6.0, 2.0, 1.5))
    again = TriedLabels.open(path, {"samples": 2, "split": "validation"})
    assert again.has("recall", "1/8", "better") and not again.has("recall", "1/12", "better")
    page = "\n".join(label_tables(again))
    assert "| golden | 0.438 (3) |" in page and "| better | 0.688 + (3) |" in page
    with pytest.raises(UsageError, match="choose another --out"):
        TriedLabels.open(path, {"samples": 3, "split": "validation"})
    path.write_text("{}")
    with pytest.raises(DataError, match="no comparison of labels"):
        TriedLabels.open(path)


def test_lexical_is_tuned_like_the_heuristics_but_never_the_best_of_them():
    field = tuning.candidates(["random"], [Gates.make("lexical", tiny())])
    assert [one.method for one in field].count("lexical") == 6
    rows = [
        {"method": one.name, "family": "recall", "budget": 50, "budget_share": "1/4", "step_accuracy": accuracy}
        for accuracy, one in zip((0.2, 0.5, 0.9, 0.4, 0.3, 0.1, 0.0), field, strict=True)
    ]
    found = tuning.choose(rows, field, {})
    assert found.best("recall", "1/4") == "random"
    (bonus,) = found.of("lexical").values()
    assert bonus == field[2].settings and field[2].policy(64, COMPARISON).scorer.bonus == bonus["bonus"]


# --- reports ---


def test_a_report_has_table_and_plot(finished, tmp_path):
    out, rows, _ = finished
    written = write_report(read_rows(out), tmp_path / "report")
    assert [path.name for path in written] == ["table.md", "table.csv", "accuracy.png", "nats.png"]
    page, sheet, image, nats = (path.read_bytes() for path in written)
    assert image.startswith(b"\x89PNG") and len(image) > 10_000 and nats.startswith(b"\x89PNG")
    assert f"| random | {rows[1]['step_accuracy']:.3f} [" in page.decode() and "| method | 1/4 | 40 |" in page.decode()
    lines = sheet.decode().splitlines()
    assert lines[0] == ",".join((*KEYS, *ORACLE_KEYS)) and len(lines) == 6 and lines[1].startswith("full,recall,,,")


def test_budgets_may_be_shares_of_what_was_read_and_bytes(subject, tmp_path):
    out, compared = tmp_path / "rows.jsonl", [evaluated_method(name) for name in ("full", "random")]
    plan = small_plan(free="none", budgets=("25%", "64KiB", "40"), num_samples=1, oracle=False)
    rows = run(plan, subject, compared, out)[0]
    assert [row["budget"] for row in read_rows(out)] == [None, "25%", "64KiB", 40]
    assert run(plan, subject, compared, out, resume=True)[0] == rows
    assert "| method | 25% | 64KiB | 40 |" in write_report(read_rows(out), tmp_path / "report")[0].read_text()
    assert [budget(row) for row in join(rows)] == ["full cache", "25%", "64KiB", "40 slots"]
    for odd in ("a lot", True, [1]):
        out.write_text(json.dumps(rows[0] | {"budget": odd}))
        with pytest.raises(DataError, match="is not understood"):
            read_rows(out)
        with pytest.raises(DataError, match="is not understood"):
            join([rows[0] | {"budget": odd}])


def test_rows_are_read_from_reports_too_and_nonsense_is_not(tmp_path):
    row = dict.fromkeys(KEYS) | {"method": "full", "family": "recall"}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"rows": [row]}, indent=1))
    assert read_rows(report) == [row]
    report.write_text('{"rows": []}')
    with pytest.raises(DataError, match="no rows"):
        read_rows(report)
    report.write_text("[1, 2]\n")
    with pytest.raises(DataError, match=r"no rows|neither"):
        read_rows(report)
    for numbers in ("1\n2\n", "null\n", '{"rows": 5}', '{"rows": [1]}', "[" * 100_000):
        report.write_text(numbers)
        with pytest.raises(DataError, match=r"no rows|neither"):
            read_rows(report)
    report.write_text("not json\n")
    with pytest.raises(DataError, match="neither"):
        read_rows(report)
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="--out"):
        write_rows(tmp_path / "no" / "folder.jsonl", [row])


@pytest.mark.parametrize(
    ("given", "lost"),
    [
        ({"step_accuracy": 0.5}, "ci_low"),
        ({"step_accuracy": 0.5, "ci_low": 0.1}, "ci_high"),
        ({"exact_low": 0.1}, "exact_high"),
        ({"perplexity": 3.0}, "perplexity_ratio"),
        ({"top_recall": 0.5}, "attention_kept"),
    ],
)
def test_an_incomplete_row_is_named_with_what_it_lacks(tmp_path, capsys, given, lost):
    row = {"method": "random", "family": "recall", "budget": 64}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n" + json.dumps(row | given) + "\n")
    assert main(["report", str(rows), "--out", str(tmp_path / "report")]) == 1
    said = capsys.readouterr().err
    assert f"row 2 of '{rows}' (random) has {next(iter(given))} but no {lost}" in " ".join(said.split()), said
    rows.write_text(json.dumps(row) + "\n")
    assert main(["report", str(rows), "--out", str(tmp_path / "report")]) == 0, "what was not measured may be left out"


@pytest.mark.parametrize("odd", [{"method": 3}, {"family": ["a"]}, {"budget_share": {}}, {"rules": "none"}])
def test_rows_have_texts_and_settings_where_these_belong(tmp_path, odd):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"method": "random", "family": "recall", "budget": 64, **odd}))
    with pytest.raises(DataError, match=f"{next(iter(odd))} of a row in"):
        read_rows(rows)


def test_results_pair_methods_sample_by_sample(finished):
    out, rows, log = finished
    for results in (read_results([out]), of_run(rows, log)):
        assert results.families == ["recall"] and results.budgets == ["1/4", "40"]
        assert results.methods("reference") == ["full", "random", "golden"]
        found = results.difference("random", "golden", "recall", "40")
        assert found.value == pytest.approx(rows[3]["step_accuracy"] - rows[4]["step_accuracy"])
        cell = results.cell("random", "random", "recall", "1/4")
        assert cell.gap == pytest.approx(rows[2]["step_accuracy"] - rows[1]["step_accuracy"])
        assert results.cell("h2o", "random", "recall", "1/4") is None


def test_the_results_page_is_made_of_rows(finished, tmp_path):
    out, _, _ = finished
    folder = tmp_path / "docs" / "results" / "main"
    folder.mkdir(parents=True)
    for path in (out, log_path(out)):
        (folder / path.name).write_bytes(path.read_bytes())
    bench = tmp_path / "bench"
    written = tables.write_results(tmp_path / "docs" / "results", tmp_path / "docs", bench)
    assert [path.name for path in written] == ["results-main.png", "results.md"]
    page = written[-1].read_text()
    assert "| golden |" in page and "](results-main.png)" in page and "bootstrap interval" in page
    assert "<summary>recall</summary>" in page and page.count('<details markdown="1">') == page.count("</details>") == 1
    bench.mkdir()
    (bench / "decode.json").write_text('{"rows": [{"tokens": 1024}]}')
    with pytest.raises(DataError, match="no file of a benchmark"):
        tables.write_results(tmp_path / "docs" / "results", tmp_path / "docs", bench)
    with pytest.raises(DataError, match="evaluate"):
        tables.write_results(tmp_path / "empty", tmp_path, bench)


def test_the_pooled_gap_says_what_it_pools():
    """Two families with a gap, one without, one that lacks golden, one not run."""
    log, rows = SampleLog(None, {}), []
    right = {
        "program": {"random": 4, "golden": 8, "foresightkv": 7},
        "ledger": {"random": 2, "golden": 6, "foresightkv": 3},
        "recall": {"random": 8, "golden": 8, "foresightkv": 9},
        "dialogue": {"random": 8, "foresightkv": 9},
    }
    for family, found in right.items():
        for method, count in found.items():
            key = Key(method, family, "1/4", "teacher")
            log.add(key, range(3), {"right": [count] * 3, "seen": [10] * 3})
            kind = "learned" if method == "foresightkv" else "heuristic"
            place = {"method": method, "family": family, "budget": 9, "budget_share": "1/4", "kind": kind}
            rows.append(place | {"seed": 0, "samples": 3})
    accuracy = {family: {"1/4": {"random": 0.5}} for family in right}
    text = "\n".join(sections.recovery_tables(of_run(rows, log), tuning.Tuned({}, {}, accuracy)))
    assert "| foresightkv | 0.500 [0.500, 0.500] (2) |" in text
    assert "Left out: 1/4: procedure (not run), recall (gap 0.000), dialogue (not run)." in text
    assert "as its gap is wide" in text and "weigh the same" not in text


def test_refinement_is_tested_against_its_start():
    """Two families; in one refinement helps every sample, in the other it changes nothing."""
    log, rows = SampleLog(None, {}), []
    for family, gain in (("program", 1), ("recall", 0)):
        for method, right in (("foresightkv", 4 + gain), ("foresightkv-sl", 4), ("golden", 9)):
            seeds = range(6)
            log.add(Key(method, family, "1/8", "teacher"), seeds, {"right": [right] * 6, "seen": [10] * 6})
            log.add(Key(method, family, "1/8", "free"), seeds, {"exact": [float(right > 4)] * 6})
            kind = "reference" if method == "golden" else "learned"
            place = {"method": method, "family": family, "budget": 9, "budget_share": "1/8", "kind": kind}
            rows.append(place | {"seed": 0, "samples": 6})
    results = of_run(rows, log)
    text = "\n".join(sections.refined_tables(results, results))
    pooled = sections.overview(results, "free")
    assert "Wilson" in pooled[0] and f"| foresightkv | {metrics.wilson(0.5, 12)} |" in pooled[1]
    assert text.count("| program | +0.100 [+0.100, +0.100], p = 0.0001 |") == 1
    assert text.count("| recall | +0.000 [+0.000, +0.000], p = 1.0000 |") == 2
    assert "| all | +0.050 [+0.050, +0.050], p = 0.0001 |" in text
    assert "| all | +0.500 [+0.500, +0.500], p = 0.0001 |" in text and "exact match, free generation" in text
    assert sections.refined_tables(None, None) == []


def test_the_method_table_stands_between_its_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n{}\nstale words\n{}\nafter\n".format(*tables.METHODS))
    assert tables.write_between(page, tables.METHODS, tables.method_table())
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| `h2o` | " in text and text.count("| `") == len(tables.methods.METHODS)
    page.write_text("no markers")
    assert not tables.write_between(page, tables.METHODS, tables.method_table())


# --- perplexity ---


def test_perplexity_is_that_of_the_replayed_trace():
    model = tiny()
    torch.manual_seed(5)
    ids = torch.randint(0, 12, (1, 61))
    policy = h2o.policy(14, **SMALL.options)
    found = perplexity.perplexity(model, ids, policy, chunk=10)
    with attach(model, policy, record=True) as cache, torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    assert cache.trace().evictions > 50
    logits = replay(model, ids, cache.trace()).logits[0].double()
    expected = -sum(float(logits[i].log_softmax(-1)[ids[0, i + 1]]) for i in range(60))
    assert found.loss == pytest.approx(expected, rel=1e-5) and found.num_tokens == 60
    assert found.value == pytest.approx(math.exp(expected / 60), rel=1e-5)
    for chunk in (4, 61):
        assert perplexity.perplexity(model, ids, policy, chunk=chunk).loss == pytest.approx(expected, rel=1e-5)
    whole = perplexity.perplexity(model, ids, None, chunk=7)
    assert whole.value == pytest.approx(math.exp(float(model(input_ids=ids, labels=ids).loss)), rel=1e-5)
    assert found.peak < whole.peak == whole.end == whole.full == found.full == 2 * 2 * 2 * 8 * 4 * 61


def test_texts_that_cannot_be_read_are_refused(subject, tmp_path):
    path = tmp_path / "text.txt"
    with pytest.raises(DataError, match="cannot read"):
        read_texts(path)
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_texts(path)
    path.write_bytes(b"\xef\xbb\xbffact ann\n")
    assert read_texts(path) == ("fact ann\n",)
    (tmp_path / "another.md").write_text("fact joe")
    (tmp_path / "image.png").write_bytes(b"\x89")
    assert read_texts(tmp_path) == ("fact joe", "fact ann\n")
    path.write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        read_texts(path)
    with pytest.raises(DataError, match="such as zebra"):
        perplexity.encode(subject.model, subject.tokenizer, "fact ann zebra ;")
    with pytest.raises(DataError, match="two tokens"):
        perplexity.encode(subject.model, subject.tokenizer, "ann")
    long = "fact ann river ; " * 600
    with pytest.raises(UsageError, match="--max-tokens 2048"):
        perplexity.encode(subject.model, subject.tokenizer, long)
    assert perplexity.encode(subject.model, subject.tokenizer, long, max_tokens=9).shape == (1, 9)


# --- the command line ---


@pytest.fixture(scope="module")
def folder(subject, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    subject.model.save_pretrained(path)
    subject.tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.slow
def test_eval_and_report_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = ["eval", "--model", folder, "--device", "cpu", "--families", "recall", "--samples", "2", "--out", str(out)]
    words += ["--methods", "full,random", "--budgets", "1/4", "--no-free"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert f"1/4 = {QUARTER}" in shown and "step accuracy" in shown
    assert main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*words, "--resume", "--json"]) == 0
    assert [json.loads(line)["method"] for line in capsys.readouterr().out.splitlines()] == ["full", "random"]
    more = [*words[:-5], "--methods", "h2o", "--budgets", "1/4,40", "--no-free", "--resume"]
    assert main(more) == 0
    shown, err = capsys.readouterr()
    assert "4 rows are in" in err
    assert max(map(len, shown.splitlines())) > 80 and len(shown.splitlines()) == 3, "a piped table wraps"
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "accuracy.png").exists()
    assert main(["report", str(out)]) == 0
    assert "| random |" in capsys.readouterr().out


def test_perplexity_from_the_command_line(folder, tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text("fact ann river stone ; " * 24)
    words = ["eval", "--task", "perplexity", "--text", str(text), "--model", folder, "--device", "cpu", "--json"]
    assert main([*words, "--method", "h2o,golden,h2o", "--budget", "40"]) == 0
    out, err = capsys.readouterr()
    assert "h2o named more than once; counted once" in err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["method"] for row in rows] == ["full", "h2o", "golden"] and rows[0]["perplexity_ratio"] == 1.0
    assert (
        rows[1]["num_tokens"] == 119 and rows[1]["budget"] == 40 and rows[1]["kv_bytes_peak"] < rows[0]["kv_bytes_peak"]
    )


def test_perplexity_keeps_what_is_finished_and_overwrites_nothing(folder, tmp_path, capsys):
    text, out = tmp_path / "book.txt", tmp_path / "rows.jsonl"
    text.write_text("fact ann river stone ; " * 24)
    words = [
        "eval",
        "--task",
        "perplexity",
        "--text",
        str(text),
        "--model",
        folder,
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    words += ["--method", "h2o,knorm", "--budget", "40,1/3"]
    out.write_text("my notes\n")
    assert main(words) == 2
    assert "choose another --out" in capsys.readouterr().err and out.read_text() == "my notes\n"
    assert main([*words[:-5], str(tmp_path / "no" / "rows.jsonl"), *words[-4:]]) == 1
    assert "cannot write" in capsys.readouterr().err
    out.unlink()
    with ctrl_c_after(out, 2):
        assert main([*words[:-1], ",".join(map(str, range(40, 80)))]) == 130
    assert f"interrupted: what is finished is kept in {out}" in capsys.readouterr().err
    kept = [(row["method"], row["budget"]) for row in read_rows(out)]
    assert kept[:2] == [("full", None), ("h2o", 40)] and len(kept) < 81
    out.unlink()
    assert main(words) == 0
    capsys.readouterr()
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert main(["report", str(out)]) == 0
    page, rows = capsys.readouterr().out, read_rows(out)
    assert f"Model {folder}, 119 tokens predicted; 1/3 = 40 slots." in page
    assert "Perplexity of the text" in page and f"| h2o | {rows[1]['perplexity']:.3f} (" in page
    assert "perplexity,perplexity_ratio" in (tmp_path / "report" / "table.csv").read_text()


@pytest.mark.slow
def test_an_interrupted_eval_says_what_is_kept(folder, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = ["eval", "--model", folder, "--device", "cpu", "--families", "dialogue", "--samples", "30", "--no-free"]
    words += ["--methods", "full,random", "--batch-size", "1", "--out", str(out)]
    with ctrl_c_after(log_path(out), 3):
        assert main(words) == 130
    err = capsys.readouterr().err
    assert f"what is finished is kept in {log_path(out)}; the same command with --resume goes on" in err
    assert 3 <= log_path(out).read_text().count("\n") < 60
    assert main([*words, "--resume", "--batch-size", "30"]) == 0


def test_gates_of_the_command_line(subject, folder, tmp_path, capsys):
    """Two of one method are refused; those of other weights are served where the user insists."""
    for name, model in (
        ("one", subject.model),
        ("two", subject.model),
        ("other", tiny(len(subject.tokenizer), seed=1)),
    ):
        Gates.make("foresightkv", model).save_pretrained(tmp_path / name)
    words = ["eval", "--model", folder, "--device", "cpu", "--families", "recall", "--samples", "2", "--no-free"]
    words += ["--methods", "foresightkv", "--ckpt", str(tmp_path / "one")]
    assert main([*words, "--ckpt", str(tmp_path / "two")]) == 2
    err = capsys.readouterr().err
    assert f"'{tmp_path / 'one'}' and --ckpt '{tmp_path / 'two'}' both hold gates of foresightkv" in err
    words[-1] = str(tmp_path / "other")
    assert main(words) == 1
    assert "--allow-other-base" in capsys.readouterr().err
    assert main([*words, "--allow-other-base"]) == 0


def test_every_method_is_measured_under_each_allocation(folder, tmp_path, capsys):
    out, shares = tmp_path / "rows.jsonl", tmp_path / "late.json"
    Shares(layers=((1.0, 0.0), (3.0, 2.0)), indices=(0, 1)).save(shares)
    words = ["eval", "--model", folder, "--device", "cpu", "--families", "recall", "--samples", "2", "--no-free"]
    words += ["--methods", "full,random,random+prompt,adakv,golden", "--budgets", "48", "--out", str(out)]
    assert main([*words, "--allocation", f"equal,pooled,{shares}"]) == 0
    assert "adakv: budgets are shared out as the method does it" in capsys.readouterr().err
    allocations = {row["method"]: row["allocation"] for row in read_rows(out)}
    late = allocations["golden+late"]
    assert late.startswith("profile ")
    assert allocations == {
        "full": None, "random": "equal", "random+pooled": "pooled", "random+late": late, "random+prompt": "equal",
        "random+prompt+pooled": "pooled", "random+prompt+late": late, "adakv": None, "golden": "equal",
        "golden+pooled": "pooled", "golden+late": late,
    }  # fmt: skip
    more = tmp_path / "stores.jsonl"
    words[-1], words[words.index("--methods") + 1] = str(more), "full,random"
    assert main([*words, "--store", "drop,50%+int4"]) == 0
    assert [row["method"] for row in read_rows(more)] == ["full", "random", "random+50%+int4"]
    kept = {row["method"]: row["kv_bytes_end"] for row in read_rows(out)}
    assert kept["random+prompt"] > kept["random"] and kept["golden+pooled"] < 1.1 * kept["golden"]


PERPLEXITY = ["--task", "perplexity", "--text", "x.txt"]
NEEDLE = ["--tasks", "needle", "--text", "x.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*PERPLEXITY, "--samples", "3", "--temperature", "0"],
            "--samples and --temperature belong to tasks of several samples",
        ),
        ([*PERPLEXITY, "--split", "test"], "--split belongs to the testbed"),
        ([*PERPLEXITY, "--keep-prompt"], "--keep-prompt belongs to tasks of several samples"),
        (["--families", "sudoku"], "no such task family"),
        (["--methods", "magic"], "no method 'magic'"),
        (["--methods", "random", "--budgets", "8"], "smallest"),
        (["--methods", "foresightkv", "--ckpt", "/nowhere"], "no gates in"),
        (["--text", "x.txt"], "--text belongs to other tasks than testbed"),
        (["--tasks", "poetry"], "choose testbed, perplexity, needle"),
        (["--tasks", "needle,gsm8k"], "tasks of one group"),
        (["--tasks", "needle"], "--text FILE"),
        (["--tasks", "gsm8k"], "--data test.jsonl"),
        (["--tasks", "needle", "--text", "x.txt", "--length", "long"], "number of tokens"),
        (["--length", "77"], "normal or long"),
        (
            [*NEEDLE, "--temperature", "1", "--tries", "2"],
            "--temperature and --tries belong to other tasks than needle",
        ),
        ([*NEEDLE, "--keep-prompt"], "--keep-prompt belongs to other tasks than needle"),
        ([*PERPLEXITY, "--length", "64", "--free"], "--free/--no-free belongs to other tasks than perplexity"),
        (["--task", "perplexity"], "--text"),
        (["--task", "perplexity", "--text", "/nowhere.txt"], "cannot read"),
        (["--resume", "--methods", "full"], "--out"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(folder, words, message, capsys):
    assert main(["eval", "--model", folder, "--device", "cpu", *words]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_the_method_table_of_the_readme_is_up_to_date():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert tables.method_table() in readme, "run scripts/write_tables"
