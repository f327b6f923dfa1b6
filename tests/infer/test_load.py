"""Models by name: every weight comes from the checkpoint, and the checkpoint is data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from learnevict import Gates, testbed
from learnevict.errors import GateError, ModelError, UnusedWeightsWarning
from learnevict.infer.load import load
from tests.laws import zoo
from tests.laws.cases import random_gates

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk whose output layer is not its embedding."""
    path = tmp_path_factory.mktemp("whole")
    zoo.build("llama").save_pretrained(path)
    testbed.build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def spoil(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def describe(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


K = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("lm_head.weight"), r"1 missing \(lm_head\.weight\)"),
        (lambda w: w.update({"model.layers.1.attn.k": w.pop(f"{K}.weight")}), rf"1 missing \({K}\.weight\)"),
        (lambda w: w.update({f"{K}.weight": torch.zeros(8, 32)}), rf"1 of another shape \({K}\.weight \(8, 32\), not"),
        (lambda w: w.update({f"{K}.bias": torch.zeros(16)}), rf"1 left over \({K}\.bias\)"),
        (lambda w: w.update({f"{K}.weight".replace("1", "2"): torch.zeros(16, 32)}), r"1 left over \(model\.layers\.2\."),
    ],
    ids=["missing", "renamed", "shape", "bias", "layer"],
)  # fmt: skip
def test_weights_that_are_not_the_models_are_named(folder, change, said):
    spoil(folder, change)
    with pytest.raises(ModelError, match=said):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(folder, value):
    spoil(folder, lambda weights: weights[f"{K}.weight"][3].fill_(value))
    with pytest.raises(ModelError, match=rf"1 weights of .*read as float32, hold NaN or infinity \({K}\.weight\)"):
        load(str(folder))


def test_weights_that_a_narrow_dtype_cannot_hold_are_named(folder):
    spoil(folder, lambda weights: weights[f"{K}.weight"][3].fill_(1e6))
    load(str(folder))
    with pytest.raises(ModelError, match=r"read as float16.*wider --dtype"):
        load(str(folder), dtype="fp16")


@pytest.mark.parametrize(
    ("layers", "said"), [(1, r"9 left over \(model\.layers\.1\."), (3, r"9 missing \(model\.layers\.2\.")]
)
def test_a_config_of_other_depth_is_refused(folder, layers, said):
    describe(folder, num_hidden_layers=layers)
    with pytest.raises(ModelError, match=said):
        load(str(folder), device="cpu")


def test_a_head_for_another_task_is_said(folder):
    spoil(folder, lambda weights: weights.update({"v_head.summary.weight": torch.zeros(1, 32)}))
    with pytest.warns(UnusedWeightsWarning, match=r"1 tensors.*v_head\.summary\.weight"):
        model, _ = load(str(folder), device="cpu")
    assert all(
        torch.equal(one, other) for one, other in zip(model.parameters(), zoo.build("llama").parameters(), strict=True)
    )


@pytest.mark.parametrize("opener", [Gates.load, Gates.from_pretrained])
def test_gates_are_whole_however_they_are_opened(tmp_path, opener):
    random_gates("foresightkv", "llama").save_pretrained(tmp_path)
    spoil(tmp_path, lambda weights: weights.pop(next(iter(weights))))
    with pytest.raises(GateError, match=r"are not those of a foresightkv gate.*missing_keys"):
        opener(tmp_path)


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def index_of_pickles(folder: Path) -> None:
    only_pickle(folder)
    names = torch.load(folder / "pytorch_model.bin", weights_only=True)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def config_that_chooses(folder: Path) -> None:
    index_of_pickles(folder)
    (folder / "model.safetensors.index.json").rename(folder / "other.safetensors.index.json")
    describe(folder, transformers_weights="other.safetensors.index.json")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)})
    )
    torch.save({}, folder / "adapter_model.bin")


@pytest.mark.parametrize("change", [only_pickle, index_of_pickles, config_that_chooses, adapter])
def test_pickles_are_read_only_if_allowed(folder, change, monkeypatch):
    change(folder)
    if change is not adapter:
        model, _ = load(str(folder), device="cpu", allow_pickle=True)
        assert torch.equal(model.lm_head.weight, zoo.build("llama").lm_head.weight)
        (folder / "pytorch_model.bin").write_bytes(b"PK" * 50)
        with pytest.raises(ModelError, match="damaged or holds more than tensors"):
            load(str(folder), device="cpu", allow_pickle=True)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(
        ModelError, match=r"pickles can run code; convert it with save_pretrained, or pass --allow-pickle"
    ):
        load(str(folder), device="cpu")
