"""Runs recipes one after another, each in a fork: `accelerate launch` starts its processes, and they import, once for all.

An argument is a command line such as "recipes/distill.py --output_dir runs/a".
"""

from __future__ import annotations

import ctypes
import os
import runpy
import shlex
import signal
import socket
import sys
import traceback
from importlib import import_module

from torch.distributed import TCPStore

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


def run(command: str, number: int) -> int:
    """Returns the exit code of a recipe, run in a fork of this process."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the launcher ends its own children only
    code = 0
    try:
        meet_anew(number)
        sys.argv = shlex.split(command)
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
    for name in HEAVY + ("deepspeed",) * ("ACCELERATE_USE_DEEPSPEED" in os.environ):
        import_module(name)
    for number, command in enumerate(sys.argv[1:]):
        if code := run(command, number):
            sys.exit(code)
