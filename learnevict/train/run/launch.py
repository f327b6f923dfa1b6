"""How processes were launched, and whether that is what was asked for.

accelerate and torchrun fall back without a word: to one process, each training by itself; from ZeRO or FSDP to plain
data-parallel training on a CPU. Here that is an error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from learnevict.errors import UsageError


def find_tools() -> None:
    """Makes programs beside this interpreter be found, and tells DeepSpeed that it runs on CPUs where it does.

    DeepSpeed compiles a part of itself with ninja when processes first meet. To be called before anything of it is loaded.
    """
    folder = str(Path(sys.executable).parent)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PATH")])])
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def launch_defaults() -> dict[str, Any]:
    """Returns TrainingArguments with which processes on CPUs meet over gloo, which accelerate does not pass on; else none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.accelerator.is_available():
        return {}
    return {"ddp_backend": "gloo"} if _asked("ACCELERATE_USE_DEEPSPEED") else {"use_cpu": True}


def check_launch(training: TrainingArguments) -> None:
    """Compares what was launched with what accelerate made of it.

    Raises:
        UsageError: processes that would train by themselves, or DeepSpeed or FSDP that would be left out.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and training.world_size == 1:
        raise UsageError(
            f"{launched} processes were launched, but each would train by itself; launch them with a file of recipes/accelerate"
        )
    state = training.distributed_state
    found = DistributedType.NO if state is None else state.distributed_type
    if (training.deepspeed or _asked("ACCELERATE_USE_DEEPSPEED")) and found != DistributedType.DEEPSPEED:
        raise UsageError(
            "DeepSpeed was asked for, but would be left out; drop --use_cpu, and launch with a file of recipes/accelerate"
        )
    if (training.fsdp or _asked("ACCELERATE_USE_FSDP")) and not torch.accelerator.is_available():
        raise UsageError(
            "FSDP was asked for, but without an accelerator it would be left out; use recipes/accelerate/ddp_cpu.yaml"
        )


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")
