"""Servers of this host that have a store: a web server that can be told to fail, with TLS or without, S3, and Google's storage."""

import os
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen


@dataclass
class Web:
    """A running web server and what it is told to do to a path, e.g. `/manifest.json`."""

    url: str
    requests: list[str] = field(default_factory=list)
    """Of GET, the paths."""
    failures: Counter[str] = field(default_factory=Counter)
    """How many of the next requests get a 503."""
    status: dict[str, int] = field(default_factory=dict)
    """What it always says instead of the file."""
    cut_short: set[str] = field(default_factory=set)
    """Half of the file comes, and the end of the connection."""
    off_by: dict[str, int] = field(default_factory=dict)
    """By how much the size that it tells beforehand is off."""
    encodings: set[str | None] = field(default_factory=set)
    """In which clients took files."""
    wordless: set[str] = field(default_factory=set)
    """It does not say how large the file is."""
    until: threading.Event | None = None
    """Half of every tar comes before it is set, the other half after."""


@contextmanager
def web(directory: Path, tls: ssl.SSLContext | None = None) -> Iterator[Web]:
    """The files of a directory, on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(directory)))
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.web = Web(f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.web
    finally:
        if server.web.until is not None:
            server.web.until.set()
        server.shutdown()
        server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def send_head(self):
        told, status = self.server.web, self.server.web.status.get(self.path)
        if self.command == "GET":
            told.requests.append(self.path)
            told.encodings.add(self.headers["Accept-Encoding"])
        if told.failures[self.path] > 0:
            told.failures[self.path] -= 1
            status = 503
        if status is not None:
            self.send_error(status)
            return None
        return super().send_head()

    def send_header(self, keyword, value):
        if keyword == "Content-Length" and self.path in self.server.web.wordless:
            return
        if keyword == "Content-Length" and self.command == "HEAD":
            value = str(int(value) + self.server.web.off_by.get(self.path, 0))
        super().send_header(keyword, value)

    def copyfile(self, source, outputfile):
        told, content = self.server.web, source.read()
        half = len(content) // 2
        outputfile.write(content[:half])
        outputfile.flush()
        if self.path in told.cut_short:
            return
        if told.until is not None and self.path.endswith(".tar"):
            told.until.wait()
        outputfile.write(content[half:])

    def log_message(self, *_):
        pass


@contextmanager
def s3(directory: Path, bucket: str) -> Iterator[dict[str, str]]:
    """The files of a directory in a bucket; the environment in which to read it."""
    command = [sys.executable, "-m", "moto.server", "-p", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            url = next(line.split()[-1] for line in process.stderr if "Running on http" in line)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            import boto3

            client = boto3.client(
                "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="somebody", aws_secret_access_key="secret"
            )
            client.create_bucket(Bucket=bucket)
            for path in files(directory):
                client.upload_file(str(path), bucket, path.relative_to(directory).as_posix())
            keys = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret"}
            yield {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", **keys}
        finally:
            process.kill()


@contextmanager
def google(directory: Path, bucket: str) -> Iterator[dict[str, str]]:
    """The files of a directory in a bucket; the environment in which to read it."""
    from gcp_storage_emulator.server import create_server

    with create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket) as server:
        while server._api._httpd is None:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server._api._httpd.server_port}"
        for path in files(directory):
            name = quote(path.relative_to(directory).as_posix(), safe="")
            where = f"{url}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}"
            with urlopen(Request(where, data=path.read_bytes(), method="POST", headers={"Content-Type": "application/x-tar"})):
                pass
        yield {"STORAGE_EMULATOR_HOST": url}


def files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def tls_of_this_host(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """For a server, and the certificate that its clients must trust."""
    import trustme

    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(os.fspath(folder / "authority.pem"))
    return context, folder / "authority.pem"
