"""Learning through the model: what a batch costs, what learns from it, and that all gates of this kind get better."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from learnevict import Gates, methods
from learnevict.data.documents import Collator
from learnevict.data.label_store import Document
from learnevict.errors import BudgetError, UsageError
from learnevict.infer.model.supported import layout_of
from learnevict.train.losses import capacity, objectives
from learnevict.train.trainers.soft_gate import LOSSES, SoftConfig, SoftTrainer
from tests.closeness import close
from tests.laws import zoo
from tests.laws.naive import stock

SETTINGS = {
    "trimkv": {"hidden": 16, "bias": 4.0, "dropout": 0.0},
    "wg_kv": {"hidden": 16, "window": 4},
    "dms": {"window": 4, "bias": -1.0, "noise": 0.0},
}
pytestmark = pytest.mark.filterwarnings("ignore::learnevict.errors.StockLayersWarning")


def documents(count: int = 4) -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    lengths = [24 + 4 * (index % 3) for index in range(count)]
    ids = [torch.randint(3, zoo.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [Document(part, 10, "random", index) for index, part in enumerate(ids)]


def trainer(tmp_path, method: str, name: str = "qwen3", soft: SoftConfig | None = None, **settings) -> SoftTrainer:
    torch.manual_seed(0)
    base = zoo.build(name)
    gates = Gates.make(method, base, **(SETTINGS[method] | settings))
    options = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=3e-2, report_to="none",
        logging_steps=2, save_strategy="no", remove_unused_columns=False, use_cpu=True, disable_tqdm=True, seed=7,
        dataloader_pin_memory=False,
    )  # fmt: skip
    given = {"model": gates, "args": options, "train_dataset": documents(), "data_collator": Collator(0), "base": base}
    return SoftTrainer(**given, config=soft or SoftConfig(budgets=(6, 6), ramp=0.0))


@pytest.mark.parametrize("method", SETTINGS)
def test_gates_learn_and_the_base_does_not(tmp_path, method):
    teaching = trainer(tmp_path, method)
    weights = {name: part.clone() for name, part in teaching.base.named_parameters()}
    before = {name: part.clone() for name, part in teaching.gate.named_parameters()}
    teaching.train()
    assert all(torch.equal(part, weights[name]) for name, part in teaching.base.named_parameters())
    assert all(part.grad is None for part in teaching.base.parameters())
    assert all(not torch.equal(part, before[name]) for name, part in teaching.gate.named_parameters())
    losses = [line["loss"] for line in teaching.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert set(teaching.gate.losses) <= set(teaching.state.log_history[0])


def test_the_loss_is_the_sum_of_what_the_gate_asks_for(tmp_path):
    """Each part from its definition, on a batch with padding, with factors for capacity and only responses scored."""
    soft = SoftConfig(budgets=(6, 6), capacity=0.5, answers_only=True)
    teaching = trainer(tmp_path, "trimkv", soft=soft)
    batch = Collator(0)(documents())
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        loss = float(teaching.compute_loss(teaching.model, batch))
    parts = {name: values[-1] for name, values in teaching.figures.items()}
    assert loss == pytest.approx(parts["divergence"] + parts["next_token"] + 0.5 * parts["hinge"], rel=1e-5)
    scored = torch.zeros_like(mask, dtype=torch.bool)
    for row, document in enumerate(documents()):
        start = ids.shape[1] - len(document.input_ids) + document.prompt_length - 1
        scored[row, start:-1] = True
    rates = [torch.zeros(len(ids), 2, ids.shape[1])]
    most = float(capacity.hinge(rates, mask.bool(), 6))
    assert 0 < parts["hinge"] < most
    plain = stock(zoo.build("qwen3"), ids, mask)
    assert parts["next_token"] == pytest.approx(float(objectives.next_token(plain, ids, scored)), abs=0.2)
    whole = trainer(tmp_path, "trimkv", soft=SoftConfig(budgets=(6, 6)))
    with torch.no_grad():
        whole.compute_loss(whole.model, batch)
    assert whole.figures["next_token"][-1] != parts["next_token"]
    blunt = trainer(tmp_path, "trimkv", soft=SoftConfig(budgets=(6, 6), power=0.0))  # any weight counts as one slot
    with torch.no_grad():
        blunt.compute_loss(blunt.model, batch)
    assert blunt.figures["hinge"][-1] == pytest.approx(most, rel=1e-5)


@pytest.mark.parametrize("method", SETTINGS)
def test_computing_layers_again_gives_the_same_gradients(tmp_path, method):
    gradients = []
    for recompute in (False, True):
        teaching = trainer(tmp_path, method, soft=SoftConfig(budgets=(6, 6), recompute=recompute))
        torch.manual_seed(1)
        teaching.compute_loss(teaching.model, Collator(0)(documents())).backward()
        gradients.append([part.grad for part in teaching.gate.parameters()])
    assert any(one.abs().max() > 0 for one in gradients[0])
    for one, other in zip(*gradients, strict=True):
        close(one, other)


def test_the_share_to_evict_rises():
    soft = SoftConfig(compression=8.0, ramp=0.5)
    assert [soft.target(at) for at in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 1 - 1 / 4.5, 7 / 8, 7 / 8])
    assert SoftConfig(compression=4.0, ramp=0.0).target(0.0) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"budgets": (0, 8)}, BudgetError, "training budgets 0 8: give the smallest and then the largest"),
        ({"budgets": (90, 10)}, BudgetError, "training budgets 90 10"),
        ({"power": -0.5}, UsageError, "--power -0.5: give 0 or more"),
        ({"capacity": -1.0}, UsageError, "--capacity -1.0: give 0 or more"),
        ({"compression": 0.5}, UsageError, "--compression 0.5: give 1 or more"),
        ({"ramp": 1.5}, UsageError, "--ramp 1.5: .* at most 1$"),
        ({"ramp": -0.1}, UsageError, "--ramp -0.1: give 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_told(given, kind, message):
    with pytest.raises(kind, match=message):
        SoftConfig(**given)


def test_marks_are_counted_whatever_they_weigh(tmp_path):
    """Regression: with a power of 0.5, a gate of 0.4 counted as 0.63, which is not evicted."""
    with pytest.raises(UsageError, match="leave power at 1"):
        trainer(tmp_path, "dms", soft=SoftConfig(power=0.5))
    trainer(tmp_path, "wg_kv", soft=SoftConfig(power=0.5))


def test_what_the_trainer_refuses(tmp_path):
    teaching = trainer(tmp_path, "dms", name="mistral_window")
    with pytest.raises(UsageError, match="every layer"):
        teaching.compute_loss(teaching.model, Collator(0)(documents()))
    teaching = trainer(tmp_path, "trimkv")
    teaching.gate.losses = {"mystery": 1.0}
    with pytest.raises(UsageError, match="mystery"):
        SoftTrainer(model=teaching.model, args=teaching.args, train_dataset=[], base=teaching.base, config=SoftConfig())


def test_every_gate_of_this_kind_asks_for_losses_that_exist():
    layout = layout_of(zoo.build("llama").config)
    gates = [methods.load(name).build(layout) for name in SETTINGS]
    gates.append(methods.dbtrimkv.build(layout))
    for gate in gates:
        assert gate.mode == "soft"
        assert set(gate.losses) <= set(LOSSES)
        assert any(not LOSSES[name][0] for name in gate.losses)  # something makes it forget
        assert any(LOSSES[name][0] for name in gate.losses)  # and something makes it remember
