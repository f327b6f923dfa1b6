"""Every method that is trained by gradient steps, all the way: trained by one command, shared, fetched, and answering."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learnevict import methods
from learnevict.hub import Gates
from learnevict.train.run.registry import ANY_LAYOUT, MODES
from tests.hub_client import Client

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def is_trainable(name: str) -> bool:
    """Whether a method has gates, and a trainer for them."""
    build = vars(methods.load(name)).get("build")
    return build is not None and build(ANY_LAYOUT).mode in MODES


TRAINED = tuple(filter(is_trainable, methods.METHODS))


def run(client: Client, *words: object) -> str:
    """Output of `learnevict WORDS`, which succeeds."""
    code, out, err = client(*words)
    assert code == 0, err
    return out


def test_ten_papers_are_covered():
    assert len(TRAINED) >= 10


@pytest.mark.parametrize("method", TRAINED)
def test_from_training_to_an_answer(method, distill, hub, client, tmp_path):
    folder, back, repository = tmp_path / "run", tmp_path / "back", f"me/{method}"
    distill.main(distill.parse(["--method", method, "--smoke", "--output_dir", str(folder), "--disable_tqdm", "true"]))
    made = load_file(folder / "model.safetensors")
    fresh = Gates.load(folder).config
    assert (fresh.method, fresh.training["max_steps"]) == (method, 3)
    run(client, "push", folder, repository)
    assert {"config.json", "model.safetensors", "README.md", "run.json"} < set(hub.files(repository))
    run(client, "pull", repository, "--out", back)
    fetched = load_file(back / "model.safetensors")
    assert fetched.keys() == made.keys()
    assert all(torch.equal(part, made[name]) and part.dtype == made[name].dtype for name, part in fetched.items())
    words = ("infer", "--task", "recall", "--ckpt", back, "--budget", 48, "-n", 24, "--json")
    record = json.loads(run(client, *words))
    assert (record["method"], bool(record["text"])) == (method, True)
    assert record["kept"]["max"] <= 64 < record["prompt_tokens"], "nothing was evicted"
