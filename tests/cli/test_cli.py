"""The command line, tried as a new user would: what works, and every mistake as one line with its remedy."""

from __future__ import annotations

import base64
import errno
import functools
import hashlib
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.models import ArgumentInfo

from learnevict import methods, testbed
from learnevict.cli import app, main, options
from learnevict.cli.console import _explain
from learnevict.config import Budget
from learnevict.errors import DataError, UsageError, told_in_one_line
from learnevict.evals.records import KEYS
from learnevict.evals.viz import page
from learnevict.files import locked
from learnevict.hub import GATES_FOLDER, Gates, weight_hash
from learnevict.infer.generate import generate, read_chat, read_text
from learnevict.infer.load import load, load_config
from learnevict.infer.model.memory import estimate
from learnevict.policy import Guard, Schedule
from learnevict.signals import NEVER, Trace
from learnevict.untrusted import printable
from tests.interrupting import ctrl_c_after
from tests.recipe_runs import run_recipe

ROOT = Path(__file__).resolve().parents[2]
WORDS = " ".join(testbed.generate("recall", 0).messages[0]["content"].split()[:8])


def tiny(num_heads: int = 2, seed: int = 0) -> Qwen3ForCausalLM:
    """A random model that speaks the testbed's language and never stops early."""
    torch.manual_seed(seed)
    tokenizer = testbed.build_tokenizer()
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16,
            num_attention_heads=2 * num_heads, num_key_value_heads=num_heads, max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=None,
        )
    )  # fmt: skip
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk."""
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    testbed.build_tokenizer().save_pretrained(path)
    return path


Outcome = tuple[int, str, str]


@pytest.fixture
def learnevict(capsys: pytest.CaptureFixture[str], folder: Path) -> Callable[..., Outcome]:
    """Runs a command line in this process; MODEL stands for the model on disk."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(folder) if word == "MODEL" else str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, *rows: object) -> Path:
    lines = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(lines, encoding="utf-8", errors="surrogateescape")  # so that a row may hold a byte that is no UTF-8
    return path


# --- help ---


def test_every_command_teaches_with_an_example(learnevict):
    names = [command.name for command in app.registered_commands]
    assert set(names) >= {"infer", "list", "eval", "report", "viz", "doctor", "demo"}
    for name in names:
        code, out, _ = learnevict(name, "--help")
        assert code == 0
        assert f"learnevict {name}" in out.split("Example", 1)[1], f"{name} --help shows no example"


def test_version_and_bare_call(learnevict):
    assert learnevict("--version")[:2] == (0, "learnevict 0.1.0\n")
    code, out, err = learnevict()
    assert code in (0, 2)
    assert "infer" in out + err


