"""Objectives, the label store and the trainer: maths by hand, killed runs, exact resume."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learnevict.cli.console import main
from learnevict.data.documents import read_documents
from learnevict.data.label_store import Document, LabelStore, Manifest
from learnevict.data.labelling import Labelling, describe, fill_store, label
from learnevict.data.sources import Source
from learnevict.errors import DataError, LabelError, LearnevictError
from learnevict.hub.run_record import read_record
from learnevict.train.losses.objectives import kept_share, pairwise, regression, sample_slots
from learnevict.train.trainers.replay_states import look_ahead
from tests.recipe_runs import run_recipe

ROOT = Path(__file__).parents[2]


def test_pairwise_is_the_weighted_logistic_loss():
    """Two candidates: every sampled pair is (0, 1), (1, 0) or a tie, and ties weigh nothing."""
    scores, targets = torch.tensor([[[0.3, -0.2, 9.0]]]), torch.tensor([[[0.1, 0.7, 5.0]]])
    candidates = torch.tensor([[[True, True, False]]])
    loss = pairwise(scores, targets, candidates, pairs=64)
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
    drawn = sample_slots(candidates, 200, None)
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
    for read in (LabelStore(tmp_path).documents, LabelStore(tmp_path).lengths):
        with pytest.raises(LabelError, match="no shard yet"):
            read()
    with pytest.raises(LabelError, match=r"manifest\.json is missing"):
        LabelStore(tmp_path / "nothing")


def test_texts_are_read_or_refused(tmp_path):
    def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    good = tmp_path / "a.jsonl"
    good.write_text(json.dumps({"text": "abc"}) + "\n\n" + json.dumps({"text": "de"}))
    assert [d.input_ids for d in read_documents(Source(str(good), max_length=2), tokenizer, 9)[0]] == [
        [97, 98],
        [99],
        [100, 101],
    ]
    for content, message in [
        (b"\xff\xfe", "UTF-8"),
        (b"{]", "not JSON"),
        (b"{}", "has no text"),
        (b"", "holds no text"),
    ]:
        good.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_documents(Source(str(good), max_length=9), tokenizer, 9)


def tiny() -> Any:
    """A random model and texts for it."""
    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


def test_filling_a_store_goes_on_and_ends_alike(tmp_path):
    model, labelling = tiny(), Labelling("texts", block=4, batch_size=2, per_shard=2)
    texts = [Document(torch.randint(64, (9 + i,)).tolist(), 2, "texts", i) for i in range(5)]
    done = fill_store(tmp_path / "one", model, texts, labelling, config={"out": "one"})
    assert (done.num_shards, done.num_before, done.num_tokens, done.num_processes) == (3, 0, 55, 1)
    assert "3 shards, 0 done before; 55 tokens in" in str(done)
    seen: list[int] = []
    store = LabelStore(tmp_path / "two", describe(model, texts, labelling))
    store.write(1, label(model, texts[2:4], labelling))
    again = fill_store(tmp_path / "two", model, texts, labelling, watch=lambda shards: seen.extend(shards) or shards)
    assert (seen, again.num_before, again.num_tokens, again.num_labelled) == ([0, 2], 1, 55, 9 + 10 + 13)
    files = sorted((tmp_path / "one" / "data").iterdir())
    assert len(files) == 3
    assert all(one.read_bytes() == (tmp_path / "two" / "data" / one.name).read_bytes() for one in files)
    assert str(fill_store(tmp_path / "two", model, texts, labelling)) == "3 shards, 3 done before"
    record = read_record(tmp_path / "two")
    assert (record["program"], record["status"], len(record["sessions"])) == ("oracle", "finished", 1)
    assert [read_record(tmp_path / name)["num_tokens"] for name in ("one", "two")] == [55, 55]
    with pytest.raises(LabelError, match="data_hash, num_documents differ"):
        fill_store(tmp_path / "one", model, texts[:4], labelling)


def test_labels_go_only_where_labels_are(tmp_path):
    labelling, texts = Labelling("texts", block=4), [Document([1, 2, 3, 4, 5], 2, "texts", 0)]
    for name, text in (
        ("run.json", '{"mine": 1}'),
        ("manifest.json", "{}"),
        ("data/train-00000-of-00001.parquet", "PAR1"),
        ("config.json", '{"model_type": "llama"}'),
        ("model.safetensors", ""),
        ("data/notes.csv", "a,b"),
    ):
        path = tmp_path / Path(name).stem / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        with pytest.raises(LearnevictError, match=r"not the record of oracle|no manifest|not written by"):
            fill_store(tmp_path / Path(name).stem, tiny(), texts, labelling)
        assert path.read_text() == text
        assert [one for one in (tmp_path / Path(name).stem).rglob("*") if one.is_file()] == [path]


def test_the_command_labels_and_goes_on(tmp_path, capsys):
    words = ["oracle", "--documents", "2", "--families", "recall", "--max-length", "40", "--per-shard", "1", "--json"]
    for told in ("2 shards, 0 done before; 80 tokens in", "2 shards, 2 done before"):
        assert main([*words, "--device", "cpu", "--out", str(tmp_path)]) == 0
        said = capsys.readouterr()
        assert told in said.err
        assert json.loads(said.out)["num_shards"] == 2
    assert len(LabelStore(tmp_path).documents()) == 2
    assert main([*words, "--families", "sudoku"]) == 2
    assert "no such task family: sudoku" in capsys.readouterr().err


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_labels_then_training(tmp_path):
    """Label, be killed in the middle, label on, train from the store; by two processes: recipes/test_two_processes.py."""
    label = ["recipes/oracle.py", "--smoke", "--out", str(tmp_path / "labels")]
    first = run_recipe(*label)
    assert first.returncode == 0, first.stderr[-2000:]
    shard = min((tmp_path / "labels" / "data").iterdir())
    whole = shard.read_bytes()
    shard.unlink()
    shard.with_suffix(".tmp").write_bytes(whole[:100])  # what a kill in the middle of writing leaves
    second = run_recipe(*label)
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
    third = run_recipe(*train)
    assert third.returncode == 0, third.stderr[-2000:]
    assert (tmp_path / "gates" / "model.safetensors").is_file()


@pytest.mark.slow
def test_killed_processes_and_another_number_of_them_label_alike(tmp_path):
    """Two processes are killed in the middle, one goes on, and the files are those of an undisturbed run."""
    common = ["recipes/oracle.py", "--documents", "10", "--per_shard", "1", "--batch_size", "1", "--out"]
    alone = run_recipe(*common, str(tmp_path / "alone"))
    assert "10 shards, 0 done before" in alone.stdout, alone.stderr[-2000:]
    lost = tmp_path / "lost"
    pair = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *common, str(lost)]
    running = psutil.Popen(pair, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    while running.poll() is None and len(list((lost / "data").glob("*.parquet"))) < 3:
        time.sleep(0.01)
    family = [running, *running.children(recursive=True)]  # workers outlive a killed launcher
    for one in family:
        one.kill()
    psutil.wait_procs(family)
    done = len(list((lost / "data").glob("*.parquet")))
    assert 3 <= done < 10, "it was done before it could be killed"
    rest = run_recipe(*common, str(lost))
    assert f"10 shards, {done} done before" in rest.stdout, rest.stderr[-2000:]
    assert rest.stdout.count("labelling") == 1
    for one in (tmp_path / "alone" / "data").iterdir():
        assert one.read_bytes() == (lost / "data" / one.name).read_bytes(), one.name


@pytest.mark.slow
def test_recipes_say_what_is_wrong(tmp_path):
    other = run_recipe("recipes/distill.py", "--labels", str(tmp_path / "none"))
    assert other.returncode == 1
    assert "Traceback" not in other.stderr
    assert "make them with `learnevict oracle`" in other.stderr
    heuristic = run_recipe("recipes/distill.py", "--smoke", "--method", "snapkv", "--output_dir", str(tmp_path))
    assert heuristic.returncode == 1
    assert "has no gate to train" in heuristic.stderr
    assert "Traceback" not in heuristic.stderr
