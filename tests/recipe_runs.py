"""Recipes run as programs: inside this process, which has imported already what a new one would import for seconds, or two."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.cpp_extension import get_default_build_root
from transformers import Qwen3Config, Qwen3ForCausalLM

from learnevict import testbed
from learnevict.hub.run_record import read_record

ROOT = Path(__file__).resolve().parent.parent


def save_tiny_base(folder: Path) -> Path:
    """A random model of two layers that speaks the testbed's words, saved with its tokenizer."""
    tokenizer = testbed.build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_recipe(*words: str) -> subprocess.CompletedProcess[str]:
    """Does what `python WORDS` does at the root with one thread; the first word is a file like recipes/distill.py."""
    out, err, code, threads, environment = io.StringIO(), io.StringIO(), 0, torch.get_num_threads(), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("default")  # a program only prints them
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", list(words))
        patch.syspath_prepend(str(ROOT))
        torch.set_num_threads(1)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            torch.set_num_threads(threads)
            os.environ.clear()
            os.environ.update(environment)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


class ToBeKilled:
    """A recipe that runs in a fork of this process, which has imported all of it, until it is killed as by `kill -9`."""

    def __init__(self, *words: str) -> None:
        self.child = os.fork()
        if not self.child:
            try:
                run_recipe(*words)
            finally:
                os._exit(0)

    def kill_after(self, seen: Callable[[], bool]) -> None:
        """Kills it as soon as something is seen; fails if it ends before."""
        while not seen():
            time.sleep(0.005)
            assert os.waitpid(self.child, os.WNOHANG) == (0, 0), "it was done before it could be killed"
        os.kill(self.child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(self.child, 0)[1]) == signal.SIGKILL


def refuse_stale_locks() -> None:
    """Fails where a compile that was killed has left its lock, for which the next run would wait without a word.

    Whoever compiles holds the file open; what no process holds is named and not removed, for not all processes can be seen.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = {path.resolve() for path in root.rglob("lock")}
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*") if locks else ():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            held.add(link.readlink())
    if stale := sorted(str(path) for path in locks if path not in held and path.exists()):
        pytest.fail(
            f"{stale[0]} is left of a compile that was killed, and DeepSpeed would wait for it: remove that file"
        )


def launch(*commands: tuple[str, list[str]]) -> str:
    """Runs recipes to their end, one after another, by two processes, and returns what they said.

    A command is a file of recipes/accelerate and the words after it; one `accelerate launch` starts the processes for all.
    """
    refuse_stale_locks()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LEARNEVICT_DEBUG": "1"}
    configs = [str(ROOT / "recipes" / "accelerate" / f"{config}.yaml") for config, _ in commands]
    lines = [shlex.join([config, *words]) for config, (_, words) in zip(configs, commands, strict=True)]
    words = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", configs[0]]
    words += ["--main_process_port", "0", "tests/one_start.py", *lines]  # 0: any free port
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=400)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return said


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_same(one: Path, two: Path) -> None:
    """Bit-equal gates and the same figures."""
    assert_equal(*(load_file(folder / "model.safetensors") for folder in (one, two)))
    logs = [[drop_times(line) for line in read_record(folder)["log"]] for folder in (one, two)]
    assert logs[0] == logs[1]


def drop_times(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if not k.endswith(("_runtime", "_per_second", "total_flos"))}
