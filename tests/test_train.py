"""Objectives, the label store and the trainer: maths by hand, killed runs, exact resume."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learnevict.errors import DataError, LabelError
from learnevict.train.data import read_texts
from learnevict.train.labels import Document, LabelStore, Manifest
from learnevict.train.objectives import kept_share, pairwise, regression, sample_slots
from learnevict.train.states import look_ahead

ROOT = Path(__file__).parent.parent


def test_pairwise_is_the_weighted_logistic_loss():
    """Two candidates: every sampled pair is (0, 1), (1, 0) or a tie, and ties weigh nothing."""
    scores, targets = torch.tensor([[[0.3, -0.2, 9.0]]]), torch.tensor([[[0.1, 0.7, 5.0]]])
    candidates = torch.tensor([[[True, True, False]]])
    loss = pairwise(scores, targets, candidates, pairs=64, generator=torch.Generator().manual_seed(0))
    assert float(loss) == pytest.approx(math.log1p(math.exp(0.3 - -0.2)), rel=1e-5)


def test_pairwise_gradient_lifts_what_the_oracle_keeps():
    scores = torch.zeros(2, 3, 9, requires_grad=True)
    targets = torch.rand(2, 3, 9)
    pairwise(scores, targets, torch.ones(2, 3, 9, dtype=torch.bool), pairs=4000).backward()
    best, worst = targets.argmax(-1, keepdim=True), targets.argmin(-1, keepdim=True)
    assert bool((scores.grad.gather(-1, best) < 0).all())
    assert bool((scores.grad.gather(-1, worst) > 0).all())


def test_sampling_never_leaves_the_candidates():
    candidates = torch.rand(4, 2, 17) > 0.6
    candidates[0, 0] = False
    drawn = sample_slots(candidates, (4, 2, 200), None)
    inside = candidates.gather(-1, drawn)
    assert bool(inside[candidates.any(-1)].all())
    assert set(drawn[1, 1].tolist()) == set(candidates[1, 1].nonzero().flatten().tolist())


def test_regression_and_kept_share_by_hand():
    candidates = torch.tensor([[[True, True, True, False]]])
    scores, targets = torch.tensor([[[1.0, 2.0, 3.0, 0.0]]]), torch.tensor([[[2.0, 1.0, 3.0, -9.0]]])
    assert float(regression(scores, targets, candidates)) == pytest.approx(2 / 3)
    assert float(kept_share(scores, targets, candidates, 1)) == 0.0
    assert float(kept_share(scores, targets, candidates, 2)) == 1.0


def test_look_ahead_is_the_maximum_over_later_blocks():
    labels = torch.rand(1, 2, 5, 4)
    ahead = look_ahead(labels)
    for m in range(4):
        assert torch.equal(ahead[..., m], labels[..., m:].amax(-1))
    assert bool((ahead[..., 4] == 0).all())


def manifest(**changes: object) -> Manifest:
    given = {
        "base_hash": "b", "data": "testbed", "data_hash": "d", "block": 4, "reduce": "golden",
        "num_layers": 2, "num_heads": 2, "num_documents": 5, "documents_per_shard": 2,
    }  # fmt: skip
    return Manifest(**{**given, **changes})


def documents() -> list[Document]:
    torch.manual_seed(0)
    return [
        Document(list(range(10 + i)), 3, "program", i, torch.rand(2, 2, 10 + i, -(-(10 + i) // 4)).half())
        for i in range(5)
    ]


def test_label_store_resumes_and_reads_back(tmp_path):
    store = LabelStore(tmp_path, manifest())
    store.write(1, documents()[2:4])
    again = LabelStore(tmp_path, manifest())
    assert again.missing() == [0, 2]
    for shard in again.missing():
        again.write(shard, [documents()[i] for i in again.span(shard)])
    read = LabelStore(tmp_path).documents()
    assert [d.input_ids for d in read] == [d.input_ids for d in documents()]
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(read, documents(), strict=True))
    assert not list(tmp_path.rglob("*.tmp"))


def test_label_store_opens_with_datasets(tmp_path):
    import datasets

    store = LabelStore(tmp_path, manifest())
    for shard in store.missing():
        store.write(shard, [documents()[i] for i in store.span(shard)])
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "data" / "*.parquet"), cache_dir=str(tmp_path / "c")
    )
    assert table["train"].num_rows == 5


def test_label_store_refuses_another_run(tmp_path):
    LabelStore(tmp_path, manifest())
    with pytest.raises(LabelError, match="block differ"):
        LabelStore(tmp_path, manifest(block=8))
    with pytest.raises(LabelError, match="no shard yet"):
        LabelStore(tmp_path).documents()
    with pytest.raises(LabelError, match=r"manifest\.json is missing"):
        LabelStore(tmp_path / "nothing")


def test_texts_are_read_or_refused(tmp_path):
    def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    good = tmp_path / "a.jsonl"
    good.write_text(json.dumps({"text": "abc"}) + "\n\n" + json.dumps({"text": "de"}))
    assert [d.input_ids for d in read_texts(good, tokenizer, 9, 2)] == [[97, 98], [100, 101]]
    for content, message in [
        (b"\xff\xfe", "UTF-8"),
        (b"{]", "not JSON"),
        (b"{}", 'neither "text"'),
        (b"", "holds no text"),
    ]:
        good.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_texts(good, tokenizer, 9, 9)


@pytest.fixture
def recipe():
    sys.path.insert(0, str(ROOT))
    from recipes import distill

    yield distill
    sys.path.remove(str(ROOT))


@pytest.mark.slow
def test_distilling_resumes_exactly(tmp_path, recipe):
    """Stopped at step 2 and resumed, training ends with bit-equal gates."""
    from safetensors.torch import load_file

    def train(folder: Path, *extra: str) -> None:
        flags = [
            "--output_dir",
            str(folder),
            "--documents",
            "12",
            "--hidden",
            "8",
            "--per_device_train_batch_size",
            "2",
        ]
        flags += [
            "--save_steps",
            "2",
            "--warmup_steps",
            "0",
            "--disable_tqdm",
            "true",
            "--lr_scheduler_type",
            "constant",
        ]
        recipe.main(*recipe.parse([*flags, *extra]))

    train(tmp_path / "once", "--max_steps", "4")
    train(tmp_path / "twice", "--max_steps", "2")
    train(tmp_path / "twice", "--max_steps", "4", "--resume_from_checkpoint", "true")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    assert not list((tmp_path / "once").glob("*.bin"))
    record = json.loads((tmp_path / "once" / "run.json").read_text())
    assert record["seed"] == 7
    assert record["base_hash"]
    assert record["data_hash"]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_labels_then_accelerate_launch(tmp_path):
    """The README's way: label, be killed in the middle, label on, train from the store with accelerate."""
    label = [sys.executable, "recipes/oracle.py", "--smoke", "--out", str(tmp_path / "labels")]
    first = launch(*label)
    assert first.returncode == 0, first.stderr[-2000:]
    shard = min((tmp_path / "labels" / "data").iterdir())
    whole = shard.read_bytes()
    shard.unlink()
    shard.with_suffix(".tmp").write_bytes(whole[:100])  # what a kill in the middle of writing leaves
    second = launch(*label)
    assert "2 shards, 1 done before" in second.stdout, second.stderr[-2000:]
    assert shard.read_bytes() == whole
    train = [
        "recipes/distill.py",
        "--smoke",
        "--labels",
        str(tmp_path / "labels"),
        "--output_dir",
        str(tmp_path / "gates"),
    ]
    third = launch("accelerate", "launch", "--cpu", "--num_processes", "1", *train)
    assert third.returncode == 0, third.stderr[-2000:]
    assert (tmp_path / "gates" / "model.safetensors").is_file()


@pytest.mark.slow
def test_recipes_say_what_is_wrong(tmp_path):
    other = launch(sys.executable, "recipes/distill.py", "--labels", str(tmp_path / "none"))
    assert other.returncode == 1
    assert "Traceback" not in other.stderr
    assert "make them with recipes/oracle.py" in other.stderr
    heuristic = launch(
        sys.executable, "recipes/distill.py", "--smoke", "--method", "snapkv", "--output_dir", str(tmp_path)
    )
    assert "has no gate to train" in heuristic.stderr
    assert "Traceback" not in heuristic.stderr
