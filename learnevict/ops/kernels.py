"""Who computes decode steps: Triton kernels or plain torch. The choice belongs to a cache; threads do not share it."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from learnevict.errors import KernelUnusedWarning, ModelError, UsageError

KernelChoice = Literal["auto", "on", "off"]
"""auto: on for tensors of a CUDA device if Triton is installed."""

CHOICE: ContextVar[KernelChoice] = ContextVar("learnevict_kernels", default="auto")
logger = logging.getLogger("learnevict")


@contextmanager
def using_kernels(choice: KernelChoice) -> Generator[None]:
    """Makes `choice` that of caches which are made inside without one of their own, in this thread.

    Raises:
        UsageError: it is none of auto, on, off.
        ModelError: "on", but no kernel can run here.
    """
    check_choice(choice)
    token = CHOICE.set(choice)
    try:
        yield
    finally:
        CHOICE.reset(token)


def check_choice(choice: str) -> None:
    """Raises UsageError for an unknown choice, ModelError for "on" where no kernel can run."""
    if choice not in get_args(KernelChoice):
        raise UsageError(f"kernels={choice!r} is none of auto, on, off")
    if choice == "on" and (reason := missing()) is not None:
        raise ModelError(f"kernels cannot be on: {reason}")


def interpreted() -> bool:
    """Returns whether Triton's interpreter runs kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Returns why no kernel can run on this machine, and what to do; None if they can."""
    if find_spec("triton") is None or find_spec("learnevict_kernels") is None:
        return "Triton is not installed; pip install 'learnevict[gpu]'"
    if not interpreted() and not torch.cuda.is_available():
        return "they need a CUDA device; plain torch is the path to use on others (TRITON_INTERPRET=1 is for tests)"
    return None


def refused_by(device: torch.device) -> str | None:
    """Returns why kernels do not run on tensors of this device; None if they do."""
    wanted = "cpu" if interpreted() else "cuda"
    return missing() if device.type == wanted else f"kernels run on {wanted} tensors here, not on {device.type}"


def default() -> tuple[bool, str]:
    """Returns whether kernels are on where nothing is said, and why."""
    reason = missing()
    if reason is None and interpreted():
        reason = "TRITON_INTERPRET=1 runs them on the CPU, where auto leaves them off"
    return reason is None, reason or "there are a CUDA device and Triton"


class Kernels:
    """Which layers of one cache decode by kernels, and why others do not.

    Args:
        choice: None: what `using_kernels` says.
    """

    def __init__(self, choice: KernelChoice | None = None) -> None:
        self.choice: KernelChoice = CHOICE.get() if choice is None else choice
        check_choice(self.choice)
        self.refused: dict[str, set[int]] = {}
        self.said: set[str] = set()
        self.known: dict[str, str | None] = {}

    def check(self, devices: Iterable[torch.device]) -> None:
        """Raises ModelError if kernels are to be on and run on none of a model's devices."""
        reasons = [refused_by(device) for device in devices]
        if self.choice == "on" and reasons and all(reasons):
            raise ModelError(f"kernels cannot be on: {reasons[0]}; move the model, or leave kernels off")

    def wanted(self, device: torch.device) -> bool:
        """Returns whether layers on this device decode by kernels if they can."""
        if self.choice == "on":
            return True
        return self.choice == "auto" and device.type == "cuda" and self._refused_by(device) is None

    def serve(self, layer: int, device: torch.device, reason: str | None) -> bool:
        """Returns whether a layer's step goes to a kernel where one is wanted; `reason`: why none can serve it."""
        reason = reason or self._refused_by(device)
        if reason is None:
            load(device.type)
            return True
        self.refused.setdefault(reason, set()).add(layer)
        return False

    def _refused_by(self, device: torch.device) -> str | None:
        if device.type not in self.known:
            self.known[device.type] = refused_by(device)
        return self.known[device.type]

    def tell(self, num_layers: int) -> None:
        """Warns of layers that were refused, once for each reason."""
        for reason, layers in self.refused.items():
            if reason not in self.said:
                self.said.add(reason)
                warnings.warn(
                    f"decode steps of {len(layers)} of {num_layers} evicting layers run in plain torch although kernels are "
                    f"on: {reason}",
                    KernelUnusedWarning,
                    stacklevel=3,
                )


@cache
def load(device: str) -> None:
    """Imports the kernels and makes them the implementations for tensors of a device; once."""
    importlib.import_module("learnevict_kernels").register(device)
    logger.info("decode steps run through Triton kernels on %s tensors", device)
