"""Recipes run as programs: inside this process, which has imported already what a new one would import for seconds, or two."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import shlex
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_default_build_root

ROOT = Path(__file__).resolve().parent.parent


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


def launch(config: str, *commands: list[str]) -> str:
    """Runs recipes to their end, one after another, by the processes of one `accelerate launch`; returns what they said."""
    refuse_stale_locks()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LEARNEVICT_DEBUG": "1"}
    path = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    words = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(path)]
    words += ["--main_process_port", "0", "tests/one_start.py", *map(shlex.join, commands)]  # 0: any free port
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=400)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return said
