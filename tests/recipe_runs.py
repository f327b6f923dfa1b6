"""Recipes run as programs inside this process, which has imported already what a new one would import for seconds."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

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
