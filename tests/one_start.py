"""Runs recipes one after another, each in a fork: `accelerate launch` starts its processes, and they import, once for all.

An argument is a command line such as "recipes/accelerate/zero2.yaml recipes/distill.py --output_dir runs/a": the file with
which `accelerate launch` would start the recipe, and what its processes would then find in their environment.
"""

from __future__ import annotations

import ctypes
import gc
import os
import runpy
import shlex
import signal
import socket
import sys
import traceback
from importlib import import_module
from typing import Any

import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import TCPStore
from torch.nn.parallel import DistributedDataParallel

HEAVY = ("learnevict.train.distill", "learnevict.rl.trainer", "learnevict.train.run.setup")
PR_SET_PDEATHSIG = 1


def meet_anew(number: int) -> None:
    """Lets the processes of a recipe meet at a port of their own: at the launcher's they would find the last recipe's names."""
    shared = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if os.environ["RANK"] == "0":
        with socket.create_server(("127.0.0.1", 0)) as free:
            shared.set(f"port of recipe {number}", str(free.getsockname()[1]))
    os.environ |= {
        "MASTER_PORT": shared.get(f"port of recipe {number}").decode(),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def as_launched_by(config: str) -> None:
    """Gives this process the environment in which `accelerate launch --config_file CONFIG` would start as many."""
    found: dict[str, str] = {}

    def remember(given: Any) -> None:  # in place of starting processes
        assert int(given.nproc_per_node) == int(os.environ["WORLD_SIZE"]), config
        found.update(os.environ)

    torch.distributed.run.run = remember
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    launch_command(
        launch_command_parser().parse_args(["--config_file", config, "--main_process_port", "0", "recipe.py"])
    )
    os.environ |= {name: value for name, value in found.items() if name.startswith("ACCELERATE_")}


def check_leave() -> None:
    """Fails a recipe that destroys its group while DDP still holds it, which may then wait for ever."""
    destroy = torch.distributed.destroy_process_group

    def checked(*given: Any) -> None:
        left = [type(one).__name__ for one in gc.get_objects() if isinstance(one, DistributedDataParallel)]
        assert not left, "DDP outlives its group"
        destroy(*given)

    torch.distributed.destroy_process_group = checked


def run(command: str, number: int) -> int:
    """Returns the exit code of a recipe, run in a fork of this process."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the launcher ends its own children only
    code = 0
    try:
        config, *sys.argv = shlex.split(command)
        as_launched_by(config)
        meet_anew(number)
        check_leave()
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - it is printed, and ends the launch
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    for name in HEAVY + ("deepspeed",) * any("zero" in command.split()[0] for command in sys.argv[1:]):
        import_module(name)
    for number, command in enumerate(sys.argv[1:]):
        if code := run(command, number):
            sys.exit(code)
