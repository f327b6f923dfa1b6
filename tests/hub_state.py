"""What a Hub of tests/hub_server.py holds: repositories with commits and branches, accounts, and mishaps in waiting."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

TOKENS = {"hf_owner": "write", "hf_reader": "read"}
OWNER = "me"


@dataclass
class Repository:
    """Commits in order, each with all its files; branches by name."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        """The commit of a branch or commit."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Mishap:
    """What happens to the next `times` requests of this method whose path matches."""

    method: str
    path: str
    kind: str
    times: int = 1
    status: int = 0
