"""A web server on this machine that knows byte ranges, and can be told to get them wrong."""

import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ETAG = '"first"'


@dataclass
class Site:
    """What a server has and how it behaves.

    `fault(name, n)` is asked at the n-th request (from 1) for a file, and names a fault of `Handler` or nothing.
    `requests` are the files and ranges that were asked for.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    fault: Callable[[str, int], str] = lambda name, n: ""
    etag: str = ETAG
    last_modified: str = ""
    elsewhere: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, folder: Path) -> "Site":
        self.files |= {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return self

    def note(self, name: str, headers: dict[str, str]) -> int:
        with self.lock:
            self.requests.append((name, headers.get("range", "")))
            self.headers.append(headers)
            return sum(1 for found, _ in self.requests if found == name)

    def num_bytes(self) -> int:
        """How many bytes of ranges were asked for."""
        spans = [re.fullmatch(r"bytes=(\d+)-(\d+)", text) for _, text in self.requests]
        return sum(int(span[2]) - int(span[1]) + 1 for span in spans if span)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        headers = {key.lower(): value for key, value in self.headers.items()}
        number = self.site.note(name, headers)
        fault = self.site.fault(name, number)
        data = self.site.files.get(name)
        if fault.isdigit():
            self.answer(int(fault), b"", {"Retry-After": "0"})
        elif fault == "redirect":
            self.answer(302, b"", {"Location": self.site.elsewhere + name})
        elif data is None:
            self.answer(404, b"no such file", {})
        else:
            self.send(data, headers, fault)

    def send(self, data: bytes, headers: dict[str, str], fault: str) -> None:
        etag = '"second"' if fault == "changed" else self.site.etag
        about = {"ETag": etag} if etag else {}
        if self.site.last_modified:
            about["Last-Modified"] = self.site.last_modified
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
        wanted = headers.get("if-range")
        if span is None or fault == "whole" or wanted not in (None, etag, self.site.last_modified):
            self.body(200, data, about, fault)
            return
        begin, end = int(span[1]), min(int(span[2]) + 1, len(data))
        if fault == "wrong range":
            begin, end = begin + 1, end + 1
        about["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        if fault == "other size":
            about["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data) + 1}"
        self.body(206, data[begin:end], about, fault)

    def body(self, status: int, data: bytes, about: dict[str, str], fault: str) -> None:
        if fault == "compressed":
            about["Content-Encoding"] = "gzip"
        if fault in ("truncated", "stalled"):
            self.head(status, {**about, "Content-Length": str(len(data))})
            self.write(data[: len(data) // 2])
            if fault == "stalled":
                self.site.ended.wait(20)
            self.close_connection = True
        elif fault in ("endless", "too much"):
            self.head(status, {**about, "Connection": "close"})
            self.write(data)
            while fault == "endless" and not self.site.ended.is_set() and self.write(bytes(1 << 20)):
                pass
            self.write(b"more")
            self.close_connection = True
        else:
            self.answer(status, data, about)

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.head(status, {**headers, "Content-Length": str(len(data))})
        self.write(data)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def write(self, data: bytes) -> bool:
        try:
            self.wfile.write(data)
        except OSError:
            self.close_connection = True
            return False
        return True

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no fault of the server."""


@contextmanager
def serve(site: Site, tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    """Serve `site` for the length of the block, at `site.url`."""
    handler = type("SiteHandler", (Handler,), {"site": site})
    server = Server(("127.0.0.1", 0), handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    site.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}/org/model/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
