"""The streamed trainer: what a gate is shown in training is what inference shows it, and the targets beside it are right."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from learnevict import Gates, attach, oracle
from learnevict.config import Budget
from learnevict.data.documents import Collator
from learnevict.data.label_store import Document
from learnevict.errors import BudgetError, DataError, GateError, UsageError
from learnevict.infer.teacher_forcing import replay
from learnevict.methods.golden import Hindsight
from learnevict.oracle import GOLDEN, KVP, KVZIP, future_attention, golden_labels, golden_trace, reconstruct
from learnevict.policy import Gate, Guard, Policy, Schedule, Scorer
from learnevict.signals import Signals, StateColumn
from learnevict.train.trainers.layer_batch import LayerBatch, UnpaddedPositions
from learnevict.train.trainers.pairwise import RankingConfig
from learnevict.train.trainers.regression import StreamConfig, StreamTrainer, fit_linear, stream_loss
from learnevict.train.trainers.teacher_pass import OBJECTIVES
from tests.closeness import close
from tests.laws import zoo
from tests.laws.cases import random_gates
from tests.laws.naive import position_ids
from tests.laws.run import batch

PERIOD, BUDGET, LENGTH = 4, 18, 46
PADS = (0, 6, 15)
GUARD = Guard(2, 3)
CONFIG = StreamConfig(period=PERIOD, budgets=(12, 30), sinks=2, recent=3, chunk=13)


def text(pads: tuple[int, ...] = PADS) -> tuple[Tensor, Tensor]:
    return batch(zoo.distinct_tokens(zoo.build("qwen3"), len(pads), LENGTH), pads)


@dataclass
class Onlooker(Scorer):
    """Evicts by hindsight, or nothing if there is no trace; keeps a ranker's state, and takes down its scores of events."""

    gate: Gate
    hindsight: Hindsight | None
    window: int = 5
    seen: dict[tuple[int, int], tuple[Signals, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[StateColumn, ...]:  # type: ignore[override]
        return (*self.gate.columns, StateColumn("left", dtype=torch.bool))

    def write(self, signals: Signals) -> dict[str, Tensor]:
        return self.gate.write(signals)

    def score(self, signals: Signals) -> Tensor:
        frozen = replace(signals, ring=tuple(part.clone() for part in signals.ring))
        for row, seen in enumerate(signals.rows.seen.tolist()):
            at = (signals.layer, row, seen)
            if seen and seen % PERIOD == 0:
                self.seen.setdefault(at, (frozen, self.gate.score(signals)[row], signals.position[row].clone()))
        assert self.hindsight is not None
        return self.hindsight.score(signals)


def by_position(values: Tensor, position: Tensor) -> list[dict[int, Tensor]]:
    """Per head, what stands in the slot of each position."""
    return [
        {p: v for p, v in zip(ps.tolist(), vs, strict=True) if p >= 0} for ps, vs in zip(position, values, strict=True)
    ]


@pytest.mark.parametrize("method", ["kvp", "kvpop"])
def test_a_cut_is_the_event_that_inference_meets(method):
    """Regression 7: along a golden trace, every event of every row and layer, slot by slot; and 9, rows are padded."""
    model, gate = zoo.build("qwen3"), random_gates(method, "qwen3").gate.eval()
    ids, mask = text()
    trace = golden_trace(model, ids, mask, budget=BUDGET, block=PERIOD, guard=GUARD)
    onlooker = Onlooker(gate, Hindsight(trace.expiry.unsqueeze(-1)))
    policy = Policy(Budget(BUDGET), onlooker, schedule=Schedule(PERIOD), guard=GUARD)
    with torch.no_grad(), attach(model, policy, record=True) as cache:
        model(ids, attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache)
    assert torch.equal(cache.trace().expiry, trace.expiry) and trace.evictions > 0
    positions, batches = UnpaddedPositions.of(ids, mask.bool()), {}
    with torch.no_grad():
        replay(
            model, ids, trace, mask,
            observe=lambda i, one: batches.update({i: LayerBatch.of(i, positions, one, expiry=trace.expiry[i])}),
        )  # fmt: skip
    met = 0
    for (layer, row, seen), (signals, scores, position) in onlooker.seen.items():
        one_layer = batches[layer]
        with torch.no_grad():
            state = one_layer.state(gate.write(one_layer.written(gate.columns)), gate.columns)
            cuts = torch.tensor([min(seen, LENGTH - pad) // PERIOD * PERIOD for pad in PADS])
            shown = one_layer.event(cuts, PERIOD, torch.full((3,), BUDGET, dtype=torch.int32), state, window=5)
            again = gate.score(shown)
        for one, other in zip(by_position(scores, position), by_position(again[row], shown.position[row]), strict=True):
            assert set(one) == set(other)
            met += len(one)
            close([one[p] for p in one], [other[p] for p in one])
        for name in ("first", "now", "seen", "block", "prompt_end"):
            assert getattr(signals.rows, name)[row] == getattr(shown.rows, name)[row], name
        kept = signals.ring[1][row].sort().values
        assert torch.equal(kept, shown.ring[1][row].sort().values)
        size = int((signals.query_position[row] >= 0).sum())
        assert signals.query_position[row, :size].tolist() == shown.query_position[row].tolist()
        close(signals.hidden[row, :size], shown.hidden[row])
        close(signals.key[row, :, :size], shown.key[row])
        assert torch.equal(signals.tokens[row, :size], shown.tokens[row])
    assert met > 1000


@pytest.mark.parametrize("method", ["kvzap", "fast_kvzip"])
def test_what_a_surrogate_is_asked_is_what_it_state(method):
    """Regression 7: the estimate in training is the number that a slot keeps."""
    model, gates = zoo.build("qwen3"), random_gates(method, "qwen3")
    ids, mask = text()
    with torch.no_grad(), attach(model, gates.policy(4 * LENGTH, slack=PERIOD, sinks=2, recent=3)) as cache:
        model(ids, attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache)
    positions, predictions = UnpaddedPositions.of(ids, mask.bool()), {}

    def see(layer, received):
        one_layer = LayerBatch.of(layer, positions, received)
        predictions[layer] = gates.gate.predictions(one_layer.written(gates.gate.columns))

    with torch.no_grad():
        replay(model, ids, oracle.full_trace(model, ids), mask, observe=see)
    for layer, found in predictions.items():
        store = cache.layers[layer].store
        noted = by_position(store.state.columns["estimate"].flatten(0, 1), store.position.flatten(0, 1))
        asked = by_position(found.flatten(0, 1), positions.column.repeat_interleave(2, 0))
        for one, other in zip(noted, asked, strict=True):
            assert set(one) == set(other)
            close([one[p] for p in one], [other[p] for p in one])


def spied(monkeypatch, gate, config: StreamConfig, inputs: dict) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Scores, targets and candidates of every comparison in one call."""
    met = []

    def objective(scores, targets, candidates):
        met.append((scores.detach(), targets, candidates))
        return scores.sum() * 0

    monkeypatch.setitem(OBJECTIVES, "bce", objective)
    stream_loss(gate, zoo.build("qwen3"), inputs, replace(config, objective="bce"))
    return met


def test_verdicts_on_tokens_as_they_are_written(monkeypatch):
    """The largest golden label of blocks after a token's own; neither sinks nor the last block are asked for."""
    model, ids, mask = zoo.build("qwen3"), *text()
    labels, _ = golden_labels(model, ids, mask, block=PERIOD)
    met = spied(monkeypatch, random_gates("kvzap", "qwen3").gate, CONFIG, {"input_ids": ids, "attention_mask": mask})
    assert len(met) == len(labels)
    for label, (_, targets, candidates) in zip(labels, met, strict=True):
        for row, pad in enumerate(PADS):
            length = LENGTH - pad
            last = (length - 1) // PERIOD
            for i in range(LENGTH):
                asked = 2 <= i < length and i // PERIOD < last
                assert bool(candidates[row, :, i].all()) == bool(candidates[row, :, i].any()) == asked
                if asked:
                    ahead = label[row, :, pad + i, i // PERIOD + 1 : last + 1]
                    close(targets[row, :, i], ahead.amax(-1))


def test_verdicts_of_a_repetition(monkeypatch):
    model, ids, mask = zoo.build("qwen3"), *text()
    config = replace(CONFIG, target="reconstruction")
    met = spied(
        monkeypatch, random_gates("fast_kvzip", "qwen3").gate, config, {"input_ids": ids, "attention_mask": mask}
    )
    labels = reconstruct(model, ids, mask, how=oracle.Repeating(13, 2), reduce=KVZIP)
    for label, (_, targets, candidates) in zip(labels, met, strict=True):
        for row, pad in enumerate(PADS):
            close(targets[row, :, : LENGTH - pad], label[row, :, pad:])
            assert candidates[row, 0].tolist() == [2 <= i < LENGTH - pad for i in range(LENGTH)]


def test_targets_at_cuts(monkeypatch):
    """KVP: attention summed over all queries after the cut, the largest of the group; what guards hold is no candidate."""
    model, ids, mask = zoo.build("qwen3"), *text()
    gate = random_gates("kvp", "qwen3").gate
    shown = []
    monkeypatch.setattr(gate, "score", lambda signals, score=gate.score: shown.append(signals) or score(signals))
    met = spied(monkeypatch, gate, replace(CONFIG, cuts=3), {"input_ids": ids, "attention_mask": mask})
    whole = []

    def see(layer, one):
        reduce, scaling = replace(KVP, group="none", group_last=False), one.attention.scaling
        found = future_attention(one.query, one.key, block=1, reduce=reduce, valid=mask.bool(), scaling=scaling)
        whole.append(found)

    with torch.no_grad():
        replay(model, ids, oracle.full_trace(model, ids), mask, observe=see)
    assert len(met) == 3 * len(whole) and len({int(signals.rows.seen[0]) for signals in shown}) > 1
    for signals, (_, targets, candidates) in zip(shown, met, strict=True):
        for row, pad in enumerate(PADS):
            seen = int(signals.rows.seen[row])
            assert seen % PERIOD == 0 and seen < LENGTH - pad
            assert candidates[row, 0].nonzero().flatten().tolist() == list(range(2, seen - PERIOD))
            later = whole[signals.layer][row, :, pad : pad + seen, seen : LENGTH - pad].sum(-1).view(2, 2, seen).amax(1)
            close(targets[row, :, :seen], later)


def test_cuts_of_texts_read_under_eviction(monkeypatch):
    """Along golden eviction the slots are those that are left, and targets still those of the full cache."""
    _, ids, mask = zoo.build("qwen3"), *text()
    gate = random_gates("kvpop", "qwen3").gate
    shown = []
    monkeypatch.setattr(gate, "score", lambda signals, score=gate.score: shown.append(signals) or score(signals))
    config = replace(CONFIG, along="golden", budgets=(12, 12), cuts=4)
    met = spied(monkeypatch, gate, config, {"input_ids": ids, "attention_mask": mask})
    labels, _ = golden_labels(zoo.build("qwen3"), ids, mask, block=PERIOD)
    fewer = 0
    for signals, (_, targets, candidates) in zip(shown, met, strict=True):
        assert signals.budget.tolist() == [12] * 3
        for row, pad in enumerate(PADS):
            seen = int(signals.rows.seen[row])
            held = signals.occupied[row].sum(-1)
            assert held.tolist() == [min(seen, 12 + PERIOD)] * 2
            fewer += seen > 12 + PERIOD
            want = labels[signals.layer][row, :, pad : pad + seen, seen // PERIOD :].amax(-1)
            there = candidates[row, :, :seen]
            close(targets[row, :, :seen][there], want[there])
    assert fewer


def test_stored_labels_are_those_made_on_the_way():
    model, ids, mask = zoo.build("qwen3"), *text()
    labels, _ = golden_labels(model, ids, mask, block=PERIOD)
    gate = random_gates("kvzap", "qwen3").gate
    made = stream_loss(gate, model, {"input_ids": ids, "attention_mask": mask}, CONFIG)
    read = stream_loss(
        gate, model, {"input_ids": ids, "attention_mask": mask, "stored_labels": torch.stack(labels)}, CONFIG
    )
    for one, other in zip(made, read, strict=True):
        close(one, other)
    with pytest.raises(UsageError, match="stored labels are golden"):
        stream_loss(
            random_gates("kvp", "qwen3").gate,
            model,
            {"input_ids": ids, "attention_mask": mask, "stored_labels": torch.stack(labels)},
            CONFIG,
        )


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("kvpop", {"along": "golden"}),
        ("kvp", {}),
        ("kvzap", {"target": "reconstruction", "along": "golden"}),
        ("fast_kvzip", {}),
    ],
)
def test_gradients_reach_every_parameter_and_nothing_else(method, changes):
    """Also those of what a gate state while tokens are written; the base gets none."""
    model, gates = zoo.build("qwen3"), random_gates(method, "qwen3")
    ids, mask = text()
    gates.zero_grad()
    loss, measured = gates(stream_loss, model, {"input_ids": ids, "attention_mask": mask}, replace(CONFIG, **changes))
    loss.backward()
    for name, parameter in gates.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
    assert float(measured) >= 0.9
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        assert not gates(stream_loss, model, {"input_ids": ids, "attention_mask": mask}, replace(CONFIG, **changes))[
            0
        ].requires_grad
    gates.zero_grad()


def documents(num: int) -> list[Document]:
    ids = zoo.tokens(zoo.build("qwen3"), num, LENGTH)
    return [Document(row.tolist()[: LENGTH - 3 * (i % 3)], 5, "", i) for i, row in enumerate(ids)]


def trainer(method: str, folder, steps: int, config: StreamConfig = CONFIG, num: int = 16, **settings) -> StreamTrainer:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=2,
        report_to="none", remove_unused_columns=False, dataloader_pin_memory=False, use_cpu=True, disable_tqdm=True,
        save_strategy="no", seed=3,
    )  # fmt: skip
    return StreamTrainer(
        model=Gates.make(method, zoo.build("qwen3"), **settings), args=arguments, train_dataset=documents(num),
        data_collator=Collator(0), base=zoo.build("qwen3"), config=config,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kvzap", "fast_kvzip", "kvp", "kvpop"])
def test_training_learns(method, tmp_path):
    trained = trainer(method, tmp_path, 10)
    trained.train()
    log = [line for line in trained.state.log_history if "loss" in line]
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(line["regret"] > 0 for line in log)
    trained.save_model(str(tmp_path / "gates"))
    again = Gates.load(tmp_path / "gates", zoo.build("qwen3"))
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_the_linear_surrogate_in_closed_form():
    """The normal equations in one go; its error is that of least squares, which no other weights go below."""
    model, gates = zoo.build("qwen3"), Gates.make("kvzap", zoo.build("qwen3"), kind="linear")
    ids, mask = text()
    inputs = {"input_ids": ids, "attention_mask": mask}
    fit_linear(model, gates, [inputs], CONFIG, strength=1e-4)
    labels, _ = golden_labels(model, ids, mask, block=PERIOD)
    received = {}
    with torch.no_grad():
        full = oracle.full_trace(model, ids)
        replay(model, ids, full, mask, observe=lambda i, one: received.update({i: one}))
    for layer, one in received.items():
        rows, wanted = [], []
        for row, pad in enumerate(PADS):
            last = (LENGTH - pad - 1) // PERIOD
            for i in range(2, last * PERIOD):
                rows.append([*one.hidden[row, pad + i].double().tolist(), 1.0])
                ahead = labels[layer][row, :, pad + i, i // PERIOD + 1 :].amax(-1)
                wanted.append(ahead.clamp_min(1e-6).double().log().tolist())
        x, y = torch.tensor(rows).double(), torch.tensor(wanted).double()
        shrunk = 1e-4 * len(rows) * torch.eye(x.shape[1]).double()
        shrunk[-1, -1] = 0
        found = torch.linalg.inv(x.T @ x + shrunk) @ x.T @ y
        close(gates.gate.weight[layer], found[:-1].float())
        close(gates.gate.bias[layer], found[-1].float())
    with torch.no_grad():
        fitted, _ = stream_loss(gates.gate, model, inputs, CONFIG)
        gates.gate.weight += 0.05 * torch.randn_like(gates.gate.weight)
        assert fitted < stream_loss(gates.gate, model, inputs, CONFIG)[0]
    with pytest.raises(GateError, match="linear surrogates"):
        fit_linear(model, random_gates("kvzap", "qwen3"), [inputs], CONFIG)
    with pytest.raises(DataError, match="more than 6 tokens"):
        fit_linear(model, gates, [], CONFIG)


@pytest.mark.slow
def test_a_run_may_start_from_the_closed_form(tmp_path):
    """All documents at once, and then steps; a run that goes on does not start again."""
    started = trainer("kvzap", tmp_path, 2, replace(CONFIG, closed_form=True), num=8, kind="linear")
    started.train()
    first = started.state.log_history[0]["loss"]
    alone = Gates.make("kvzap", zoo.build("qwen3"), kind="linear")
    inputs = Collator(0)(documents(8))
    with torch.no_grad():
        plain, _ = stream_loss(alone.gate, zoo.build("qwen3"), inputs, CONFIG)
        fit_linear(zoo.build("qwen3"), alone, [inputs], CONFIG)
        best, _ = stream_loss(alone.gate, zoo.build("qwen3"), inputs, CONFIG)
    assert abs(first - float(best)) < 0.2 * float(plain - best)
    with pytest.raises(GateError, match="--kind linear"):
        trainer("kvzap", tmp_path, 2, replace(CONFIG, closed_form=True))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"budgets": (160, 36)}, BudgetError, "training budgets 160 36: give the smallest and then the largest"),
        ({"budgets": (8, 36)}, BudgetError, "the smallest that works is 21"),
        ({"cuts": 0}, UsageError, "--cuts 0: give 1 or more"),
        ({"period": 0}, UsageError, "--period 0: give 1 or more"),
        ({"horizon": 0}, UsageError, "--horizon 0: give 1 or more"),
        ({"pairs": -1}, UsageError, "--pairs -1: give 0 or more"),
        ({"objective": "guess"}, UsageError, "objective 'guess' is unknown"),
    ],
)
def test_settings_that_make_no_sense_are_told(given, kind, message):
    with pytest.raises(kind, match=message):
        StreamConfig(**given)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"budgets": (160, 36)}, BudgetError, "training budgets 160 36"),
        ({"own_rows": 3.0}, UsageError, "--own_rows 3.0: give 0 or more, and at most 1$"),
        ({"pairs": 0}, UsageError, "--pairs 0: give 1 or more"),
        ({"period": 0}, UsageError, "--period 0: give 1 or more"),
        ({"regression": -0.1}, UsageError, "--regression -0.1: give 0 or more"),
    ],
)
def test_settings_of_a_ranking_that_make_no_sense_are_told(given, kind, message):
    with pytest.raises(kind, match=message):
        RankingConfig(**given)


