"""The distilling recipe: its command line for every method, every mode's exact resume, what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from learnevict import attach, methods, testbed
from learnevict.errors import BudgetError, DataError, GateError, LabelError, UsageError
from learnevict.hub import Gates
from learnevict.hub.run_record import read_record
from learnevict.oracle import golden_labels
from learnevict.policy import Guard, Schedule
from learnevict.train.run.registry import trainable_method
from learnevict.train.trainer import last_checkpoint
from learnevict.train.trainers.replay_states import record_states
from learnevict.train.validation import BEST, Patience
from tests.recipe_runs import ToBeKilled, assert_equal, assert_same, run_recipe, save_tiny_base

ROOT = Path(__file__).resolve().parents[2]
TRAINED = {"replay": "foresightkv", "stream": "kvzap", "soft": "trimkv", "probe": "judge_q"}
BUDGETS = ["--budgets", "24", "40"]
SMALL = {
    "foresightkv": [*BUDGETS, "--hidden", "8"],
    "kvzap": BUDGETS,
    "trimkv": [*BUDGETS, "--hidden", "8", "--bias", "2"],
    "judge_q": ["--num_tokens", "3", "--horizon", "8"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that speaks the testbed's words."""
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with completions of random words, 60 to 76 tokens."""
    words = [word for word in testbed.build_tokenizer().get_vocab() if not word.startswith("<")]
    rng = Random(0)
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [
        {"prompt": " ".join(rng.choices(words, k=30)), "completion": " ".join(rng.choices(words, k=30 + i % 16))}
        for i in range(24)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def flags(base: Path, texts: Path) -> list[str]:
    return [
        *("--model", str(base), "--data", str(texts), "--documents", "10", "--period", "8", "--sinks", "2"),
        *("--recent", "4", "--per_device_train_batch_size", "2", "--max_steps", "4"),
        *("--save_steps", "2", "--logging_steps", "3", "--warmup_steps", "1", "--disable_tqdm", "true"),
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("mode", sorted(TRAINED))
def test_every_mode_resumes_exactly(mode, tmp_path, distill, flags):
    """A run that is lost after its first checkpoint and resumed, against one that is not."""
    method = TRAINED[mode]
    assert trainable_method(method, {}).mode == mode
    flags = [*flags, "--method", method, *SMALL[method]]
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    distill.main(distill.parse([*flags, "--output_dir", str(whole)]))
    shutil.copytree(whole / "checkpoint-2", lost / "checkpoint-2")
    shutil.copy(whole / "run.json", lost)
    distill.main(distill.parse([*flags, "--output_dir", str(lost), "--resume_from_checkpoint", "true"]))
    assert_same(whole, lost)
    start = weights(whole / "checkpoint-2")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights(whole).items()), "nothing was learned"
    record = read_record(lost)
    assert (record["status"], record["mode"]["name"], record["steps"]) == ("finished", mode, 4)
    assert len(record["sessions"]) == 1
    assert record["seeds"] == {"seed": 7, "data_seed": 7}
    assert record["base_hash"] and record["data_hash"]
    assert record["training"]["max_steps"] == 4
    assert not list(whole.rglob("*.bin"))
    assert Gates.load(whole).config.training["mode"]["name"] == mode


@pytest.mark.slow
def test_a_stream_resumes_exactly(tmp_path, distill, flags):
    flags = [*flags, *SMALL["foresightkv"], "--streaming", "--packed", "--max_length", "50"]
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    distill.main(distill.parse([*flags, "--output_dir", str(whole)]))
    shutil.copytree(whole / "checkpoint-2", lost / "checkpoint-2")
    distill.main(distill.parse([*flags, "--output_dir", str(lost), "--resume_from_checkpoint", "true"]))
    assert_same(whole, lost)
    assert read_record(whole)["data_hash"] == read_record(lost)["data_hash"]
    assert len(read_record(whole)["data_hash"]) == 64


@pytest.mark.slow
def test_evaluations_choose_the_best_and_change_nothing(tmp_path, distill, flags, texts):
    flags = [*flags, *SMALL["foresightkv"], "--eval_documents", "3"]
    plain, validated, rest = tmp_path / "plain", tmp_path / "validated", tmp_path / "rest.jsonl"
    rest.write_text("\n".join(texts.read_text().split("\n")[3:]))  # what is left when three are held out
    distill.main(distill.parse([*flags, "--data", str(rest), "--output_dir", str(plain)]))
    more = ["--eval_steps", "2", "--eval_budgets", "24", "50%", "--patience", "9", "--output_dir", str(validated)]
    distill.main(distill.parse([*flags, *more]))
    assert_equal(weights(plain / "checkpoint-4"), weights(validated / "checkpoint-4"))
    record = read_record(validated)
    lines = {line["step"]: line for line in record["log"] if BEST in line}
    assert sorted(lines) == [2, 4]
    assert {"eval_top_recall", "eval_attention_kept", f"{BEST}_24", f"{BEST}_50%"} <= set(lines[2])
    assert lines[2][BEST] == pytest.approx((lines[2][f"{BEST}_24"] + lines[2][f"{BEST}_50%"]) / 2, abs=1e-4)
    best = max(lines, key=lambda step: lines[step][BEST])
    assert record["best"] == {"step": best, BEST: lines[best][BEST]}
    assert_equal(weights(validated), weights(validated / f"checkpoint-{best}"))


def test_texts_too_short_to_evaluate_on_are_told(tmp_path, distill, flags):
    more = ["--eval_documents", "2", "--eval_steps", "1", "--eval_budgets", "99", "--output_dir", str(tmp_path)]
    with pytest.raises(UsageError, match="too short for --eval_budgets 99"):
        distill.main(distill.parse([*flags, *SMALL["foresightkv"], *more]))
    assert read_record(tmp_path)["status"] == "failed"


def test_a_budget_that_cannot_be_held_is_told_before_the_first_step(tmp_path, distill, flags, monkeypatch):
    monkeypatch.setattr("learnevict.train.run.resume.go_on", lambda *_: pytest.fail("it began to train"))
    more = ["--eval_documents", "2", "--eval_steps", "1", "--eval_budgets", "5", "--output_dir", str(tmp_path)]
    with pytest.raises(BudgetError, match="budget 5 is too small"):
        distill.main(distill.parse([*flags, *SMALL["foresightkv"], *more]))


def test_a_file_of_flags(tmp_path, distill, flags):
    path = tmp_path / "config.yaml"
    path.write_text("method: foresightkv\nhidden: 8\nlearning_rate: 3e-4\nbudgets: [24, 40]\npacked: true\nperiod: 8\n")
    found = distill.parse([str(path), "--period", "4", "--max_steps", "9"])
    assert (found.common.method, found.settings["hidden"], found.common.packed) == ("foresightkv", 8, True)
    assert (found.training.learning_rate, found.training.max_steps, found.mode.budgets) == (3e-4, 9, (24, 40))
    assert found.common.period == found.mode.period == found.settings["period"] == 4
    assert found.training.output_dir == "runs/foresightkv"
    path.write_text("hiden: 8\nlearning_rate: 0.1\n")
    with pytest.raises(UsageError, match=r"sets hiden, which nobody here knows; known are .*hidden.*TrainingArguments"):
        distill.parse([str(path)])
    for text, said in (
        ("max_steps: 1\nmax-steps: 2\n", "max_steps more than once"),
        ("output_dir:\n", "output_dir to null"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=said):
            distill.parse([str(path)])
    path.write_text("hidden: 8\n")
    found = distill.parse(["foresightkv", str(path), "--max_steps", "9"])
    assert (found.common.method, found.settings["hidden"], found.training.max_steps) == ("foresightkv", 8, 9)
    path.write_text("- 8\n")
    with pytest.raises(UsageError, match="holds no flags"):
        distill.parse([str(path)])
    with pytest.raises(UsageError, match="cannot read flags"):
        distill.parse([str(tmp_path / "none.yaml")])
    with pytest.raises(UsageError, match="--hiden 8 is no flag of method"):
        distill.parse(["--hiden", "8"])


@pytest.mark.parametrize("method", [name for name in methods.METHODS if methods.load(name).PAPER.kind == "learned"])
def test_every_learned_method_has_a_command_line(method, distill):
    if method in ("lexical", "clausal"):
        with pytest.raises(UsageError, match="tables are fitted"):
            distill.parse(["--method", method])
        return
    found = distill.parse(["--method", method])
    assert found.settings.keys() == methods.load(method).build(layout(), **found.settings).settings().keys()
    given = dict(vars(methods.load(method)).get("TRAINING", {}))
    for name, value in given.items():
        assert value in (getattr(part, name, None) for part in (found.training, found.mode)) or name in found.settings


def layout() -> Any:
    from learnevict.train.run.registry import ANY_LAYOUT

    return ANY_LAYOUT


def test_help_is_that_of_the_method(distill, capsys):
    with pytest.raises(SystemExit):
        distill.parse(["--method", "foresightkv", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "gate of foresightkv: --hidden HIDDEN" in said
    assert "share of rows that follow the scorer's own evictions (default: 0.5)" in said
    assert said.index("trainer (replay)") < said.index("--learning_rate")


def test_a_method_of_ones_own(tmp_path, monkeypatch, distill, flags):
    (tmp_path / "their_scorer.py").write_text(
        "from learnevict.methods import foresightkv\nfrom learnevict.methods.foresightkv import PAPER, policy\n"
        "TRAINING = {'learning_rate': 0.25, 'pairs': 9}\n\n\n"
        "def build(layout, width, period=None):\n    gate = foresightkv.build(layout, hidden=width, period=period)\n"
        "    gate.settings = lambda: {'width': width, 'period': period}\n    return gate\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="needs --width"):
        distill.parse(["--method", "their_scorer"])
    out = ["--output_dir", str(tmp_path / "out")]
    found = distill.parse([*flags, *BUDGETS, *out, "--method", "their_scorer", "--width", "4", "--max_steps", "1"])
    assert (found.training.learning_rate, found.mode.pairs, found.settings) == (0.25, 9, {"width": 4, "period": 8})
    distill.main(found)
    gates = Gates.load(tmp_path / "out")
    assert (gates.method, gates.config.settings) == ("their_scorer", {"width": 4, "period": 8})
    (tmp_path / "their_odd.py").write_text(
        "from learnevict.methods.random import PAPER, policy\nTRAINING = {'nonsense': 1}\n"
        "from learnevict.methods.foresightkv import build\n"
    )
    with pytest.raises(UsageError, match="TRAINING of 'their_odd' sets nonsense"):
        distill.parse(["--method", "their_odd"])


def test_mistakes_are_told(tmp_path, distill, flags):
    flags = [*flags, *BUDGETS, "--output_dir", str(tmp_path / "out")]

    def run(*more: str) -> None:
        distill.main(distill.parse([*flags, *more]))

    for more, kind, message in (
        (["--method", "snapkv"], GateError, "has no gate to train"),
        (["--method", "sudoku"], UsageError, "there is no method 'sudoku'"),
        (["--patience", "2"], UsageError, "give --eval_steps"),
        (["--eval_steps", "2", "--save_steps", "3"], UsageError, "no multiple of --eval_steps 2"),
        (["--eval_steps", "2", "--eval_documents", "0"], UsageError, "at least 1"),
        (["--streaming", "--data", "testbed"], UsageError, "made, not read"),
        (["--streaming", "--max_steps", "-1"], UsageError, "--streaming needs --max_steps"),
        (["--report_to", "tensorboard"], UsageError, "not installed; pip install tensorboard"),
        (["--resume_from_checkpoint", "true"], UsageError, "no checkpoint to resume from"),
        (["--labels", str(tmp_path / "none")], LabelError, "make them with `learnevict oracle`"),
        (["--budgets", "90", "99"], DataError, "no text has the 99 tokens"),
        (["--lr_scheduler_type", "nonsense"], SystemExit, "2"),
    ):
        with pytest.raises(kind, match=message):
            run(*more)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_is_not_mixed_with_another(tmp_path, distill, flags):
    flags = [*flags, *SMALL["foresightkv"], "--output_dir", str(tmp_path), "--max_steps", "2"]
    distill.main(distill.parse(flags))
    with pytest.raises(UsageError, match="holds checkpoints of another run"):
        distill.main(distill.parse(flags))
    again = [*flags, "--max_steps", "4", "--resume_from_checkpoint", "true"]
    with pytest.raises(UsageError, match="had another data_hash"):
        distill.main(distill.parse([*again, "--documents", "5"]))
    with pytest.raises(UsageError, match="was written by 1 processes"):
        last_checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint-9").mkdir()  # what a killed run had begun to write
    assert last_checkpoint(tmp_path, 1) == str(tmp_path / "checkpoint-2")
    distill.main(distill.parse(again))
    assert read_record(tmp_path)["steps"] == 4


@pytest.mark.slow
def test_gates_are_trained_further(tmp_path, distill, flags):
    first, second = tmp_path / "first", tmp_path / "second"
    distill.main(distill.parse([*flags, *SMALL["foresightkv"], "--max_steps", "1", "--output_dir", str(first)]))
    shorter = [*BUDGETS] + [word for word in flags if word not in ("--period", "8")]  # the gates know theirs
    more = ["--start_from", str(first), "--max_steps", "1", "--output_dir", str(second)]
    found = distill.parse([*shorter, *more])
    assert found.mode.period == 16
    distill.main(found)
    assert found.mode.period == 8
    training = Gates.load(second).config.training
    assert (training["before"]["max_steps"], training["gate"]["hidden"]) == (1, 8)
    with pytest.raises(UsageError, match="holds gates of --hidden 8"):
        distill.main(distill.parse([*shorter, *more, "--hidden", "4"]))
    with pytest.raises(UsageError, match="holds gates of foresightkv; give --method foresightkv"):
        distill.main(distill.parse([*shorter, *more, "--method", TRAINED["stream"]]))


def scorer_with_shares(base: Path, level: list[float]) -> Gates:
    """Returns a slot scorer whose two layers have shares that refinement has found."""
    model = Qwen3ForCausalLM.from_pretrained(base)
    gates = Gates.make("foresightkv", model, hidden=8, period=8, demand=[2, 1, 29])
    with torch.no_grad():
        gates.gate.demand.level.copy_(torch.tensor(level))
        gates.gate.weight_out.normal_()
        gates.gate.calibrated.fill_(1)
    return gates


def test_states_are_those_of_the_shares_that_a_scorer_has_learned(base):
    """Layers then differ in when they evict and in what they hold; they do as in inference."""
    gates, model = scorer_with_shares(base, [0.1, -0.1]), Qwen3ForCausalLM.from_pretrained(base).eval()
    ids, guard = torch.randint(5, 200, (2, 76)), Guard(2, 4)
    mask = torch.ones_like(ids)
    mask[0, :12] = 0
    labels, _ = golden_labels(model, ids, mask, block=8)
    states = record_states(
        model, gates.gate, labels, ids, mask, budget=24, schedule=Schedule(8), guard=guard, own=torch.tensor([True] * 2)
    )
    policy = gates.policy(24, sinks=2, recent=4)
    shares = [policy.allocator.layer_budget(24, layer, 2, policy.floor) for layer in range(2)]
    assert sum(shares) == 48 and shares[0] - shares[1] > 10
    for layer, share in enumerate(shares):
        row, seen = torch.cat(states[layer].events).unbind(-1)
        assert [int(seen[row == one].min()) for one in range(2)] == [share - share % 8 + 8] * 2
        assert int(states[layer].stacked()[2].sum(-1).max()) == share + 8 - guard.reserved(8)
    with attach(model, policy) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        assert [int((cache.positions(layer) >= 0).sum(-1).max()) for layer in range(2)] == [
            share + 4 for share in shares
        ]


@pytest.mark.slow
@pytest.mark.parametrize("level", [[0.1, -0.1], [1.0, -1.0]], ids=["both evict", "one layer never evicts"])
def test_a_scorer_with_shares_is_trained_further(level, tmp_path, distill, base, flags):
    scorer_with_shares(base, level).save_pretrained(tmp_path / "first")
    more = ["--start_from", str(tmp_path / "first"), "--output_dir", str(tmp_path / "second"), "--max_steps", "2"]
    distill.main(distill.parse([*flags, "--budgets", "40", "40", "--weight_decay", "0", *more]))
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert torch.equal(first["gate.demand.level"], second["gate.demand.level"])
    moved = (first["gate.weight_mid"] != second["gate.weight_mid"]).flatten(1).any(-1).tolist()
    assert moved == [level[0] < 1, True]
    assert Gates.load(tmp_path / "second").policy(24).allocator == Gates.load(tmp_path / "first").policy(24).allocator


def test_patience_reads_the_log():
    from transformers import TrainerControl, TrainerState, TrainingArguments

    state, control, training = TrainerState(), TrainerControl(), TrainingArguments(output_dir="runs/x")
    for value, stops in ((0.1, False), (0.3, False), (0.2, False), (0.3, True)):
        state.log_history += [{"loss": 1.0}, {BEST: value}]
        Patience(2).on_evaluate(training, state, control)
        assert control.should_training_stop is stops
    control.should_training_stop = False
    Patience(2).on_train_begin(training, state, control)
    assert control.should_training_stop


@pytest.mark.slow
def test_figures_reach_wandb_without_a_network(tmp_path, flags, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    more = [*SMALL["foresightkv"], "--max_steps", "1", "--report_to", "wandb", "--output_dir", str(tmp_path / "out")]
    done = run_recipe("recipes/distill.py", *flags, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_killed_and_resumed(tmp_path, flags):
    """SIGKILL in the middle of training, then the same command with --resume_from_checkpoint true."""
    train = ["recipes/distill.py", *flags, *SMALL["foresightkv"], "--max_steps", "8", "--output_dir"]
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    assert run_recipe(*train, str(whole)).returncode == 0
    ToBeKilled(*train, str(lost)).kill_after(lambda: last_checkpoint(lost, 1) is not None)
    assert read_record(lost)["status"] == "running"
    assert run_recipe(*train, str(lost), "--resume_from_checkpoint", "true").returncode == 0
    assert_same(whole, lost)
