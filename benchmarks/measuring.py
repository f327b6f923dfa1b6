"""The model, the clock, the machine and the results file that all benchmarks share."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from learnevict.files import write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Shape:
    """The random Qwen3 that every benchmark runs: timings and bytes do not depend on what weights say."""

    hidden: int = 512
    layers: int = 8
    query_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 1536
    vocabulary: int = 1024

    def model(self, device: str, attention: str = "sdpa") -> PreTrainedModel:
        """Returns the model in float32, in eval mode; the same weights at every call."""
        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=65536,
            use_sliding_window=False,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        return model.to(device).eval().requires_grad_(False)

    def tokens(self, count: int, device: str, seed: int = 0) -> Tensor:
        """Returns random token ids, int64 [1, count]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocabulary, (1, count), generator=generator).to(device)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot's key and value in one head of every layer, float32."""
        return self.layers * 2 * self.head_dim * 4


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, cache: Any, chunk: int) -> None:
    """Feeds ids [1, T] to the model, `chunk` tokens a forward: chunked prefill."""
    for part in ids.split(chunk, dim=1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)


def synchronize(device: str) -> None:
    """Waits for the card; there is nothing to wait for on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(function: Callable[[], object], device: str) -> tuple[float, float]:
    """Returns seconds by the wall clock and by the process clock (all threads; what a busy machine does not distort)."""
    synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


class Watermark:
    """Peak memory since the start: resident set of this process, or bytes allocated on the card.

    Inputs made before are excluded, outputs are included.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from what is resident now
            self.start = self._status("VmRSS")

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024

    @property
    def peak(self) -> int:
        """Bytes above the start at the highest."""
        if self.cuda:
            torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")) - self.start

    @property
    def now(self) -> int:
        """Bytes above the start now."""
        return (torch.cuda.memory_allocated() if self.cuda else self._status("VmRSS")) - self.start


def quartiles(values: Sequence[float], digits: int = 6) -> dict[str, float]:
    """Returns median, quartiles and number of values."""
    if len(values) < 2:
        only = round(values[0], digits)
        return {"median": only, "q1": only, "q3": only, "n": len(values)}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, digits), "q1": round(q1, digits), "q3": round(q3, digits), "n": len(values)}


def commit() -> str:
    """Returns the checkout's short hash, "-dirty" if its code has changed; LEARNEVICT_COMMIT wins; "unknown" without git."""
    if "LEARNEVICT_COMMIT" in os.environ:
        return os.environ["LEARNEVICT_COMMIT"]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        state = subprocess.run(
            ["git", "status", "--porcelain", "--", "learnevict", "kernels", "benchmarks/*.py"],  # what changes figures
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


def machine(device: str) -> dict[str, Any]:
    """Returns what the figures were measured on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class Results:
    """A results file, rewritten whole at every save, so that an interrupted run keeps what it has."""

    def __init__(self, name: str, options: argparse.Namespace, config: Any) -> None:
        self.path: Path = options.out or RESULTS / f"{name}.json"
        self.content: dict[str, Any] = {
            "benchmark": name,
            "commit": commit(),
            "smoke": options.smoke,
            "finished": False,
            "machine": machine(options.device),
            "config": asdict(config),
            "rows": [],
            "goals": [],
        }

    def save(self, **parts: Any) -> None:
        """Replaces parts of the content and writes the file."""
        self.content |= parts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, json.dumps(self.content, indent=1) + "\n", b'"smoke": ')

    def finish(self, console: Console) -> None:
        """Marks the file complete, prints the goals and where the figures are."""
        self.save(finished=True)
        if self.content["goals"]:
            console.print(goal_table(self.content["goals"]))
        console.print(f"{self.path}  (commit {self.content['commit']})", soft_wrap=True)


def goal(name: str, measured: float, limit: float) -> dict[str, Any]:
    """Returns one line of the goals table: `measured` is to be at most `limit`."""
    return {"goal": name, "measured": round(measured, 4), "at_most": limit, "met": measured <= limit}


def goal_table(goals: list[dict[str, Any]]) -> Table:
    """Returns goals, what was measured, and whether that meets them."""
    rows = [[g["goal"], f"{g['measured']:.3f}", f"{g['at_most']:.3f}", "yes" if g["met"] else "MISSED"] for g in goals]
    return table("goals", ["goal", "measured", "at most", "met"], rows)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table for the terminal; the first column is text, the others figures."""
    out = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        out.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns the options that every benchmark takes."""
    out = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    out.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    out.add_argument(
        "--smoke", action="store_true", help="seconds instead of minutes: the same code, no figures of worth"
    )
    out.add_argument("--out", type=Path, help="results file (default benchmarks/results/NAME.json)")
    out.add_argument("--threads", type=int, default=1, help="torch threads on the CPU (default 1)")
    return out


def begin(options: argparse.Namespace) -> None:
    """Applies the common options; a card that is not there is an error, not a fallback."""
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {options.device}: torch sees no CUDA device here; use --device cpu", file=sys.stderr)
        sys.exit(2)
    if options.smoke and options.out is None:
        options.out = ROOT / "runs" / "benchmarks" / f"{Path(sys.argv[0]).stem}-smoke.json"
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a forked process, so that its memory is its own, and returns what it returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()
