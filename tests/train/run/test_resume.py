"""Going on with a run of the distilling recipe: only with the same run, never over it, and not beyond its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from learnevict.errors import DataError, GateError, UsageError
from learnevict.hub.run_record import read_record
from tests.recipes.test_distill import assert_equal, base, flags, texts, weights  # noqa: F401

METHOD = ["--method", "kvzap", "--budgets", "24", "40", "--lr_scheduler_type", "constant"]
GO_ON = ["--resume_from_checkpoint", "true"]


@pytest.fixture
def run(distill, flags):  # noqa: F811
    def run(folder: Path, *more: str) -> None:
        distill.main(distill.parse([*METHOD, *flags, "--output_dir", str(folder), *more]))

    return run


@pytest.mark.parametrize("logging", ["1", "3"], ids=["every step logged", "the last step not logged"])
def test_a_run_whose_steps_are_all_taken_takes_no_more(run, tmp_path, logging):
    run(tmp_path, "--logging_steps", logging)
    before, record = weights(tmp_path), read_record(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # killed between the last checkpoint and the end
    run(tmp_path, *GO_ON, "--logging_steps", logging)
    again = read_record(tmp_path)
    assert_equal(weights(tmp_path), before)
    timed = {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
    }  # of a run that nobody saw the end of
    without = [{name: value for name, value in line.items() if name not in timed} for line in record["log"]]
    assert (again["steps"], again["log"]) == (4, without) and "train_loss" in without[-1]
    run(tmp_path, *GO_ON, "--max_steps", "6")
    assert read_record(tmp_path)["steps"] == 6


def test_a_run_that_diverges_is_no_success(run, tmp_path):
    with pytest.raises(GateError, match=r"gate\.weight\w* of these gates holds NaN or infinity.*--learning_rate"):
        run(tmp_path, "--learning_rate", "4e9", "--max_grad_norm", "0")
    assert read_record(tmp_path)["status"] == "failed"
    assert not (tmp_path / "model.safetensors").exists()


def test_another_run_is_not_resumed(run, tmp_path, texts):  # noqa: F811
    run(tmp_path)
    with pytest.raises(
        UsageError, match=r"another learning_rate \(.*, not 0.5\), recent \(4, not 5\)|recent.*learning_rate"
    ):
        run(tmp_path, *GO_ON, "--learning_rate", "0.5", "--recent", "5")
    other = tmp_path / "other.jsonl"
    shutil.copy(texts, other)
    with pytest.raises(UsageError, match=r"another data \("):
        run(tmp_path, *GO_ON, "--data", str(other))
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "checkpoint-4", moved / "checkpoint-4")
    (moved / "run.json").write_text((tmp_path / "run.json").read_text())
    with pytest.raises(UsageError, match="moved' had another data_seed"):
        run(tmp_path / "new", "--resume_from_checkpoint", str(moved / "checkpoint-4"), "--seed", "8")


def test_a_trial_replaces_nothing_but_trials(run, tmp_path):
    run(tmp_path)
    before = weights(tmp_path)
    with pytest.raises(UsageError, match="holds checkpoints of another run"):
        run(tmp_path, "--smoke")
    assert_equal(weights(tmp_path), before)
    trial = tmp_path / "trial"
    run(trial, "--smoke")
    run(trial, "--smoke")
    assert read_record(trial)["config"]["smoke"] is True


def test_nothing_of_others_is_trained_over(run, tmp_path, base):  # noqa: F811
    """Neither the base itself, nor gates to start from, nor what another run made, nor the record of another program."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(
        UsageError, match=r"model' holds a model \(config.json, model.safetensors\), which is not replaced"
    ):
        run(model, "--model", str(model))
    shutil.copytree(base, model / "checkpoint-4")
    (model / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
    (model / "checkpoint-4" / "rng_state.pth").touch()
    with pytest.raises(UsageError, match="holds a model that is no gates"):
        run(model, *GO_ON)
    assert before == {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    mine = tmp_path / "mine" / "checkpoint-2"
    mine.mkdir(parents=True)
    shutil.copytree(model / "checkpoint-4", tmp_path / "earlier" / "checkpoint-4")
    (tmp_path / "earlier" / "checkpoint-4" / "config.json").unlink()
    with pytest.raises(UsageError, match="mine' holds checkpoints of another run"):  # the trainer would delete them
        run(mine.parent, "--resume_from_checkpoint", str(tmp_path / "earlier" / "checkpoint-4"))
    gates, terms = tmp_path / "gates", ["--save_strategy", "no"]
    run(gates, *terms)
    first = weights(gates)
    run(gates, *terms)
    assert_equal(weights(gates), first)
    for more in (["--start_from", str(gates)], ["--learning_rate", "0.5"], ["--max_steps", "2"]):
        with pytest.raises(UsageError, match="holds what another run made"):
            run(gates, *terms, *more)
    run(tmp_path / "new", *terms, "--start_from", str(gates))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "run.json").write_text('{"program": "oracle"}')
    with pytest.raises(DataError, match="not the record of distill but of oracle"):
        run(tmp_path / "labels")
    assert_equal(weights(gates), first)


def test_gates_that_were_resumed_do_not_tell(run, tmp_path):
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    run(whole)
    shutil.copytree(whole / "checkpoint-2", lost / "checkpoint-2")
    run(lost, *GO_ON)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (whole, lost)]
    for config, folder in zip(configs, (whole, lost), strict=True):
        assert config["training"]["training"].pop("output_dir") == folder.name
    assert configs[0] == configs[1] and "resume_" not in (lost / "run.json").read_text()


def test_a_trial_goes_to_a_folder_of_its_own(distill, flags):  # noqa: F811
    from learnevict.train.run.setup import settle

    read = distill.parse([*METHOD, *flags, "--smoke"])
    settle(read)
    assert read.training.output_dir == "runs/kvzap-smoke"


def test_what_could_not_be_sent_is_whole_at_home(run, tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError("403")

    monkeypatch.setattr("learnevict.train.base_trainer.BaseTrainer.init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr("learnevict.train.base_trainer.BaseTrainer._push_from_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr("learnevict.train.base_trainer.BaseTrainer.push_to_hub", refused)
    with pytest.raises(OSError, match="403"):
        run(tmp_path, "--push_to_hub", "--hub_model_id", "me/gates")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "finished" and record["steps"] == 4 and record["log"]
    assert (tmp_path / "model.safetensors").is_file()
