"""What a Hub of tests/hub_server.py answers to each request of huggingface_hub; large files are the *.safetensors."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from tests.hub_state import OWNER, TOKENS, Mishap, Repository

if TYPE_CHECKING:
    from tests.hub_server import Hub


class Gone(Exception):
    """The connection is to be closed without an answer."""


class Refused(Exception):
    """The answer has been given; the connection stays, for a client that reuses it must not find it closed."""


class Handler(BaseHTTPRequestHandler):
    """One request: who asks, what for, and the answer."""

    hub: Hub
    kind = ""
    """Of the mishap that strikes the answer to a GET."""
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/large/([0-9a-f]+)", "put"),
        ("POST", r"/verify", "verify"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def handle_request(self) -> None:
        path = urlparse(self.path).path
        self.hub.requests.append((self.command, path))
        mishap = self.hub.mishap(self.command, path)
        self.kind = mishap.kind if mishap is not None and self.command == "GET" else ""
        try:
            body = self.read(mishap)
            if mishap is not None and mishap.kind == "status":
                self.answer({"error": "a mishap"}, mishap.status)
                return
            for method, pattern, name in self.ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    if mishap is not None and mishap.kind == "lose":
                        self.answer = lambda *_, **__: None  # carried out, and nobody is told
                    getattr(self, name)(*(part and unquote(part) for part in match.groups()), body=body)
                    if mishap is not None and self.kind != "swap":
                        raise Gone
                    return
            self.refuse(404, "EntryNotFound")
        except Refused:
            pass
        except (Gone, ConnectionError):
            self.close_connection = True

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *_: object) -> None:
        pass

    def read(self, mishap: Mishap | None) -> bytes:
        """The body of the request, or as much of it as the mishap lets through."""
        length = int(self.headers.get("Content-Length") or 0)
        if mishap is None or mishap.kind in ("status", "lose") or self.kind:
            return self.chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        self.rfile.read(length // 2)
        if mishap.kind == "hold":
            self.hub.held.set()
            while self.rfile.read1(2**16):
                pass
        raise Gone

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, content: object = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.kind == "dawdle":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not self.hub.never.wait(0.05):
                self.wfile.write(b"-")
        if self.kind in ("swap", "swell"):
            body = body[::-1] * (1 if self.kind == "swap" else 3)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.kind == "trickle":
            for place in range(len(body)):
                self.wfile.write(body[place : place + 1])
                self.hub.never.wait(0.05)
        self.wfile.write(body[: len(body) // 2] if self.kind == "drop" else body)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self.answer({"error": message or code}, status, headers | ({"X-Error-Message": message} if message else {}))

    def rights(self) -> str | None:
        """write, read, or None for nobody; a token that nobody has is refused."""
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if sent and sent not in TOKENS:
            self.refuse(401, message="Invalid credentials in Authorization header")
            raise Refused
        return TOKENS.get(sent)

    def repository(self, repo_id: str, *, write: bool = False) -> Repository:
        """The repository, if whoever asks may see it, or write to it."""
        found, rights = self.hub.repositories.get(repo_id), self.rights()
        if found is None or (found.private and rights != "write"):
            self.refuse(404 if rights else 401, "RepoNotFound", "Repository not found")
            raise Refused
        if write and rights != "write":
            self.refuse(403 if rights else 401, message="You don't have the required permissions")
            raise Refused
        return found

    def at(self, repo_id: str, revision: str | None) -> tuple[Repository, str]:
        repository = self.repository(repo_id)
        oid = repository.find(revision or "main")
        if oid is None:
            self.refuse(404, "RevisionNotFound")
            raise Refused
        return repository, oid

    def create(self, *, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or OWNER}/{asked['name']}"
        if self.rights() != "write":
            self.refuse(403, message="You don't have the rights to create a model under this namespace")
            return
        content = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repositories:
            self.answer({**content, "error": "You already created this model repo"}, 409)
            return
        made = Repository(asked.get("visibility") == "private" or asked.get("private") is True)
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.hub.repositories[repo_id] = made
        self.answer(content)

    def whoami(self, *, body: bytes) -> None:
        if self.rights() is None:
            self.refuse(401, message="Invalid username or password.")
        else:
            self.answer({"type": "user", "name": OWNER, "orgs": []})

    def validate(self, *, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [] if re.match(r"---\n[\s\S]*?\n---\n", content) else [{"message": "no metadata"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, repo_id: str, revision: str | None, *, body: bytes) -> None:
        repository, oid = self.at(repo_id, revision)
        files = repository.commits[oid]
        license = re.search(rb"^license: (\S+)$", files.get("README.md", b""), re.MULTILINE)
        data = {"cardData": {"license": license[1].decode()}} if license else {}
        siblings = [{"rfilename": name} for name in sorted(files)]
        if "blobs=" in self.path.lower():
            siblings = [described(name, files[name]) for name in sorted(files)]
        self.answer({"id": repo_id, "sha": oid, "private": repository.private, "siblings": siblings, **data})

    def tree(self, repo_id: str, revision: str, *, body: bytes) -> None:
        repository, oid = self.at(repo_id, revision)
        listed = []
        for name, content in sorted(repository.commits[oid].items()):
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
            large = {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 130}}
            listed.append(entry | (large if is_large(name) else {}))
        self.answer(listed)

    def branch(self, repo_id: str, name: str, *, body: bytes) -> None:
        repository = self.repository(repo_id, write=True)
        if name in repository.branches:
            self.refuse(409, message="Reference already exists")
            return
        repository.branches[name] = repository.branches["main"]
        self.answer({}, 201)

    def preupload(self, repo_id: str, revision: str, *, body: bytes) -> None:
        self.repository(repo_id, write=True)
        repository, oid = self.at(repo_id, revision)
        have, told = repository.commits[oid], []
        for asked in json.loads(body)["files"]:
            name, mode = asked["path"], "lfs" if is_large(asked["path"]) else "regular"
            same = None if name not in have else (sha256 if mode == "lfs" else git_oid)(have[name])
            told.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": same})
        self.answer({"files": told})

    def batch(self, repo_id: str, *, body: bytes) -> None:
        self.repository(repo_id, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            upload = {"href": f"{self.hub.url}/large/{oid}", "header": {}}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify", "header": {}}}
            objects.append({"oid": oid, "size": size} | ({} if oid in self.hub.large else {"actions": actions}))
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str, *, body: bytes) -> None:
        if sha256(body) != oid:
            self.refuse(400, message="what arrived is not what was announced")
            return
        self.hub.large[oid] = body
        self.answer(b"")

    def verify(self, *, body: bytes) -> None:
        asked = json.loads(body)
        have = self.hub.large.get(asked["oid"])
        self.answer({}, 200 if have is not None and len(have) == asked["size"] else 404)

    def commit(self, repo_id: str, revision: str, *, body: bytes) -> None:
        repository = self.repository(repo_id, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        files, message = dict(repository.commits[repository.branches[revision]]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.large[value["oid"]]
        oid = repository.commit(revision, files, message)
        self.answer({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True})

    def resolve(self, repo_id: str, revision: str, name: str, *, body: bytes) -> None:
        repository, oid = self.at(repo_id, revision)
        content = repository.commits[oid].get(name)
        if content is None:
            self.refuse(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": oid, "ETag": f'"{git_oid(content)}"'}
        if is_large(name):
            headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        self.answer(content, 200, headers)


def described(name: str, content: bytes) -> dict[str, Any]:
    """What the Hub says of a file if asked for `blobs`."""
    found = {"rfilename": name, "size": len(content), "blobId": git_oid(content)}
    large = {"lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 130}}
    return found | (large if is_large(name) else {})


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
