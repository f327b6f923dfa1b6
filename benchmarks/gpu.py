"""Runs the laws on the card, then the benchmarks, in five minutes; called by scripts/gpu.

Parts run one after the other, each in a process of its own with a time box, so that one that crashes or runs late costs the
others nothing; what a part had saved by then is kept. Everything goes into one file named by card and commit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, ROOT, commit, machine

from learnevict.files import write


@dataclass(frozen=True)
class Part:
    """A benchmark program, its arguments, and the seconds it may take."""

    program: str
    arguments: tuple[str, ...]
    seconds: int


PARTS = {
    "laws": Part("laws.py", ("--seconds", "65"), 80),
    "labels": Part("labels.py", (), 30),
    "memory": Part("memory.py", (), 35),
    "decode": Part("decode.py", ("--repetitions", "4"), 90),
    "kernels": Part("decode.py", ("--repetitions", "3", "--kernels"), 60),
}
TOTAL = 295


def card(device: str) -> str:
    """Returns the device's name as part of a file name."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_part(part: Part, device: str, smoke: bool, seconds: float, out: Path) -> dict[str, Any]:
    """Runs one part and returns its own results file, as far as it got."""
    command = [sys.executable, str(ROOT / "benchmarks" / part.program), "--device", device, "--out", str(out)]
    out.unlink(missing_ok=True)
    started = time.perf_counter()
    try:
        done = subprocess.run([*command, *part.arguments, *["--smoke"] * smoke], cwd=ROOT, timeout=seconds, check=False)
        status = "ok" if done.returncode == 0 else f"failed with exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        status = f"cut off after {seconds:.0f} s"
    spent = round(time.perf_counter() - started, 1)
    result = json.loads(out.read_text()) if out.exists() else None
    out.unlink(missing_ok=True)
    return {"status": status, "seconds": spent, "result": result}


def chosen_parts(names: str) -> list[str]:
    """Returns the parts asked for, in the order they run."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in asked if name not in PARTS]
    if unknown or not asked:
        print(f"gpu: no part {', '.join(unknown) or '(none given)'}; choose from {','.join(PARTS)}", file=sys.stderr)
        sys.exit(2)
    return [name for name in PARTS if name in asked]


def main() -> None:
    """Runs the parts; exit code 1 if one of them failed."""
    options = argparse.ArgumentParser(
        prog="scripts/gpu", description="Laws and benchmarks on a CUDA card, in 5 minutes."
    )
    options.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    options.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the script itself")
    options.add_argument("--smoke", action="store_true", help="seconds a part: the same code, no figures of worth")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = options.parse_args()
    parts = chosen_parts(options.parts)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "gpu: torch sees no CUDA device; to try the script itself: scripts/gpu --device cpu --smoke",
            file=sys.stderr,
        )
        sys.exit(2)
    if not options.device.startswith("cuda"):
        parts = [name for name in parts if name != "kernels"]
    started, head = time.perf_counter(), commit()
    path = options.out / f"{card(options.device)}{'-smoke' * options.smoke}-{head}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"commit": head, "machine": machine(options.device), "smoke": options.smoke, "parts": {}}
    for name in parts:
        left = TOTAL - (time.perf_counter() - started)
        if left < 5 and not options.smoke:
            content["parts"][name] = {"status": "not started: no time left", "seconds": 0.0, "result": None}
        else:
            print(f"gpu: {name}", flush=True)
            box = 3600 if options.smoke else min(PARTS[name].seconds, left)
            content["parts"][name] = run_part(
                PARTS[name], options.device, options.smoke, box, path.with_suffix(f".{name}")
            )
        write(path, json.dumps(content, indent=1) + "\n", b'"smoke": ')
        print(f"gpu: {name}: {content['parts'][name]['status']}, {content['parts'][name]['seconds']} s", flush=True)
    print(f"gpu: {path} ({time.perf_counter() - started:.0f} s)")
    sys.exit(any(part["status"] != "ok" for part in content["parts"].values()))


if __name__ == "__main__":
    main()
