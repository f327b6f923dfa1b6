"""Texts that are read more than once go through the model once; the run resumes exactly, and shares its labels."""

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

from learnevict import testbed
from learnevict.cli.console import main
from learnevict.data.label_store import LabelStore
from learnevict.errors import LabelError, UsageError
from learnevict.hub import Gates
from learnevict.hub.run_record import read_record
from learnevict.train.run import stored_labels
from tests.recipe_runs import save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that speaks the testbed's words."""
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def flags(base: Path, tmp_path: Path) -> list[str]:
    """Of five texts of 40 to 56 tokens, read twice."""
    words = [word for word in testbed.build_tokenizer().get_vocab() if not word.startswith("<")]
    rng = Random(0)
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(rng.choices(words, k=40 + 4 * i))}) for i in range(5)))
    return [
        *(
            "--model",
            str(base),
            "--data",
            str(path),
            "--period",
            "8",
            "--sinks",
            "2",
            "--recent",
            "4",
            "--budgets",
            "24",
        ),
        *("30", "--per_device_train_batch_size", "2", "--max_steps", "6", "--save_steps", "2", "--logging_steps", "2"),
        *("--warmup_steps", "1", "--disable_tqdm", "true"),
    ]


def train(distill: Any, flags: list[str], folder: Path, *more: str) -> dict[str, torch.Tensor]:
    distill.main(distill.parse([*flags, "--output_dir", str(folder), *more]))
    return load_file(folder / "model.safetensors")


def labels_in(folder: Path) -> Path:
    (found,) = folder.glob("labels-*")
    return found


@pytest.mark.parametrize(
    ("method", "more"),
    [("kvzap", []), ("fast_kvzip", ["--target", "reconstruction"])],
)
def test_the_model_reads_texts_once_and_a_run_resumes_exactly(
    method, more, tmp_path, distill, flags, monkeypatch, capsys
):
    read, forward = list[int](), Qwen3ForCausalLM.forward

    def counted(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        read.append(len(input_ids))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", counted)
    flags = [*flags, "--method", method, *more]
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    first = train(distill, flags, whole)
    assert sum(read) == 5
    assert "5 texts of 240 tokens" in capsys.readouterr().out
    shutil.copytree(whole / "checkpoint-4", lost / "checkpoint-4")
    shutil.copy(whole / "run.json", lost)
    again = train(distill, flags, lost, "--resume_from_checkpoint", "true")
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    start = load_file(whole / "checkpoint-4" / "model.safetensors")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in first.items()), "nothing was learned"
    assert labels_in(whole).name == labels_in(lost).name
    documents = LabelStore(labels_in(whole)).documents()
    assert all(one.states.shape == (2, len(one.input_ids), 32) for one in documents)
    assert documents[0].states.dtype == torch.float16
    log = [[line["loss"] for line in read_record(one)["log"] if "loss" in line] for one in (whole, lost)]
    assert log[0] == log[1] and len(log[0]) == 3
    read.clear()
    shared = train(distill, flags, tmp_path / "shared", "--labels", str(labels_in(whole)))
    assert read == [] and all(torch.equal(tensor, shared[name]) for name, tensor in first.items())
    anew = train(distill, flags, tmp_path / "anew", "--store", "false")
    assert sum(read) == 10
    assert not list((tmp_path / "anew").glob("labels-*"))
    for name, tensor in first.items():
        assert torch.allclose(tensor, anew[name], atol=2e-2), name  # float16
    assert Gates.load(whole).policy("25%", allow_other_base=True, allocation="pooled").scope == "model"


def test_one_pass_stores_nothing(tmp_path, distill, flags):
    train(distill, flags, tmp_path / "one", "--method", "kvzap", "--max_steps", "3")
    assert not list((tmp_path / "one").glob("labels-*"))


def test_labels_of_another_kind_are_refused(tmp_path, distill, flags):
    repeated = [*flags, "--target", "reconstruction"]
    train(distill, [*repeated, "--method", "kvzap", "--oracle", "kvzip"], tmp_path / "first")
    labels = ["--labels", str(labels_in(tmp_path / "first"))]
    for more, wanted in (
        (["--method", "kvzap"], r"kvzip\+"),
        (["--method", "fast_kvzip", "--target", "future"], "golden"),
    ):
        with pytest.raises(LabelError, match=f"holds kvzip labels, but {wanted} labels are learned from"):
            train(distill, [*repeated, *labels, *more], tmp_path / "second")
    train(distill, [*repeated, *labels, "--method", "fast_kvzip"], tmp_path / "third")
    with pytest.raises(LabelError, match=r"chunk=2048 .*drop --chunk"):
        train(distill, [*repeated, *labels, "--method", "fast_kvzip", "--chunk", "16"], tmp_path / "fourth")
    with pytest.raises(UsageError, match="oracle 'sum' is unknown"):
        distill.parse([*flags, "--method", "kvzap", "--oracle", "sum"])


def test_a_disk_without_room_is_told_before(tmp_path, distill, flags, monkeypatch):
    monkeypatch.setattr(stored_labels.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(UsageError, match=r"240 tokens take 30.0 KiB.*--store false"):
        train(distill, flags, tmp_path / "full", "--method", "kvzap")


def test_labels_and_states_from_the_oracle(tmp_path, distill, flags, capsys):
    """What `learnevict oracle` keeps is what a run would have made."""
    given = dict(zip(flags[::2], flags[1::2], strict=False))
    words = [
        "oracle",
        "--model",
        given["--model"],
        "--data",
        given["--data"],
        "--target",
        "reconstruction",
        "--device",
        "cpu",
    ]
    more = ["--method", "fast_kvzip", "--target", "reconstruction"]
    assert main([*words, "--states", "--batch-size", "2", "--out", str(tmp_path / "labels")]) == 0
    one = train(distill, [*flags, *more], tmp_path / "one")
    two = train(distill, [*flags, *more, "--labels", str(tmp_path / "labels")], tmp_path / "two")
    assert all(torch.allclose(tensor, two[name], atol=1e-3) for name, tensor in one.items())
    assert not list((tmp_path / "two").glob("labels-*"))
    assert main([*words, "--labels", "golden", "--out", str(tmp_path / "other")]) == 2
    assert "labels 'golden' are of the text's own future" in capsys.readouterr().err
    assert main([*words[:-4], "--target", "past", "--out", str(tmp_path / "other")]) == 2
    assert "choose future or reconstruction" in capsys.readouterr().err
