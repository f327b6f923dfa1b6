"""Two processes are one: what `accelerate launch` with the files of recipes/accelerate makes of a batch.

Two processes with batches of b learn what one with batches of 2b learns. All that is drawn is drawn for a row of the whole
batch, all means are over the whole batch; only sums are added in another order. Steps are plain gradient steps, so that gates
differ as gradients do: by rounding. In refining, a draw may hang on the last bit of a score, so the texts are few.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from learnevict import testbed
from learnevict.hub.run_record import read_record
from tests.closeness import close
from tests.recipe_runs import assert_same, launch, refuse_stale_locks, run_recipe

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # of the largest weight, and moved by up to half of it: a hundred times the rounding that was measured
SHARED = (
    "--documents 12 --max_steps 3 --warmup_steps 0 --lr_scheduler_type constant --weight_decay 0 --optim sgd --logging_steps 1 "
    "--save_strategy no --disable_tqdm true"
)
RUNS = {
    "replay": ("distill", "--hidden 8 --budgets 36 170 --learning_rate 1"),  # some processes have nothing to evict
    "stream": ("distill", "--method kvp --hidden 8 --budgets 36 60 --learning_rate 1"),
    "soft": ("distill", "--method trimkv --hidden 8 --bias 4 --learning_rate 1"),
    "probe": ("distill", "--method judge_q --num_tokens 4 --response 40 --horizon 20 --learning_rate 20"),
    "grpo": (
        "grpo",
        "--start_from testbed-foresightkv --num_generations 2 --min_budget 36 --max_budget 48 --learning_rate 4 "
        "--max_steps 1",  # a draw that rounding turns shows in all later steps
    ),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Texts of very different lengths, so that processes pad theirs differently."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = []
    for number in range(12):
        sample = testbed.generate(testbed.FAMILIES[number % 5], number, split="train")
        prompt, length = sample.prompt.split(), 70 + (number * 37) % 120
        start = max(0, len(prompt) - length // 2)
        answer = sample.response.split()[: length - (len(prompt) - start)]
        lines.append(json.dumps({"prompt": " ".join(prompt[start:]), "completion": " ".join(answer)}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def alone(texts, tmp_path_factory):
    """Gates that one process makes with batches of 4, by name of the run; made when they are asked for."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def gates(name: str) -> dict:
        if name not in made:
            recipe, *flags = command(name, texts, 4, folder)
            done = run_recipe(recipe, *flags)
            assert done.returncode == 0, done.stderr[-4000:]
            made[name] = load_file(folder / name / "model.safetensors")
        return made[name]

    return gates


def command(name: str, texts: Path, rows: int, folder: Path) -> list[str]:
    recipe, own = RUNS[name]
    rows = 2 * rows if recipe == "grpo" else rows  # each text twice
    words = f"recipes/{recipe}.py --data {texts} --output_dir {folder / name} --per_device_train_batch_size {rows}"
    return f"{words} {SHARED} {own}".split()


def check(name: str, folder: Path, wanted: dict) -> None:
    found = load_file(folder / name / "model.safetensors")
    assert found.keys() == wanted.keys()
    largest = max(float(weights.float().abs().max()) for weights in wanted.values())
    for part, weights in wanted.items():
        close(found[part], weights, TOLERANCE, scale=largest, about=f"{name}: {part}")
    assert not list((folder / name).rglob("*.bin"))


def test_two_processes_are_one(texts, alone, tmp_path):
    """Under data parallelism, ZeRO-2 and ZeRO-3; they also share labels out, learn from these, and go on with a stream."""
    runs = [("zero2", "soft"), ("zero3", "grpo"), ("ddp_cpu", "replay")]
    label, labels = ["recipes/oracle.py", "--smoke", "--out"], tmp_path / "labels"
    learn = ["recipes/distill.py", "--smoke", "--labels", str(labels), "--output_dir", str(tmp_path / "learned")]
    commands = [(config, command(name, texts, 2, tmp_path / config)) for config, name in runs]
    others = [[*label, str(labels)], learn, *go_on(texts, tmp_path)]
    said = launch(*commands, *(("ddp_cpu", words) for words in others))
    for config, name in runs:
        check(name, tmp_path / config, alone(name))
    assert read_record(tmp_path / "whole")["status"] == "finished"
    assert_same(tmp_path / "whole", tmp_path / "lost")
    assert (tmp_path / "learned" / "model.safetensors").is_file()
    assert "by 2 processes" in said
    run_recipe(*label, str(tmp_path / "one"))
    shards = sorted(path.name for path in (tmp_path / "one" / "data").iterdir())
    assert len(shards) == 2
    for shard in shards:
        assert (tmp_path / "one" / "data" / shard).read_bytes() == (labels / "data" / shard).read_bytes()


@pytest.mark.full
def test_two_processes_are_one_in_every_mode(texts, alone, tmp_path):
    runs = [(config, name) for config in ("zero2", "zero3", "ddp_cpu") for name in RUNS]
    launch(*((config, command(name, texts, 2, tmp_path / config)) for config, name in runs))
    for config, name in runs:
        check(name, tmp_path / config, alone(name))


def go_on(texts: Path, folder: Path) -> list[list[str]]:
    """Commands that learn from a stream, validated by both; that lose the run at a checkpoint; and that resume it."""
    copy = folder / "copy.py"
    copy.write_text("import os, shutil, sys\nif os.environ['RANK'] == '0':\n    shutil.copytree(*sys.argv[1:])\n")
    flags = (
        f"--data {texts} --streaming --use_cpu true --documents 10 --period 8 --recent 4 --budgets 24 40 --hidden 8 "
        + (
            "--per_device_train_batch_size 2 --max_steps 4 --save_steps 2 --logging_steps 3 --warmup_steps 1 --eval_steps 2 "
            "--eval_documents 3 --eval_budgets 24 --disable_tqdm true --output_dir"
        )
    )
    train, whole, lost = ["recipes/distill.py", *flags.split()], folder / "whole", folder / "lost"
    return [
        [*train, str(whole)],
        [str(copy), str(whole / "checkpoint-2"), str(lost / "checkpoint-2")],
        [*train, str(lost), "--resume_from_checkpoint", "true"],
    ]


def test_the_lock_of_a_killed_compile_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "op").mkdir()
    refuse_stale_locks()
    with (tmp_path / "op" / "lock").open("w"):
        refuse_stale_locks()
    with pytest.raises(pytest.fail.Exception, match=r"op/lock is left of a compile that was killed.*remove that file"):
        refuse_stale_locks()
    assert (tmp_path / "op" / "lock").exists()