def test_list_is_the_table_of_methods(learnevict):
    code, out, _ = learnevict("list", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == list(methods.METHODS)
    code, out, _ = learnevict("list")
    assert all(name in out for name in methods.METHODS)


# --- infer ---


def infer(learnevict: Callable[..., Outcome], *words: object) -> dict:
    code, out, err = learnevict("infer", "--model", "MODEL", "-n", "24", "--json", *words)
    assert code == 0, err
    return json.loads(out)


def test_a_full_cache_and_a_small_one(learnevict):
    full = infer(learnevict, "--task", "recall", "--seed", 2)
    assert (full["method"], full["budget"], full["tokens_generated"]) == ("full", None, 24)
    assert full["kv_bytes_peak"] == full["kv_bytes_full"] == full["kept"]["mean"] * 2 * 2 * 2 * 16 * 4
    small = infer(learnevict, "--task", "recall", "--seed", 2, "--method", "h2o", "--budget", 48)
    assert small["kept"]["max"] <= 48 + 16
    assert small["kv_bytes_full"] == full["kv_bytes_full"] > 4 * small["kv_bytes_peak"]
    assert small["expected"] == full["expected"] == testbed.generate("recall", 2).answer
    assert small["correct"] is False


def test_every_method_with_shipped_gates_goes_by_its_name(learnevict):
    for folder in GATES_FOLDER.glob("testbed-*"):
        name = folder.name.removeprefix("testbed-")
        if name in methods.METHODS:
            code, out, err = learnevict(
                "infer", "--task", "recall", "--json", "--method", name, "--budget", 64, "-n", 2
            )
            assert (code, json.loads(out)["method"]) == (0, name), err


def test_text_streams_and_figures_follow(learnevict):
    words = ("--task", "program", "--method", "streaming_llm", "--budget", "25%")
    record = infer(learnevict, *words)
    code, out, err = learnevict("infer", "--model", "MODEL", "-n", "24", *words)
    assert code == 0
    assert out.strip() == record["text"].strip()
    assert f"budget {record['budget_tokens']} = 25%" in err
    for said in ("tokens/s", "kept per head", "now ", "peak ", "full cache ", "answer: wrong, expected"):
        assert said in err
    assert record["budget_tokens"] == -(-(record["prompt_tokens"] + 23) // 4)


def test_a_budget_in_bytes(learnevict):
    record = infer(learnevict, "--task", "program", "--method", "knorm", "--budget", "64KiB")
    assert record["budget_tokens"] == 64 * 1024 // (2 * 2 * 2 * 16 * 4) - 16
    assert record["kv_bytes_peak"] <= 64 * 1024


def test_a_prompt_shorter_than_every_window(learnevict):
    record = infer(learnevict, "--prompt", WORDS, "--method", "snapkv", "--budget", 32)
    assert record["prompt_tokens"] == len(WORDS.split()) + 4  # as a user's turn
    assert infer(learnevict, "--prompt", f"<bos> {WORDS}")["prompt_tokens"] == len(WORDS.split()) + 1


def test_golden_says_that_it_runs_twice(learnevict):
    record = infer(learnevict, "--task", "ledger", "--method", "golden", "--budget", 48)
    assert record["runs"] == 2
    assert 0 <= record["agreement"] <= 1
    assert record["kept"]["max"] <= 64
    _, _, err = learnevict("infer", "--model", "MODEL", "-n", 4, "--task", "ledger", "--method", "golden", "-b", 48)
    assert "golden runs twice" in err


def test_gates_from_a_folder(learnevict, folder, tmp_path):
    base, _ = load(str(folder))
    Gates.make("foresightkv", base).save_pretrained(tmp_path / "gates")
    record = infer(learnevict, "--task", "recall", "--ckpt", tmp_path / "gates", "--budget", 48)
    assert record["method"] == "foresightkv"
    assert record["kept"]["max"] <= 64


def write_method(path: Path, policy: str) -> None:
    path.write_text(
        "from learnevict.methods import Paper, streaming_llm\n"
        "PAPER = Paper('mine', None, 2026)\n"
        f"def policy(budget, *, slack=16):\n    return {policy}\n"
    )


def test_a_method_of_ones_own(learnevict, tmp_path, monkeypatch):
    """Any importable module will do, and what suits the testbed is not forced on it."""
    write_method(tmp_path / "my_method.py", "streaming_llm.policy(budget, slack=slack, recent=8)")
    monkeypatch.syspath_prepend(tmp_path)
    assert infer(learnevict, "--task", "recall", "--method", "my_method", "--budget", 48)["kept"]["max"] <= 64
    code, _, err = learnevict(
        "infer", "--model", "MODEL", "--task", "recall", "--method", "my_method", "-b", 48, "--sinks", 2
    )
    assert code == 2
    assert "sinks" in err


# --- infer --batch ---

BATCH = [
    {"id": "a", "prompt": WORDS},
    "this is no JSON",
    {"id": "b", "messages": [{"role": "user", "content": WORDS}]},
    {"id": "c", "prompt": "what is the weather"},
    {"id": "d", "task": "recall", "seed": 5},
    {"id": "a", "prompt": WORDS},
    {"id": "e", "prompt": "   "},
    {"id": "f", "question": WORDS},
    {"id": "g", "task": "poetry"},
    '{"id": "h", "prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"id": "i", "prompt": "\\ud83d"}',
    '{"id": "\\ud83d", "prompt": "a"}',
    '{"id": "j", "messages": [{"role": "user", "content": "\\ud83d"}]}',
    '{"id": "m", "prompt": "caf\udce9"}',
    {"id": "k", "conversations": [{"from": "human", "value": WORDS}]},
    {"id": "l", "prompt": [{"role": "user", "content": [{"type": "text", "text": WORDS}]}]},
]


def test_bad_rows_are_named_and_good_ones_finish(learnevict, tmp_path):
    rows, out = write_rows(tmp_path / "rows.jsonl", *BATCH), tmp_path / "out.jsonl"
    words = ("infer", "--model", "MODEL", "-n", 8, "--batch", rows, "--out", out, "--method", "h2o", "--budget", 48)
    code, _, err = learnevict(*words, "--batch-size", 2)
    assert code == 1
    complaints = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [int(re.findall(r"line (\d+)", line)[0]) for line in complaints] == [2, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert "nested too deeply" in complaints[6]
    assert all("half of a surrogate pair" in line for line in complaints[7:10])
    assert "line 14: is not UTF-8 (byte 0xe9); convert it, for instance with `iconv" in complaints[10]
    assert "'what', 'is', 'weather'" in complaints[1]
    assert [row["id"] for row in rows_of(out)] == ["a", "b", "d", "k", "l"]
    assert len({rows_of(out)[place]["text"] for place in (1, 3, 4)}) == 1
    assert rows_of(out)[2]["task"] == "recall"
    before = out.read_text()
    code, _, err = learnevict(*words, "--batch-size", 2)
    assert "5 rows are finished" in err
    assert out.read_text() == before


def test_half_of_a_character_is_refused_before_a_tokenizer_sees_it():
    tokenizer = testbed.build_tokenizer()
    with pytest.raises(DataError, match=r"the prompt holds '\\ud83d', half"):
        read_text(tokenizer, "good \ud83d")
    with pytest.raises(DataError, match=r"the conversation holds '\\ude00', half"):
        read_chat(tokenizer, [{"role": "user", "content": "\ude00"}])


def test_rows_of_a_batch_equal_single_runs(learnevict, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", *({"task": family, "seed": 1} for family in ("recall", "program")))
    words = ("infer", "--model", "MODEL", "-n", 12, "--method", "snapkv", "--budget", 48)
    code, out, _ = learnevict(*words, "--batch", rows)
    assert code == 0
    together = [json.loads(line)["text"] for line in out.splitlines()]
    alone = [
        json.loads(learnevict(*words, "--task", f, "--seed", 1, "--json")[1])["text"] for f in ("recall", "program")
    ]
    assert together == alone


def test_a_sampled_batch_that_was_cut_off_ends_as_an_uninterrupted_one(learnevict, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", *({"prompt": WORDS} for _ in range(5)))
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    words = ("infer", "--model", "MODEL", "-n", 12, "--temperature", 1, "--batch", rows, "--batch-size", 3, "--out")
    assert learnevict(*words, whole)[0] == 0
    lines = whole.read_text().splitlines(keepends=True)
    assert len({row["text"] for row in rows_of(whole)}) == 5
    for kept in ([0], [0, 1, 2, 3], [1, 2]):
        cut.write_text("".join(lines[index] for index in kept))
        assert learnevict(*words, cut)[0] == 0
        assert cut.read_text().startswith("".join(lines[index] for index in kept))
        assert {row["id"]: row["text"] for row in rows_of(cut)} == {row["id"]: row["text"] for row in rows_of(whole)}
    code, _, err = learnevict(*words, cut, "--batch-size", 2)
    assert (code, "other settings" in err) == (2, True)


def test_a_result_file_belongs_to_its_settings(learnevict, tmp_path):
    rows, out = write_rows(tmp_path / "rows.jsonl", {"prompt": WORDS}), tmp_path / "out.jsonl"
    words = ("infer", "--model", "MODEL", "-n", 4, "--batch", rows, "--out", out)
    assert learnevict(*words)[0] == 0
    with out.open("a") as file:
        file.write('{"id": "half a ro')
    code, _, err = learnevict(*words, "--temperature", 1)
    assert code == 2
    assert "other settings" in err
    assert learnevict(*words)[0] == 0
    assert [row["id"] for row in rows_of(out)] == ["1"]


def test_answers_of_other_weights_are_not_taken_for_finished(learnevict, folder, tmp_path):
    """The folders are the same, what lies in them is not: gates trained further, another base under the old path."""
    base, gates, out = tmp_path / "base", tmp_path / "gates", tmp_path / "out.jsonl"
    shutil.copytree(folder, base)
    scorer = Gates.make("foresightkv", load(str(folder))[0])
    scorer.save_pretrained(gates)
    rows = write_rows(tmp_path / "rows.jsonl", {"prompt": WORDS})
    words = ("infer", "--model", base, "-n", 4, "--batch", rows, "--out", out)
    evicting = (*words, "--ckpt", gates, "--budget", 48, "--allow-other-base")
    assert learnevict(*evicting)[0] == learnevict(*evicting)[0] == 0
    with torch.no_grad():
        scorer.gate.weight_out[0, 0, 3] += 0.01
    scorer.save_pretrained(gates)
    code, _, err = learnevict(*evicting)
    assert (code, "other weights" in err) == (2, True)
    out.unlink()
    assert learnevict(*words)[0] == learnevict(*words)[0] == 0
    tiny(seed=1).save_pretrained(base)
    code, _, err = learnevict(*words)
    assert (code, "choose another --out" in err) == (2, True)


def test_an_interrupted_batch_keeps_its_rows_and_goes_on(learnevict, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", *({"prompt": WORDS} for _ in range(12)))
    out = tmp_path / "out.jsonl"
    words = ("infer", "--model", "MODEL", "-n", 40, "--batch", rows, "--out", out, "--batch-size", 1)
    with ctrl_c_after(out, 2):
        code, _, err = learnevict(*words)
    finished = len(rows_of(out))
    assert code == 130
    assert 2 <= finished < 12
    assert f"interrupted: {finished} finished rows are kept in {out}" in err
    assert learnevict(*words)[0] == 0
    assert [row["id"] for row in rows_of(out)] == [str(number) for number in range(1, 13)]


# --- mistakes ---

TASK = ("infer", "--model", "MODEL", "--task", "recall")
MISTAKES = {
    "nothing to read": (("infer", "--model", "MODEL"), 2, "give one of --prompt TEXT, --task FAMILY"),
    "two things to read": ((*TASK, "--prompt", WORDS), 2, "not --prompt and --task"),
    "unknown option": ((*TASK, "--budgets", "3"), 2, "see `learnevict infer --help`"),
    "unknown command": (("infr",), 2, "Did you mean 'infer'"),
    "budget that is no budget": ((*TASK, "--method", "h2o", "--budget", "lots"), 2, '"25%"'),
    "budget too small": ((*TASK, "--method", "h2o", "--budget", "8"), 2, "the smallest that works is 21"),
    "bytes too few": ((*TASK, "--method", "h2o", "--budget", "1KiB"), 2, "give at least"),
    "method without budget": ((*TASK, "--method", "h2o"), 2, "--budget 512"),
    "budget for a full cache": ((*TASK, "--method", "full", "--budget", "48"), 2, "drop --budget"),
    "unknown method": ((*TASK, "--method", "h3o", "--budget", "48"), 2, "known: full, random"),
    "unknown variant": ((*TASK, "--method", "snapkv", "--budget", "48", "--variant", "x"), 2, "has no variant"),
    "unknown schedule": ((*TASK, "--method", "h2o", "-b", "48", "--schedule", "never"), 2, "prefill_end"),
    "variant of golden": ((*TASK, "--method", "golden", "--budget", "25%", "--variant", "x"), 2, "golden has neither variants"),
    "missing checkpoint": ((*TASK, "--ckpt", "./nowhere", "--budget", "48"), 1, "config.json and model.safetensors"),
    "unknown task": (("infer", "--model", "MODEL", "--task", "poetry"), 2, "choose from program"),
    "empty prompt": (("infer", "--model", "MODEL", "--prompt", " "), 1, "the prompt is empty"),
    "unknown words": (("infer", "--model", "MODEL", "--prompt", f"{WORDS} zebras"), 2, "does not know 'zebras'"),
    "missing model": (("infer", "--model", "./nowhere", "--prompt", WORDS), 1, "no folder './nowhere'"),
    "device that is not here": ((*TASK, "--device", "cuda:7"), 2, "--device auto"),
    "no tokens": ((*TASK, "--max-new-tokens", "0"), 2, "greater than or equal to 1"),
    "negative temperature": ((*TASK, "--temperature", "-1"), 2, "greater than or equal to 0"),
    "endless temperature": ((*TASK, "--temperature", "inf"), 2, "0 (greedy) or more"),
    "out without batch": ((*TASK, "--out", "x.jsonl"), 2, "--out belongs to --batch"),
    "missing batch": (("infer", "--model", "MODEL", "--batch", "nowhere.jsonl"), 1, "cannot read 'nowhere.jsonl'"),
    "viz of a full cache": (("viz", "--model", "MODEL", "--task", "recall", "--out", "OUT"), 2, "give --budget"),
    "viz out of reach": (("viz", "--task", "recall", "-b", "48", "--out", "no/where.html"), 1, "choose another --out"),
    "viz of less than nothing": (("viz", "--task", "recall", "-b", "48", "-n", "-1"), 2, "'-n'"),
    "terms of no eviction": ((*TASK, "--slack", "4", "--sinks", "9"), 2, "--sinks and --slack without --budget"),
    "prompt kept by nobody": ((*TASK, "--method", "full", "--keep-prompt"), 2, "--keep-prompt without --budget"),
    "chat of a task": ((*TASK, "--chat"), 2, "--chat means nothing to --task"),
    "viz of a chat of a task": (("viz", "--task", "recall", "--chat", "-b", "48"), 2, "--chat means nothing to --task"),
    "batch size of one prompt": ((*TASK, "--batch-size", "4"), 2, "--batch-size belongs to --batch"),
    "seed beyond all seeds": ((*TASK, "--seed", "99999999999999999999", "--temperature", "1"), 2, str(2**63 - 1)),
    "doctor's model": (("doctor", "--model", "./nowhere"), 1, "no folder './nowhere'"),
    "doctor's budget": (("doctor", "--model", "MODEL", "-b", "5"), 2, "the smallest that works is 133"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy(name, learnevict, tmp_path):
    words, expected, remedy = MISTAKES[name]
    code, out, err = learnevict(*(tmp_path / "x.html" if word == "OUT" else word for word in words))
    assert code == expected
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert remedy in err


def test_what_needs_no_model_is_told_before_torch_is_imported(tmp_path):
    """In one process: none of these mistakes imports torch or transformers, and all of them end with code 2 or 1."""
    (tmp_path / "empty.txt").write_text(" ")
    wrong = [
        ("infer", "--task", "recall", "--method", "h3o", "--budget", "48"),
        ("infer", "--task", "recall", "--method", "h2o", "--budget", "lots"),
        ("infer", "--task", "recall", "--method", "h2o"),
        ("infer", "--task", "recall", "--method", "golden", "--budget", "25%", "--variant", "x"),
        ("infer", "--task", "recall", "--slack", "4"),
        ("infer", "--batch", "nowhere.jsonl"),
        ("infer",),
        ("viz", "--file", "nowhere.txt", "--budget", "48"),
        ("eval", "--budgets", "many"),
        ("eval", "--resume"),
        ("eval", "--task", "perplexity", "--text", "empty.txt"),
        ("report",),
        ("pull", "me/gates", "--method", "h3o"),
        ("doctor", "--context", "long"),
        ("doctor", "--model", "./nowhere"),
        ("infer", "--prompt", "x", "--model", "./nowhere"),
        ("infer", "--prompt", "x", "--ckpt", "./nowhere", "--budget", "48"),
        ("infer", "--prompt", "x", "--method", "h2o", "--budget", "48", "--allocation", "nowhere.json"),
        ("infer", "--prompt", "x", "--method", "h2o", "--budget", "48", "--slack", "-3"),
        ("infer", "--prompt", "x", "--temperature", "-1"),
        ("infer", "--task", "sudoku"),
        ("eval", "--methods", "h3o"),
        ("eval", "--ckpt", "./nowhere"),
        ("eval", "--families", "sudoku"),
        ("eval", "--tasks", "gsm8k", "--data", "nowhere.jsonl"),
        ("eval", "--allocation", "nowhere.json"),
        ("infer", "--prompt", "x", "--method", "h2o", "--budget", "48", "--store", "int3"),
        ("eval", "--store", "int16"),
        ("report", "nowhere.jsonl"),
        ("oracle", "--families", "sudoku"),
        ("oracle", "--data", "nowhere.txt"),
        ("profile", "nowhere.txt"),
        ("profile", "empty.txt", "--budgets", "3"),
        ("train", "h3o"),
        ("train", "nowhere.yaml"),
        ("train", "foresightkv", "--model", "./nowhere"),
        ("train", "foresightkv", "--data=nowhere.txt"),
        ("refine", "--start_from", "./nowhere"),
        ("push", "./nowhere", "me/gates"),
        ("push", "testbed-foresightkv", "me/gates", "--results", "nowhere.jsonl"),
        ("import", "nowhere.pt", "--model", "testbed", "--out", "new"),
        ("model", "get", "h3o"),
        ("model", "convert", "nowhere.gguf", "--out", "new"),
    ]
    code = (
        "import sys; from learnevict.cli import main\n"
        f"for words in {wrong}:\n"
        "    assert main(words) in (1, 2), words\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (0, len(wrong)), done.stderr


def test_files_of_tasks_are_read_as_all_others(learnevict, tmp_path):
    """U+2028 stands in a problem; a bad line is named; words that the model lacks are told, whole text or stretches."""
    good = {"question": "a\u2028b", "answer": "#### 3"}
    path, out = tmp_path / "problems.jsonl", tmp_path / "rows.jsonl"
    words = ("eval", "--model", "MODEL", "--tasks", "gsm8k", "--data", path, "--methods", "full", "--budgets", 64)
    for bad in (None, [1], {"text": "?"}, '{"question": "\\ud83d", "answer": 3}', "{"):
        write_rows(path, json.dumps(good, ensure_ascii=False), bad)
        code, _, err = learnevict(*words)
        assert (code, len(err.splitlines()), "line 2 of" in err) == (1, 1, True), err
    write_rows(path, json.dumps(good, ensure_ascii=False))
    code, _, err = learnevict(*words, "--samples", 1, "--max-new-tokens", 2, "--out", out)
    assert (code, len(rows_of(out))) == (0, 1), err
    path.write_text("strange tongues")
    for length in ((), ("--length", 2), ("--length", ",")):
        code, _, err = learnevict("eval", "--task", "perplexity", "--text", path, *length, "--methods", "full")
        assert code in (1, 2) and ("words of this text" in err or "--length is" in err), err


def test_gates_of_another_model(learnevict, tmp_path):
    Gates.make("foresightkv", tiny(num_heads=1)).save_pretrained(tmp_path / "shape")
    code, _, err = learnevict(*TASK, "--ckpt", tmp_path / "shape", "--budget", 48)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "made for another model" in err
    Gates.make("foresightkv", tiny(seed=1)).save_pretrained(tmp_path / "weights")
    code, _, err = learnevict(*TASK, "--ckpt", tmp_path / "weights", "--budget", 48)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "--allow-other-base" in err
    words = (*TASK, "-n", 4, "--ckpt", tmp_path / "weights", "--budget", 48, "--allow-other-base")
    assert learnevict(*words)[0] == 0


def test_no_command_takes_an_empty_path(learnevict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = []
    for command in app.registered_commands:
        for name, hint in command.callback.__annotations__.items():
            option = getattr(hint, "__metadata__", [None])[0]
            if getattr(option, "parser", None) is options.path:
                flag = [] if isinstance(option, ArgumentInfo) else [(option.param_decls or [f"--{name}"])[0]]
                code, _, err = learnevict(command.name, *flag, "")
                assert (code, "it is empty; name a file or a folder" in err) == (2, True), (command.name, name, err)
                tried.append(f"{command.name} {name}")
    assert {"oracle out", "infer out", "infer batch", "eval out", "pull out", "viz out", "report rows"} <= {*tried}
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written(learnevict, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", {"prompt": WORDS})
    other = write_rows(tmp_path / "other.jsonl", {"id": "mine", "prompt": WORDS})
    for out in (tmp_path, tmp_path / "missing" / "out.jsonl", other):
        code, _, err = learnevict("infer", "--model", "MODEL", "--batch", rows, "--out", out)
        assert (code, len(err.splitlines())) == (1, 1)
        assert "choose another --out" in err
    assert rows_of(other) == [{"id": "mine", "prompt": WORDS}], "a file of the user's was taken for a broken output"
    code, _, err = learnevict("infer", "--model", "MODEL", "--batch", rows, "--out", rows)
    assert (code, rows_of(rows)) == (2, [{"prompt": WORDS}])


def test_a_page_that_failed_leaves_no_file(learnevict, tmp_path):
    out = tmp_path / "page.html"
    assert learnevict("viz", "--model", "MODEL", "--prompt", WORDS, "--out", out)[0] == 2
    assert not out.exists()
    out.write_text("mine")
    assert learnevict("viz", "--model", "MODEL", "--prompt", WORDS, "--out", out)[0] == 1
    assert out.read_text() == "mine"


def test_outputs_replace_nothing_of_others(learnevict, tmp_path):
    """Of others: the text that a page is made of, notes beside a report, another program's rows beside those of eval."""
    text, rows = tmp_path / "s.txt", tmp_path / "r.jsonl"
    text.write_text(WORDS)
    words = ("viz", "--model", "MODEL", "--file", text, "--method", "h2o", "--budget", 48, "--out")
    code, _, err = learnevict(*words, text)
    assert (code, text.read_text(), "or replace it with --overwrite" in err) == (1, WORDS, True)
    assert learnevict(*words, tmp_path / "page.html")[0] == learnevict(*words, tmp_path / "page.html")[0] == 0
    copy = write_rows(tmp_path / "copy.txt", WORDS)
    assert learnevict(*words, copy, "--overwrite")[0] == 0 and copy.read_text().startswith("<!doctype html>")
    rows.write_text(json.dumps(dict.fromkeys(KEYS, 1) | {"method": "h2o", "family": "recall"}))
    for name in ("table.md", "table.csv", "accuracy.png"):
        (tmp_path / name).write_text("mine")
        code, _, err = learnevict("report", rows, "--out", tmp_path)
        assert (code, (tmp_path / name).read_text(), name in err) == (1, "mine", True)
        (tmp_path / name).unlink()
    for _ in range(2):
        assert learnevict("report", rows, "--out", tmp_path)[0] == 0
    rows.unlink()
    foreign = write_rows(tmp_path / "r.samples.jsonl", {"mine": 1}, '{"mi')
    code, _, err = learnevict(
        "eval",
        "--model",
        "MODEL",
        "--families",
        "recall",
        "--samples",
        1,
        "--methods",
        "random",
        "--out",
        rows,
        "--resume",
    )
    assert (code, foreign.read_text(), "choose another --out" in err) == (1, '{"mine": 1}\n{"mi', True)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.lock"))


def test_a_full_disk_and_an_output_in_use_are_told(learnevict, tmp_path):
    rows, out = write_rows(tmp_path / "rows.jsonl", {"prompt": WORDS}), tmp_path / "out.jsonl"
    words = ("infer", "--model", "MODEL", "-n", 4, "--batch", rows, "--out")
    assert learnevict(*words, "/dev/full")[::2] == (
        1, "error: cannot write '/dev/full': No space left on device; free some space, then run it again\n"
    )  # fmt: skip
    assert _explain(OSError(errno.ENOSPC, "No space left on device"))[1] == (
        "No space left on device; free some space, then run it again"
    )
    with locked(out):
        code, _, err = learnevict(*words, out)
        assert (code, "another process is writing" in err, len(err.splitlines())) == (2, True, 1)
        evaluation = ("eval", "--model", "MODEL", "--samples", 1, "--methods", "random", "--out", out)
        assert learnevict(*evaluation)[0] == 2
    assert learnevict(*words, out)[0] == 0 and len(rows_of(out)) == 1
    code, _, err = learnevict(*words, "/dev/null")
    assert (code, "1 of 1 rows" in err) == (0, True)


@pytest.mark.parametrize("size", [0, 5, 100, -1000])
def test_damaged_weights_are_named(learnevict, folder, tmp_path, size):
    model, gates = tmp_path / "model", tmp_path / "gates"
    shutil.copytree(folder, model)
    Gates.make("foresightkv", load(str(folder))[0]).save_pretrained(gates)
    for path, words in (
        (model / "model.safetensors", ("infer", "--model", model, "--task", "recall")),
        (gates / "model.safetensors", (*TASK, "--budget", 48, "--ckpt", gates)),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[:size])
        code, _, err = learnevict(*words)
        assert (code, len(err.splitlines())) == (1, 1), err
        assert f"'{path}' is damaged or cut short" in err
        assert "again" in err


def test_what_nobody_foresaw_is_one_line_too(learnevict, tmp_path, monkeypatch):
    write_method(tmp_path / "my_mistake.py", "1 / 0")
    monkeypatch.chdir(tmp_path)
    words = (*TASK, "--method", "my_mistake", "--budget", 48)
    before = list(sys.path)
    code, _, err = learnevict(*words)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "ZeroDivisionError: division by zero; for the traceback run it again with --debug" in err
    assert sys.path == before
    with pytest.raises(ZeroDivisionError):
        learnevict(*words, "--debug")
    monkeypatch.setenv("LEARNEVICT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        learnevict(*words)


@pytest.mark.slow
def test_the_readme_adds_a_method_in_30_lines(tmp_path, monkeypatch, capsys):
    """Its code in the current folder, its commands as they stand there: the first by the console script, the second here."""
    text = (ROOT / "README.md").read_text().split("## A new method in 30 lines")[1].split("\n## ")[0]
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 30
    (tmp_path / "my_method.py").write_text(code)
    commands = re.findall(r"`learnevict ([^`]*my_method[^`]*)`", text)
    assert [command.split()[0] for command in commands] == ["infer", "eval"]
    more = {"infer": "-n 8 --json", "eval": "--families recall --samples 2 --no-free --json"}
    first, second = (f"{command} {more[command.split()[0]]} --device cpu".split() for command in commands)
    script = Path(sys.executable).with_name("learnevict")
    done = subprocess.run([script, *first], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_method", raising=False)  # that of another test in this process
    assert main(second) == 0
    for said in (done.stdout, capsys.readouterr().out):
        assert "long_values" in said or "my_method" in said


@pytest.mark.slow
def test_the_source_distribution_holds_what_the_readme_names(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"scripts/demo", "scripts/test", "benchmarks/decode.py", "docs/log.md", "recipes/demo.py"} <= held


# --- recipes ---


def test_a_program_tells_in_one_line_and_says_how_to_go_on(capsys, monkeypatch):
    for error, code, line in (
        (KeyboardInterrupt(), 130, "interrupted; give the command again"),
        (DataError("no\n  text"), 1, "error: no text"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'"),
        (UsageError("what?"), 2, "error: what?"),
        (KeyError("a\nb"), 1, "error: KeyError: 'a\\nb'; for the traceback run it again with LEARNEVICT_DEBUG=1"),
    ):
        with pytest.raises(SystemExit) as caught, told_in_one_line("give the command again"):
            raise error
        assert (caught.value.code, capsys.readouterr().err) == (code, line + "\n")
    monkeypatch.setenv("LEARNEVICT_DEBUG", "1")
    for error in (DataError("no text"), KeyError("a")):
        with pytest.raises(type(error)), told_in_one_line("give the command again"):
            raise error


def test_every_recipe_runs_under_the_same_guard():
    for path in (ROOT / "recipes").glob("*.py"):
        assert "\n    with told_in_one_line(" in path.read_text(), path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("evaluate", "--stage", "nope"), 2, "no stage nope; choose all, tune, main"),
        (("evaluate", "--families", "sudoku"), 2, "no such task family: sudoku"),
        (("distill", "--method", "lexical", "--smoke"), 2, "tables are fitted with recipes/tables.py"),
        (("oracle", "--data", "./nowhere.txt"), 1, "cannot read"),
    ],
)
def test_a_mistake_with_a_recipe_is_told(words, code, message):
    recipe, *flags = words
    done = run_recipe(f"recipes/{recipe}.py", *flags)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in done.stderr


@pytest.mark.slow
def test_a_recipe_is_interrupted_without_a_traceback(tmp_path):
    command = [sys.executable, "recipes/oracle.py", "--out", tmp_path / "labels"]
    prepare = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=prepare)
    while running.poll() is None and not (tmp_path / "labels" / "manifest.json").exists():
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    assert "Traceback" not in err
    assert "run the same command again" in err


@pytest.mark.slow
def test_the_demo_trains_anew_when_asked_for_something_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    demo = importlib.import_module("demo")
    base = weight_hash(testbed.load()[0])

    def learn(documents: int, steps: int) -> tuple[int, dict]:
        folder = demo.learn(tmp_path, base, documents, steps)
        return (folder / "model.safetensors").stat().st_mtime_ns, json.loads((folder / "run.json").read_text())

    first, record = learn(8, 1)
    assert (record["max_steps"], record["base_hash"]) == (1, base)
    assert learn(8, 1)[0] == first
    second, record = learn(8, 2)
    assert (record["max_steps"], second > first) == (2, True)
    third, record = learn(10, 2)
    assert third > second
    assert record["config"]["labels"].endswith(f"labels-10-{base[:8]}")


def test_debug_shows_where(learnevict):
    code, _, err = learnevict("infer", "--model", "./nowhere", "--prompt", WORDS, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "ModelError" in err


# --- generation ---


def test_a_row_keeps_its_own_trace_in_a_batch(folder):
    model, tokenizer = load(str(folder))
    policy = methods.h2o.policy(40, slack=16, recent=8)
    prompts = [testbed.generate(family, 0).prompt for family in ("recall", "program")]
    together = generate(model, tokenizer, policy, prompts, batch_size=2, record=True, max_new_tokens=20)
    for prompt, one in zip(prompts, together, strict=True):
        (alone,) = generate(model, tokenizer, policy, [prompt], record=True, max_new_tokens=20)
        assert one.tokens == alone.tokens
        assert one.trace.evictions > 0
        assert one.trace.expiry.shape[-1] == len(one.prompt) + len(one.tokens) - 1
        assert torch.equal(one.trace.expiry, alone.trace.expiry)


def test_sampling_follows_its_seed_and_leaves_the_callers_alone(folder):
    model, tokenizer = load(str(folder))

    def draw(seed: int) -> str:
        return generate(model, tokenizer, None, [WORDS], temperature=1.0, seed=seed, max_new_tokens=12)[0].text

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("budget", ["48", "25%", "32KiB"])
def test_the_calculator_agrees_with_real_storage(folder, budget):
    model, tokenizer = load(str(folder))
    slots = Budget.parse(budget)
    policy = methods.streaming_llm.policy(slots, slack=16, recent=8)
    prompt = testbed.generate("recall", 0).prompt
    length = len(read_text(tokenizer, prompt)) + 23
    reckoned = estimate(load_config(str(folder)), slots, tokens=length, schedule=Schedule(16), guard=Guard())
    (run,) = generate(model, tokenizer, policy, [prompt], max_new_tokens=24)
    assert reckoned.full == run.kv_bytes_full
    assert reckoned.budget == run.budget
    assert run.kv_bytes <= reckoned.evicted if budget == "25%" else run.kv_bytes_peak == reckoned.evicted
    assert reckoned.parameters == sum(parameter.numel() for parameter in model.parameters())


# --- viz ---


class Elements(HTMLParser):
    """Elements of a page with their attributes, and the text inside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.found.append((f"/{tag}", {}))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += data


def check_page(text: str) -> dict:
    """The data of a page, after a look at its safety."""
    elements = Elements(text)
    assert [tag for tag, _ in elements.found if tag == "script"] == ["script", "script"]
    assert not any({"src", "href", "onload", "onerror"} & set(attributes) for _, attributes in elements.found)
    assert "http" not in text.replace("http-equiv", "")
    data, script = elements.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "innerHTML" not in script
    return json.loads(data)


def test_viz_shows_what_was_kept(learnevict, tmp_path):
    out = tmp_path / "h2o.html"
    words = (
        "viz",
        "--model",
        "MODEL",
        "--task",
        "recall",
        "--seed",
        1,
        "--method",
        "h2o",
        "--budget",
        48,
        "--out",
        out,
    )
    code, _, err = learnevict(*words)
    assert code == 0, err
    data = check_page(out.read_text(encoding="utf-8"))
    sample = testbed.generate("recall", 1)
    assert "".join(data["tokens"]) == sample.text
    ends = torch.frombuffer(bytearray(base64.b64decode(data["expiry"])), dtype=torch.int32).view(2, 2, -1)
    length = len(sample.text.split())
    assert ends.shape[-1] == length
    held = (ends == -1) | (ends > length - 1)
    assert held.sum(-1).eq(48 + length % 16).all()


def test_viz_of_an_answer_and_of_golden(learnevict, tmp_path):
    out = tmp_path / "page.html"
    words = ("viz", "--model", "MODEL", "--budget", 48, "--out", out)
    assert learnevict(*words, "--prompt", WORDS, "--method", "tova", "-n", 60)[0] == 0
    assert len(check_page(out.read_text(encoding="utf-8"))["tokens"]) == len(WORDS.split()) + 4 + 59
    assert learnevict(*words, "--task", "program", "--method", "golden")[0] == 0
    assert "golden" in check_page(out.read_text(encoding="utf-8"))["title"]


def test_a_page_stays_inert_whatever_the_text_says():
    tokens = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;", "\u2028", "@DATA@", "'\"`"]
    expiry = torch.full((1, 1, 1, len(tokens)), NEVER, dtype=torch.int32)
    data = check_page(page(Trace(expiry), tokens, "<b>title</b>", "</script>"))
    assert data["tokens"] == [printable(token) for token in tokens]
    assert data["title"] == "<b>title</b>"


# --- doctor and demo ---


def test_doctor(learnevict):
    code, out, _ = learnevict("doctor", "--json", "--model", "MODEL", "--budget", 512, "--context", 4096, "--batch", 2)
    found = json.loads(out)
    assert (code, found["problems"]) == (0, [])
    assert found["versions"]["torch"] == torch.__version__
    assert found["memory"]["full"] == 2 * 4096 * (2 * 2 * 2 * 16 * 4)
    assert found["memory"]["evicted"] == 2 * (512 + 128) * (2 * 2 * 2 * 16 * 4)
    code, out, _ = learnevict("doctor", "--model", "MODEL")
    assert "evicting" in out
    assert "Everything that learnevict needs is here." in out


def test_demo(learnevict):
    code, out, err = learnevict("demo", "--json")
    if not (GATES_FOLDER / "testbed-foresightkv").is_dir():
        assert (code, len(err.splitlines())) == (1, 1)
        return
    assert code == 0, err
    full, window, learned = json.loads(out)
    assert (full["method"], window["method"], learned["method"]) == ("full", "streaming_llm", "foresightkv")
    assert all(full["correct"].values())
    assert sum(learned["correct"].values()) > sum(window["correct"].values())
    assert learned["kept"] <= 64


def test_a_profile_is_what_allocation_takes(learnevict, tmp_path):
    """Shares of heads are found from a text, and a method that is given them holds them; nothing else is overwritten."""
    words = " ".join(testbed.generate("recall", seed).text for seed in range(3))
    (tmp_path / "text.txt").write_text(words)
    out = tmp_path / "shares.json"
    code, said, err = learnevict(
        "profile", tmp_path / "text.txt", "--model", "MODEL", "--texts", 2, "--length", 64, "--out", out
    )
    assert code == 0 and str(out) in said and "most slots go to layers" in err
    shares = json.loads(out.read_text())
    assert sum(map(sum, shares["layers"])) == pytest.approx(1, abs=1e-6)
    record = infer(learnevict, "--task", "recall", "--method", "keydiff", "--budget", 48, "--allocation", out)
    assert record["kept"]["min"] < 48 < record["kept"]["max"]
    assert learnevict("profile", tmp_path / "text.txt", "--model", "MODEL", "--out", tmp_path / "text.txt")[0] == 1
    samples = [testbed.generate("recall", seed) for seed in range(2)]
    rows = [json.dumps({"prompt": one.prompt, "completion": one.response}) + "\n" for one in samples]
    (tmp_path / "chats.jsonl").write_text("".join(rows))
    assert learnevict("profile", tmp_path / "chats.jsonl", "--model", "MODEL", "--out", tmp_path / "asked.json")[0] == 0
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked["made"]["target"] == "future" and asked["made"]["texts"] == 2
