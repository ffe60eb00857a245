"""A small Hugging Face hub that serves data sets over HTTP: what the libraries ask for to stream or download one."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class DataSetHub:
    address: str
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Files by name, of each commit of each data set; the last commit is main."""
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    sent_bytes: int = 0

    def push(self, name: str, files: dict[str, bytes]) -> str:
        """A new commit; its hash."""
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        self.commits.setdefault(name, {})[commit] = files
        return commit


@contextmanager
def running_data_set_hub() -> Iterator[DataSetHub]:
    """A hub on a free port of this host."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = DataSetHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
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
        wanted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.hub.requests.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        resolve = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api is None and resolve is None:
            return self._refuse(404, "EntryNotFound")
        name, revision = (api[1], api[3]) if api is not None else (resolve[1], resolve[2])
        commits = self.server.hub.commits.get(name)
        if commits is None:
            return self._refuse(401, "RepoNotFound")
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            return self._refuse(404, "RevisionNotFound")
        if resolve is not None:
            return self._resolve(name, commit, resolve[3])
        files = commits[commit]
        if api[4]:
            return self._refuse(404, "EntryNotFound")  # all files are at the top
        if api[2] == "tree":
            return self._send(200, json.dumps([_listed(path, data) for path, data in files.items()]).encode())
        if api[2] == "paths-info":
            paths = re.findall(r"paths=([^&]+)", wanted.decode()) or json.loads(wanted or b"{}").get("paths", [])
            return self._send(200, json.dumps([_listed(path, files[path]) for path in map(unquote, paths) if path in files]).encode())
        siblings = [{"rfilename": path} for path in files]
        return self._send(200, json.dumps({"_id": "1", "id": name, "sha": commit, "siblings": siblings, "tags": []}).encode())

    def _resolve(self, name: str, commit: str, path: str) -> None:
        if name in self.server.hub.gated:
            return self._refuse(401, "GatedRepo")
        data = self.server.hub.commits[name][commit].get(path)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if data is None:
            return self._refuse(404, "EntryNotFound", headers)
        headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return self._send(200, data, headers)
        first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        return self._send(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.server.hub.sent_bytes += len(data)
            self.wfile.write(data)


def _listed(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
