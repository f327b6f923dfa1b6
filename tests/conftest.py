"""What every test runs under: shape checks on, no network, one thread per worker, skips accounted for."""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from hypothesis import settings

from tests import typecheck
from tests.reporting import LawMatrix, Recorder, SkipRule

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HOME", str(ROOT / ".pytest_cache" / "huggingface"))
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"WANDB_MODE": "disabled"}
if os.environ.get("LAWS_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported; the default leaves kernels off

# Before the first import of learnevict: from here on its annotations, shapes included, are checked at every call.
jaxtyping.install_import_hook("learnevict", f"{typecheck.__name__}.check")

settings.register_profile("learnevict", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("learnevict")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipRule(ROOT / "tests" / "allowed_skips.txt"), "skip-rule")
        config.pluginmanager.register(LawMatrix(), "law-matrix")


@pytest.fixture
def law_matrix(request: pytest.FixtureRequest) -> Recorder:
    """`law_matrix.record(law, method, model, evictions)` adds to the table printed at the end, if the test passes."""
    return Recorder(request.node)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Turns shape checks off: torch.compile cannot trace them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = "127.0.0.1" if address[0] == "localhost" else address[0]
            if not ipaddress.ip_address(host).is_loopback:
                raise ConnectionRefusedError(f"tests use no network; this one asked for {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="module")
def distill() -> Any:
    """The distilling program as a module."""
    return importlib.import_module("learnevict.train.distill")


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    """A Hub on the loopback."""
    from tests.hub_server import Hub

    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def client(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One process that imports everything once; it works in a folder of its own."""
    from tests.hub_client import Client

    running = Client(hub, tmp_path_factory.mktemp("client"))
    yield running
    running.close()
