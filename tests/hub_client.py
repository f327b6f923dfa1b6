"""A process that talks to a Hub of tests/hub_server.py: huggingface_hub reads the Hub's address when it is imported.

`Client(hub, folder)` starts one. As a program it reads jobs from standard input, a JSON object a line, and answers each
with a line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.hub_server import Hub

ROOT = Path(__file__).resolve().parent.parent


class Client:
    """Runs command lines and code in a process of its own, one after the other.

    Args:
        hub: whom it talks to.
        folder: where it works, and keeps its cache.
    """

    def __init__(self, hub: Hub, folder: Path) -> None:
        settings = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "huggingface"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "60",
            "HF_HUB_ETAG_TIMEOUT": "60", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning:learnevict", "-m", "tests.hub_client"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=inherited | settings,
        )  # fmt: skip

    def send(self, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def __call__(self, *words: object, token: str | None = "hf_owner", **environment: str) -> tuple[int, str, str]:
        """Code, output and errors of `learnevict WORDS`."""
        self.send({"words": [str(word) for word in words], "environment": {"HF_TOKEN": token, **environment}})
        found = self.answer()
        return found["code"], found["out"], found["err"]

    def run(self, code: str, token: str | None = "hf_owner", **names: object) -> Any:
        """What `result` is after this code; `names` are given to it."""
        self.send({"run": code, "names": names, "environment": {"HF_TOKEN": token}})
        found = self.answer()
        assert "result" in found, found
        return found["result"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """A command line, or code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if "words" in job:
            from learnevict.cli import main

            code = main(job["words"])
            return {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        names = dict(job["names"])
        try:
            exec(job["run"], names)
        except Exception as error:  # noqa: BLE001 - the test shall see it, whatever it is
            return {"error": f"{type(error).__name__}: {error}", "err": err.getvalue()}
    return {"result": names.get("result"), "out": out.getvalue()}


class Hurried:
    """The clock of huggingface_hub, whose pauses between tries are a fiftieth as long."""

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / 50)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def listen() -> None:
    """Do jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    fetch, share, repo = (import_module(f"learnevict.hub.{name}") for name in ("download", "share", "repo"))
    vars(import_module("huggingface_hub.utils._http"))["time"] = Hurried()
    fetch.GRACE = 300.0
    repo.ANSWER, fetch.PATIENCE, share.PATIENCE = (
        300.0,
        60.0,
        60.0,
    )  # a busy machine may be slower than a person is patient
    for line in sys.stdin:
        job = json.loads(line)
        changed = {name: os.environ.get(name) for name in job["environment"]}
        for name, value in job["environment"].items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        answers.write(json.dumps(perform(job)) + "\n")
        answers.flush()
        for name, value in changed.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


if __name__ == "__main__":
    listen()
