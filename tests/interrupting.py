"""Ctrl-C in the middle of a run, as a person would press it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ctrl_c_after(path: Path, num_lines: int) -> Iterator[None]:
    """SIGINT for this process once the file has so many lines; it interrupts also where a background shell ignores it."""
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.003):
            if path.exists() and path.read_text().count("\n") >= num_lines:
                os.kill(os.getpid(), signal.SIGINT)
                return

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = threading.Thread(target=stop, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGINT, before)
