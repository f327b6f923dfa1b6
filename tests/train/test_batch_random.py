"""What is drawn for a row, and how processes are launched: nothing may hang on who has the row."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import TrainingArguments

from learnevict.errors import UsageError
from learnevict.ops.distributed import highest, ratio, summed
from learnevict.ops.random import hashed, uniform
from learnevict.train.batch_random import BatchRandom
from learnevict.train.losses.objectives import pairwise, sample_slots
from learnevict.train.run.launch import check_launch, find_tools, launch_defaults


def test_hashes_are_even_and_tell_their_parts_apart():
    found = uniform(hashed(7, torch.arange(400).view(-1, 1), torch.arange(250)))
    counts = torch.histc(found, bins=20, min=0, max=1)
    assert float((counts - 5000).abs().max()) < 5 * 5000**0.5
    rows, columns = found[:-1].flatten(), found[1:].flatten()
    assert abs(float(torch.corrcoef(torch.stack([rows, columns]))[0, 1])) < 0.02
    assert len(hashed(torch.arange(300).view(-1, 1), torch.arange(300)).unique()) == 300 * 300
    assert int(hashed(1, 2)) != int(hashed(2, 1))
    assert 0 <= float(found.min()) < float(found.max()) < 1


def test_a_row_draws_the_same_whoever_has_it():
    batch = hashed(7, 3, 0)
    whole = BatchRandom.of(batch, torch.arange(6))
    shares = [BatchRandom.of(batch, torch.arange(3) + first) for first in (0, 3)]
    assert torch.equal(torch.cat([share.per_row(1, 2) for share in shares]), whole.per_row(1, 2))
    assert len({share.budget((30, 200)) for share in [whole, *shares]}) == 1
    assert not torch.equal(whole.per_row(1), whole.per_row(2))
    assert not torch.equal(whole.per_row(1), BatchRandom.of(hashed(7, 4, 0), torch.arange(6)).per_row(1))
    candidates = torch.rand(6, 2, 30) > 0.3
    pairs = sample_slots(candidates, 50, whole.rows)
    assert torch.equal(pairs[3:], sample_slots(candidates[3:], 50, shares[1].rows))
    wider = torch.nn.functional.pad(candidates, (0, 9))
    assert torch.equal(pairs, sample_slots(wider, 50, whole.rows))


def test_budgets_are_drawn_evenly_on_a_logarithmic_scale():
    found = [BatchRandom.of(hashed(step), torch.arange(1)).budget((16, 256)) for step in range(600)]
    assert (min(found), max(found)) >= (16, 200)
    assert max(found) <= 256
    below = sum(budget < 64 for budget in found) / len(found)
    assert below == pytest.approx(0.5, abs=0.07)
    assert BatchRandom.of(hashed(1), torch.arange(1)).budget((48, 48)) == 48


def test_one_row_of_the_marked_ones_is_drawn_evenly():
    values, marked = torch.tensor([-50, 7, 2**31 - 1, -(2**31)]), torch.tensor([True, False, True, True])
    draws = BatchRandom.of(hashed(7), torch.arange(4))
    found = [draws.one_of(values, marked, number) for number in range(600)]
    assert set(found) == set(values[marked].tolist())
    assert min(map(found.count, set(found))) > 150
    assert draws.one_of(values, marked, 3) == draws.one_of(values, marked, 3)
    assert draws.one_of(values, marked & False) is None


def test_draws_come_from_the_global_generator_if_from_nowhere_else():
    torch.manual_seed(3)
    first = BatchRandom.anew(4)
    torch.manual_seed(3)
    assert torch.equal(BatchRandom.anew(4).rows, first.rows)
    assert not torch.equal(BatchRandom.anew(4).rows, first.rows)


def test_alone_sums_are_what_they_were():
    value = torch.tensor([2.0, 3.0], requires_grad=True)
    assert highest(5) == 5
    assert torch.equal(summed(value), value.detach())
    found = ratio(value.sum(), torch.tensor(4))
    found.backward()
    assert float(found.detach()) == 1.25
    assert value.grad.tolist() == [0.25, 0.25]
    assert float(ratio(value.sum(), torch.tensor(0)).detach()) == 5.0


def test_pairs_that_are_drawn_anew_differ():
    scores, targets = torch.randn(2, 1, 9), torch.rand(2, 1, 9)
    everyone = torch.ones(2, 1, 9, dtype=torch.bool)
    losses = [
        float(pairwise(scores, targets, everyone, pairs=4, seeds=hashed(torch.arange(2), step))) for step in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_what_would_be_left_out_in_silence_is_refused(tmp_path, monkeypatch):
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    check_launch(training)
    for name, said in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed was asked for"),
        ("ACCELERATE_USE_FSDP", "FSDP was asked for"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, "true")
            with pytest.raises(UsageError, match=said):
                check_launch(training)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 processes were launched, but each would train by itself"):
        check_launch(training)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="processes on accelerators need no help")
def test_processes_on_cpus_are_told_how_to_meet(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch_defaults() == {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch_defaults() == {"use_cpu": True}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert launch_defaults() == {"ddp_backend": "gloo"}


def test_programs_beside_the_interpreter_are_found(monkeypatch):
    import sys
    from pathlib import Path

    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    find_tools()
    find_tools()
    assert os.environ["PATH"] == os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin"])