def test_networks_are_calibrated_once():
    model, gates = zoo.build("qwen3"), Gates.make("kvp", zoo.build("qwen3"))
    ids, mask = text()
    stream_loss(gates.gate, model, {"input_ids": ids, "attention_mask": mask}, CONFIG)
    network = gates.gate.network
    assert bool(network.calibrated.all())
    keys = []
    with torch.no_grad():
        full = oracle.full_trace(model, ids)
        replay(model, ids, full, mask, observe=lambda _, one: keys.append(one.key.transpose(1, 2)[mask.bool()]))
    for layer, real in enumerate(keys):
        close(network.mean_key[layer, :, 0], real.mean(0))
        close(network.scale_key[layer, :, 0], real.std(0, unbiased=False), 1e-4)
    before = network.mean_key.clone()
    stream_loss(gates.gate, model, {"input_ids": ids.flip(0), "attention_mask": mask.flip(0)}, CONFIG)
    stream_loss(gates.gate, model, {"input_ids": ids[:1], "attention_mask": mask[:1]}, CONFIG)
    assert torch.equal(network.mean_key, before)


def test_errors_teach(tmp_path):
    for changes, message in [
        ({"objective": "hinge"}, "bce, mse, pairwise, regret"), ({"budgets": (6, 30)}, "smallest that works is 7"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **changes)
    with pytest.raises(GateError, match="mode replay"):
        trainer("foresightkv", tmp_path, 1)
    with pytest.raises(UsageError, match="target='future'"):
        trainer("kvp", tmp_path, 1, replace(CONFIG, target="reconstruction"))
    short = {"input_ids": zoo.tokens(zoo.build("qwen3"), 2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    with pytest.raises(DataError, match="leave out texts shorter than 14"):
        stream_loss(random_gates("kvp", "qwen3").gate, zoo.build("qwen3"), short, CONFIG)
    assert CONFIG.reduce(random_gates("kvzap", "qwen3").gate) == GOLDEN
