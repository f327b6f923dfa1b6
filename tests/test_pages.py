"""The tutorial and the notebook do what they say: their code runs as it stands, only fewer steps are trained."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from learnevict.cli import app
from tests.recipe_runs import run_recipe

pytestmark = pytest.mark.slow
DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    cells = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        assert cell.get("outputs", []) == [], "outputs are not kept: they would go stale"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    rights = dict(re.findall(r"(?m)^(\w+).*? +(\d+) of \d+ words right", capsys.readouterr().out))
    assert int(rights["foresightkv"]) > 2 * int(rights["streaming_llm"]), rights
    assert (tmp_path / "kept.html").exists()


def test_the_tutorial_runs(tmp_path, monkeypatch):
    """Its first block is a file; the others, Python and shell, are run in turn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8").replace("runs/", f"{tmp_path}/runs/")
    (_, method), *blocks = re.findall(r"```(python|bash)[^\n]*\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "linear_future.py").write_text(method, encoding="utf-8")
    ran = []
    try:
        for language, block in blocks:
            ran.append(language)
            if language == "python":
                exec(compile(block, "tutorial.md", "exec"), {})
                continue
            program, *words = shlex.split(block)
            if program == "python":
                done = run_recipe(*words, "--smoke", "--disable_tqdm", "true")
                assert done.returncode == 0, done.stderr
            else:
                answer = CliRunner().invoke(app, words)
                assert (program, answer.exit_code) == ("learnevict", 0), answer.output
    finally:
        sys.modules.pop("linear_future", None)
    assert ran == ["bash", "python", "bash"]
