"""A Hub on the loopback: enough of its protocol for the real client, with commits, branches, tokens and mishaps.

Requests and answers follow what huggingface_hub sends and reads (tests/hub_protocol.py). A mishap is
armed with `fail` and strikes the next requests that match:

    status   an answer with this code
    drop     the connection is closed after half of what the client sends, or of what a GET gets
    lose     the request is carried out, and the connection closed without an answer
    swap     a GET gets other bytes, as many as were announced
    swell    a GET gets three times as many
    trickle  a GET gets 20 bytes a second
    dawdle   a GET gets 20 bytes of an endless header a second
    hold     half of the body of a PUT is read, `held` is set, and nothing more happens until the client is gone
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from http.server import ThreadingHTTPServer

from tests.hub_protocol import Handler
from tests.hub_state import Mishap, Repository


class Hub:
    """The server and its state; used as a context manager it serves."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.mishaps: list[Mishap] = []
        self.connections: set[socket.socket] = set()
        self.held, self.never = threading.Event(), threading.Event()
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Hub:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Serve, on the port of before if there was one."""
        handler = type("Bound", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def down(self) -> None:
        """Nobody listens any more."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for connection in [*self.connections]:
            with contextlib.suppress(OSError):  # it has gone already
                connection.shutdown(socket.SHUT_RDWR)

    def fail(self, method: str, path: str, kind: str, *, times: int = 1, status: int = 0) -> None:
        self.mishaps.append(Mishap(method, path, kind, times, status))

    def mishap(self, method: str, path: str) -> Mishap | None:
        for one in self.mishaps:
            if one.times and one.method == method and re.search(one.path, path):
                one.times -= 1
                return one
        return None

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.find(revision)]
