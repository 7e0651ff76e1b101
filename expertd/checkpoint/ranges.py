"""Byte ranges of files on a web server, and its small files whole; whatever the server does, in bounded time.

What comes from a server is right or it is asked for again. A range is right when the status is 206, the
Content-Range is the one asked for, the file's validator (ETag, or else Last-Modified) and size are still what they
were when the file was opened, and all its bytes came. So a server that ignores `Range`, a proxy that compresses, a
connection that ends early or stands still, and a checkpoint that is replaced while it is read cannot put
wrong bytes in front of anybody. The first three are tried again, and go on where the last try ended; the
last one ends with an error at once, because no later try can mend it.

Redirects are followed by hand: the hub sends every range to a content network, with a signed URL that works for a
while. It is remembered, or each part would ask the hub again (which limits such requests), and forgotten when
it is refused. The token goes to the host that the user named and to no other; URLs with signatures appear in no
message.
"""

import email.utils
import functools
import ipaddress
import random
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from expertd.errors import CheckpointError

T = TypeVar("T")

MAX_SMALL_FILE_BYTES = 64 << 20
MAX_FILE_BYTES = 1 << 42
MAX_REDIRECTS = 8
# huggingface_hub's figure: 97 % of the headers of safetensors files on the hub fit into 100 kB.
FIRST_BYTES = 128 << 10
# A try that brought as much has not failed for nothing: the count of failures starts again.
PROGRESS_BYTES = 1 << 20
REDIRECTS = (301, 302, 303, 307, 308)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504, 520, 522, 524)
ENDED = "the download was ended. Start again: what came is kept."
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)


@dataclass(frozen=True)
class Limits:
    """How long a server is borne with. A try takes up to `try_s`, of which `silence_s` without a byte."""

    num_connections: int = 6
    connect_s: float = 10.0
    silence_s: float = 15.0
    try_s: float = 300.0
    num_tries: int = 6
    pause_s: float = 0.5
    longest_pause_s: float = 120.0


@dataclass(frozen=True)
class RemoteFile:
    """A file as it was when it was opened: `validator` is its ETag, or else its Last-Modified."""

    url: str
    size: int
    validator: str

    @property
    def if_range(self) -> dict[str, str]:
        """The header that asks for a range of this very file; weak ETags cannot (RFC 9110, 13.1.5)."""
        return {} if self.validator.startswith("W/") else {"If-Range": self.validator}


class Unreachable(CheckpointError):
    """The server did not answer properly, however often it was asked."""


