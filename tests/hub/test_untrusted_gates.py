"""Gates of other people are data: what they name is not imported, and what could run code is not opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from learnevict import Gates, methods
from learnevict.cli import main
from learnevict.cli.eval import MethodOptions
from learnevict.cli.evaluation import _opened, evaluated_methods
from learnevict.cli.options import ModelOptions
from learnevict.errors import GateError, UsageError
from learnevict.hub import GATES_FOLDER, Address, GatesConfig, make_card, push_folder, write_card
from learnevict.hub.share import _folder
from tests.laws import zoo
from tests.laws.cases import random_gates

SHIPPED = GATES_FOLDER / "testbed-foresightkv"
OPENERS = (Gates.load, Gates.from_pretrained, AutoModel.from_pretrained)
OWN = (
    "from learnevict.methods import Paper\nfrom learnevict.methods.foresightkv import build, policy\n"
    "PAPER = Paper('mine', None, 2026, kind='learned')\n"
)
RUNS = "from pathlib import Path\nPath('ran').touch()\n" + OWN


def gates_of(folder: Path, method: str, source: Path = SHIPPED) -> Path:
    """Gates that name another method, without their weights being touched."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"method": method}))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, first on the path, as for a script or `python -m`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_module_that_gates_name_never_runs(here):
    (here / "deploy.py").write_text(RUNS)
    folder = gates_of(here / "gates", "deploy")
    for opener in OPENERS:
        with pytest.raises(
            GateError, match=r"'deploy', which is no method of learnevict.*--method deploy.*import deploy"
        ):
            opener(folder)
    assert not (here / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["infer --task recall --budget 48 --ckpt {}", "eval --budgets 48 --ckpt {}", "push {} me/gates"]
)
def test_nor_on_the_command_line(here, capsys, words):
    """Which searches the current folder for methods."""
    (here / "launch.py").write_text(RUNS)
    assert main(words.format(gates_of(here / "gates", "launch")).split()) == 1
    assert "no module is imported because gates name it" in capsys.readouterr().err
    assert not (here / "ran").exists()


def test_a_module_that_is_no_method_stays_one(tmp_path):
    """Whatever is imported already has run; it is still no method."""
    with pytest.raises(UsageError, match="'json' is not a method: it lacks PAPER and policy"):
        Gates.load(gates_of(tmp_path, "json"))


def test_a_method_of_ones_own_is_imported_by_its_owner(here):
    (here / "own_imported.py").write_text(OWN)
    folder = gates_of(here / "imported", "own_imported")
    with pytest.raises(GateError, match="own_imported"):
        Gates.load(folder)
    methods.load("own_imported")
    assert all(opener(folder).method == "own_imported" for opener in OPENERS)
    (here / "own_made.py").write_text(OWN)
    Gates.make("own_made", zoo.build("llama")).save_pretrained(here / "made")
    made = Gates.load(here / "made")
    assert made.method == "own_made"
    card = make_card(made, Address("me/gates"))
    assert "import own_made  #" in card, "whoever uses them has to do the same"
    assert "--ckpt me/gates --method own_made" in card


@pytest.mark.slow
def test_or_named_on_the_command_line(here, capsys):
    for name in ("own_named", "own_listed"):
        (here / f"{name}.py").write_text(OWN)
    words = ["infer", "--task", "recall", "--budget", "48", "-n", "2", "--ckpt", str(gates_of(here / "n", "own_named"))]
    assert main(words) == 1
    assert main([*words, "--method", "own_named"]) == 0, capsys.readouterr().err
    listed = str(gates_of(here / "listed", "own_listed"))
    options = MethodOptions("own_listed,foresightkv", "48", [listed])
    found = evaluated_methods(_opened(ModelOptions(device="cpu"), options), options, ())
    assert [(one.name, one.kind) for one in found] == [("own_listed", "learned"), ("foresightkv", "learned")]


def pickled(folder: Path) -> Path:
    """Gates whose weights are a pickle, under every name that transformers knows."""
    gates = random_gates("foresightkv", "llama")
    gates.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(gates.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(gates.state_dict(), "pytorch_model.bin")})
    )
    return folder


def test_pickles_are_not_opened(tmp_path, monkeypatch):
    folder = pickled(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    for opener in OPENERS:
        with pytest.raises(GateError, match=r"there is no model\.safetensors in it.*pickles.*save_pretrained"):
            opener(folder)
    with pytest.raises(UsageError, match="drop use_safetensors=False"):
        Gates.from_pretrained(folder, use_safetensors=False)


@pytest.mark.parametrize("worst", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path, worst):
    gates, file = random_gates("trimkv", "llama"), tmp_path / "model.safetensors"
    gates.save_pretrained(tmp_path)
    weights = load_file(file)
    weights["gate.bias_out"][1, 0] = worst
    save_file(weights, file, {"format": "pt"})
    for opener in OPENERS:
        with pytest.raises(GateError, match=r"gate\.bias_out of the gates in .* holds NaN or infinity"):
            opener(tmp_path)


def test_a_config_chooses_neither_code_nor_weights(tmp_path):
    random_gates("foresightkv", "llama").save_pretrained(tmp_path)
    want = Gates.load(tmp_path).state_dict()
    torch.save({}, tmp_path / "adapter_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "transformers_weights": "adapter_model.bin", "attn_implementation": "somebody/kernel",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "quantization_config": {"quant_method": "gptq"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for opener in OPENERS:
        found = opener(tmp_path).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    assert not {"transformers_weights", "auto_map", "quantization_config"} & set(vars(GatesConfig(**config)))


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "run.json"])
def test_a_link_out_of_the_folder_is_not_sent(tmp_path, name):
    """Whoever prepared the folder would choose which of the owner's files become public."""
    gates, private = tmp_path / "gates", tmp_path / "private"
    random_gates("foresightkv", "llama").save_pretrained(gates)
    (gates / "README.md").write_text("mine")
    (gates / "run.json").write_text("{}")
    private.write_bytes((gates / name).read_bytes())
    (gates / name).unlink()
    (gates / name).symlink_to(private)
    with pytest.raises(GateError, match=f"{name} in .* is a link to .*private.*outside.*nothing was sent"):
        push_folder(gates, "me/gates", token="hf_owner")
    (gates / name).unlink()
    (gates / f"kept-{name}").write_bytes(private.read_bytes())
    (gates / name).symlink_to(f"kept-{name}")
    (tmp_path / "latest").symlink_to(gates)
    assert _folder(tmp_path / "latest").name == "latest", "links within the folder, and to it, are its owner's"


def test_the_card_of_a_run_goes_into_its_folder_only(tmp_path):
    gates = tmp_path / "gates"
    random_gates("foresightkv", "llama").save_pretrained(gates)
    (gates / "README.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(GateError, match=r"README\.md .* is a link"):
        write_card(gates, "me/gates")
    assert not (tmp_path / "elsewhere.md").exists()
