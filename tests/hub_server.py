"""A small Hugging Face hub over HTTP: the endpoints that huggingface_hub calls to make, fill, list and read a repository."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER, TOKEN = "alice", "hf_of_alice"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    """Of main."""
    older: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The files of earlier commits."""

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def at(self, revision: str | None) -> dict[str, bytes] | None:
        return self.files if revision in (None, "main", self.commit) else self.older.get(revision)


@dataclass
class Hub:
    address: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of this host. Alice may write alice/*; all may read what is public."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def log_message(self, *_: object) -> None:
        pass

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append(f"{self.command} {path}")
        body = self._body()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/([^/]+))?", path)
        if api is not None:
            return self._api(api[1], api[2], api[3], body)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if resolve is not None:
            return self._resolve(*resolve.groups())
        return self._answer(404, {"error": f"no such page: {path}"})

    def _create(self, wanted: dict) -> None:
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not self._knows_user():
            return self._answer(401, {"error": "Invalid username or password."})
        if not name.startswith(f"{USER}/"):
            return self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.server.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", "url": f"{self.server.hub.address}/{name}"})
        self.server.hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        return self._answer(200, {"url": f"{self.server.hub.address}/{name}", "name": name})

    def _api(self, name: str, action: str | None, revision: str | None, body: bytes) -> None:
        repository = self._readable(name)
        if repository is None:
            return None
        files, commit = repository.at(revision), repository.commit if revision in (None, "main") else revision
        if files is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if action in (None, "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            info = {"_id": "1", "id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
            return self._answer(200, info)
        if action == "tree":
            listed = [{"type": "file", "path": path, "size": len(data), "oid": _oid(data)} for path, data in files.items()]
            return self._answer(200, listed)
        if not (self._knows_user() and name.startswith(f"{USER}/")):
            return self._answer(403, {"error": "Forbidden"})
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self._answer(200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        repository.older[repository.commit] = dict(repository.files)
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        page = f"{self.server.hub.address}/{name}/commit/{repository.commit}"
        return self._answer(200, {"success": True, "commitUrl": page, "commitOid": repository.commit})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._readable(name)
        if repository is None:
            return None
        files, commit = repository.at(revision), repository.commit if revision == "main" else revision
        if files is None or path not in files:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = files[path]
        return self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{_oid(data)}"'})

    def _readable(self, name: str) -> Repository | None:
        repository = self.server.hub.repositories.get(name)
        if repository is None or (repository.private and not self._knows_user()):
            self._answer(401 if not self._knows_user() else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _knows_user(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