class _Again(Exception):
    """This try failed, for a reason that the next may not have."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class WebReader:
    """Reads from one folder of a web server; any number of threads may use it at once.

    `private` are headers for the host of the first URL alone, such as a token.
    """

    def __init__(self, private: Mapping[str, str] | None = None, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._private = dict(private or {})
        self._moved: dict[str, httpx2.URL] = {}
        self._stopped = threading.Event()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        most = self.limits.num_connections
        self._client = httpx2.Client(
            headers={"Accept-Encoding": "identity", "User-Agent": "expertd"},
            timeout=httpx2.Timeout(
                self.limits.silence_s, connect=self.limits.connect_s, pool=self.limits.try_s
            ),
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
            verify=_tls(),
            mounts={"http://": None},  # never through a proxy: plain http is for this machine only
        )

    def stop(self) -> None:
        """Let every read that is under way end at once, with CheckpointError."""
        self._stopped.set()
        with self._lock:
            for connection in self._sockets:
                _hang_up(connection)

    def close(self) -> None:
        """Only when no read is under way any more."""
        self._client.close()

    def read_small(self, url: str, required: bool = False) -> bytes | None:
        """A small file whole; None when the server has none and it is not `required`.

        Raises CheckpointError, also for one of more than 64 MB.
        """
        return self._persist(url, lambda: self._small(url, required), lambda: 0)

    def open_file(self, url: str) -> tuple[RemoteFile, bytes]:
        """A file's size and validator, and its first 128 KiB. Raises CheckpointError."""
        return self._persist(url, lambda: self._open_file(url), lambda: 0)

    def read_range(self, file: RemoteFile, begin: int, end: int) -> bytearray:
        """The bytes [begin, end) of `file`. Raises CheckpointError, also when it is no longer the same file."""
        data = bytearray()
        if begin < end:
            self._persist(file.url, lambda: self._go_on(file, begin, end, data), lambda: len(data))
        return data

    def _persist(self, url: str, attempt: Callable[[], T], num_bytes: Callable[[], int]) -> T:
        """`attempt` until it ends well; raises Unreachable after too many failures without progress."""
        failures, before = 0, num_bytes()
        while True:
            try:
                return attempt()
            except _Again as again:
                if num_bytes() >= before + PROGRESS_BYTES:
                    failures, before = 0, num_bytes()
                failures += 1
                if failures >= self.limits.num_tries:
                    raise Unreachable(
                        f"{url}: {again} ({failures} tries in a row). Check the network and the server, "
                        "then start again: what came is kept."
                    ) from again
                self._pause(failures, again.after_s)

    def _pause(self, failures: int, after_s: float) -> None:
        pause_s = self.limits.pause_s * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
        if self._stopped.wait(min(max(pause_s, after_s), self.limits.longest_pause_s)):
            raise CheckpointError(ENDED)

    def _small(self, url: str, required: bool) -> bytes | None:
        with self._response(url, {}) as response:
            status = response.status_code
            # 403: what Amazon's S3 answers for names that do not exist, unless the folder may be listed.
            if status in (403, 404, 410) and not required:
                return None
            _refuse(url, response)
            if status != 200:
                raise _Again(f"answered {status}, wanted 200")
            data = bytearray()
            for piece in self._pieces(response):
                data += piece
                if len(data) > MAX_SMALL_FILE_BYTES:
                    raise CheckpointError(
                        f"{url}: larger than {MAX_SMALL_FILE_BYTES >> 20} MiB, wanted a small file of a checkpoint. "
                        "Check the URL."
                    )
            return bytes(data)

    def _open_file(self, url: str) -> tuple[RemoteFile, bytes]:
        with self._response(url, {"Range": f"bytes=0-{FIRST_BYTES - 1}"}) as response:
            _refuse(url, response)
            begin, end, size = _content_range(response)
            if begin != 0 or end != min(FIRST_BYTES, size) or not 0 < size <= MAX_FILE_BYTES:
                raise _Again(f"sent bytes {begin}-{end} of {size}, wanted the first {FIRST_BYTES}")
            validator = _validator(response)
            if not validator:
                raise CheckpointError(
                    f"{url}: the server gives neither an ETag nor a Last-Modified, so a change would go unnoticed. "
                    "Download the folder, or use another server."
                )
            data = bytearray()
            self._receive(response, data, end)
            return RemoteFile(url, size, validator), bytes(data)

    def _go_on(self, file: RemoteFile, begin: int, end: int, data: bytearray) -> None:
        """Append to `data`, which holds what came so far of [begin, end)."""
        start = begin + len(data)
        if start == end:
            return
        asked = {"Range": f"bytes={start}-{end - 1}", **file.if_range}
        with self._response(file.url, asked) as response:
            found = _validator(response)
            if response.status_code in (200, 206, 416) and found and found != file.validator:
                raise CheckpointError(
                    f"{file.url}: changed while it was read (was {file.validator[:80]}, is {found[:80]}). "
                    "Start again when the checkpoint is complete."
                )
            _refuse(file.url, response)
            if (*_content_range(response),) != (start, end, file.size):
                header = response.headers.get("content-range", "")[:80]
                raise _Again(f"answered {header!r}, wanted bytes {start}-{end - 1}/{file.size}")
            self._receive(response, data, end - begin)

    def _receive(self, response: httpx2.Response, data: bytearray, wanted: int) -> None:
        """Append the body to `data` until it has `wanted` bytes; what came is kept unless it is too much."""
        had = len(data)
        for piece in self._pieces(response):
            data += piece
            if len(data) > wanted:
                del data[had:]
                raise _Again(f"sent more than the {wanted - had} bytes asked for")
        if len(data) < wanted:
            raise _Again(f"sent {len(data) - had} bytes of {wanted - had}")

    def _pieces(self, response: httpx2.Response) -> Iterator[bytes]:
        until = time.monotonic() + self.limits.try_s
        for piece in response.iter_raw():
            yield piece
            if self._stopped.is_set():
                raise CheckpointError(ENDED)
            if time.monotonic() > until:
                raise _Again(f"took longer than {self.limits.try_s:g} s")

    @contextmanager
    def _response(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """The answer to a GET once no redirect is left; its body is not read yet."""
        response: httpx2.Response | None = None
        try:
            response = self._follow(url, headers)
            encoding = response.headers.get("content-encoding", "identity")
            if encoding != "identity" and response.status_code < 300:
                raise CheckpointError(
                    f"{url}: sent with Content-Encoding {encoding[:40]!r}, wanted the bytes as they are. "
                    "Switch compression off on the server."
                )
            yield response
        except httpx2.RequestError as error:
            self._moved.pop(url, None)
            reason = (str(error).splitlines() or [""])[0]
            raise _Again(f"{type(error).__name__}{f': {reason[:120]}' if reason else ''}") from error
        finally:
            if response is not None:
                response.close()

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        """Remember each connection, so that `stop` can end it: a thread that waits for bytes hears nothing else."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(connection)
            if self._stopped.is_set():
                _hang_up(connection)

    def _follow(self, url: str, headers: Mapping[str, str]) -> httpx2.Response:
        first = httpx2.URL(url)
        here = remembered = self._moved.get(url, first)
        for _ in range(MAX_REDIRECTS):
            private = self._private if _origin(here) == _origin(first) else {}
            request = self._client.build_request(
                "GET", here, headers={**headers, **private}, extensions={"trace": self._note_socket}
            )
            response = self._client.send(request, stream=True, follow_redirects=False)
            if response.status_code in REDIRECTS:
                response.close()
                here = _next_hop(url, here, response.headers.get("location", ""))
                continue
            if 400 <= response.status_code < 500 and remembered != first:
                response.close()
                self._moved.pop(url, None)
                raise _Again(f"answered {response.status_code} where it had redirected to")
            if here != first:
                self._moved[url] = here
            return response
        raise CheckpointError(f"{url}: redirected more than {MAX_REDIRECTS} times. Check the URL.")


@functools.cache
def _tls() -> ssl.SSLContext:
    """The certificates to trust; reading them takes 50 ms."""
    return httpx2.create_ssl_context()


def check_url(text: str) -> str:
    """The URL of a checkpoint's folder, with a slash at its end.

    Raises CheckpointError, without repeating what may be a password, for anything but https, and http to this host.
    """
    try:
        url = httpx2.URL(text.strip())
    except httpx2.InvalidURL as error:
        raise CheckpointError(
            f"{text[:80]!r}: not a URL ({error}). Give https://host/folder of a checkpoint."
        ) from error
    if url.userinfo or url.query or url.fragment:
        raise CheckpointError(
            f"{url.scheme}://{url.host}{url.path[:80]}: holds a password, a query or a fragment, wanted the "
            "plain URL of a checkpoint's folder. Download it with another tool, then give the folder."
        )
    _check_scheme(url, text)
    path = url.path if url.path.endswith("/") else url.path + "/"
    if path.endswith((".json/", ".safetensors/", ".bin/", ".gguf/")):
        raise CheckpointError(
            f"{text[:200]}: names a file, wanted the folder it is in. Give its URL instead."
        )
    return str(url.copy_with(path=path))


def _check_scheme(url: httpx2.URL, text: str) -> None:
    if not url.host or url.scheme not in ("https", "http"):
        raise CheckpointError(
            f"{text[:80]!r}: not a URL to read from. Give https://host/folder of a checkpoint, or file:///folder."
        )
    if url.scheme == "http" and not _is_loopback(url.host):
        raise CheckpointError(
            f"{url.scheme}://{url.host[:80]}: plain http can be changed on its way, and is taken from this machine "
            "only. Use https, or download the folder."
        )


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # SSLSocket's own shutdown is not for other threads
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _next_hop(url: str, here: httpx2.URL, location: str) -> httpx2.URL:
    """Where a redirect leads to. Raises CheckpointError for a way that is less safe than the one before."""
    try:
        there = here.join(location)
    except httpx2.InvalidURL as error:
        raise CheckpointError(f"{url}: redirected to what is no URL. Check the URL.") from error
    safe = there.scheme == "https" or (
        there.scheme == "http" == here.scheme and _is_loopback(there.host) and _is_loopback(here.host)
    )
    if not location or not safe or there.userinfo:
        raise CheckpointError(
            f"{url}: redirected to {there.scheme}://{there.host[:80]}, wanted https. Check the URL."
        )
    return there


def _validator(response: httpx2.Response) -> str:
    return (response.headers.get("etag") or response.headers.get("last-modified") or "")[:1000]


def _content_range(response: httpx2.Response) -> tuple[int, int, int]:
    """Begin, end (exclusive) and the file's size, of a 206."""
    if response.status_code != 206:
        raise _Again(f"answered {response.status_code} to a request for a range, wanted 206")
    match = CONTENT_RANGE.fullmatch(header := response.headers.get("content-range", ""))
    if match is None:
        raise _Again(f"answered with Content-Range {header[:80]!r}")
    begin, last, size = map(int, match.groups())
    return begin, last + 1, size


def _refuse(url: str, response: httpx2.Response) -> None:
    """Raises _Again for what may pass, CheckpointError for what will not."""
    status = response.status_code
    if status < 400:
        return
    if status in TRANSIENT:
        raise _Again(f"answered {status}", _retry_after_s(response))
    if status in (401, 403):
        raise CheckpointError(
            f"{url}: refused ({status}). Check that you may read it; for a hub: `hf auth login`."
        )
    if status in (404, 410):
        raise CheckpointError(f"{url}: no such file ({status}). Check the URL: wanted a checkpoint's folder.")
    if status == 416:
        raise CheckpointError(f"{url}: shorter than it should be (416). Start again when it is complete.")
    raise CheckpointError(f"{url}: the server answered {status}. Check the URL.")


def _retry_after_s(response: httpx2.Response) -> float:
    text = response.headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,6}", text, re.ASCII):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
