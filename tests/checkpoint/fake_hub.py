"""Just enough of the Hugging Face hub, over HTTP on this machine, to download a repository from."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Repository id -> the HTTP status and error code that the hub answers with.
REFUSED = {"org/gated": (403, "GatedRepo"), "org/broken": (500, "")}


def list_files(folder: Path) -> list[dict[str, object]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]


class Hub(BaseHTTPRequestHandler):
    repositories: ClassVar[dict[str, Path]] = {}
    requested: ClassVar[list[str]] = []
    ranges: ClassVar[list[tuple[str, str, str]]] = []  # file, range, authorization

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        parts = parts[2:] if parts[:2] == ["api", "models"] else parts
        repository, rest = "/".join(parts[:2]), parts[2:]
        folder = self.repositories.get(repository)
        if repository in REFUSED:
            self.refuse(*REFUSED[repository])
        elif folder is None:
            self.refuse(404, "RepoNotFound")
        elif rest[:1] == ["resolve"]:
            self.send_file(folder, "/".join(rest[2:]), with_body)
        else:
            answer = list_files(folder) if rest[:1] == ["tree"] else {"id": repository, "sha": COMMIT}
            self.send(json.dumps(answer).encode(), "application/json", with_body)

    def send_file(self, folder: Path, name: str, with_body: bool) -> None:
        if not (folder / name).is_file():
            self.refuse(404, "EntryNotFound")
            return
        if with_body:
            self.requested.append(name)
            self.ranges.append((name, self.headers.get("Range", ""), self.headers.get("Authorization", "")))
        self.send((folder / name).read_bytes(), "application/octet-stream", with_body)

    def send(self, body: bytes, kind: str, with_body: bool) -> None:
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            begin, size = int(span[1]), len(body)
            body = body[begin : int(span[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(body) - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", etag)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"refused: {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def fake_hub(repositories: dict[str, Path]) -> Iterator[str]:
    """Serve `repositories` (id -> folder) for the length of the block; gives the endpoint's URL."""
    Hub.repositories, Hub.requested, Hub.ranges = repositories, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
