"""Whole machines for tests: real `expertd serve` and `expertd join`, each with folders of its own and paired, over
loopback or each in a network namespace (tests/netns.py).

    with computers(tmp_path, "ab") as (a, b):
        a.serve(model)
        b.join(a)
        a.wait(in_group(1))
        assert a.ask("Once").text == b.ask("Once").text

Every process that a computer started, and what that started, has ended when the block does.
"""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from expertd.cluster.identity import Identity, PeerStore, load_identity, make_peer
from tests.netns import Net

LOOPBACK = "127.0.0.1"
# On a busy machine of two processors: a start takes 3 s when nothing else runs.
START_S = 60.0
ASK_S = 60.0
END_S = 40.0
LOOK_S = 0.02

Health = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a client got. `error` is that of the server, "" when the answer is whole."""

    text: str
    num_tokens: int = 0
    error: str = ""


@dataclass
class Running:
    """`expertd` as started by a computer, and the file with what it said."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")


class Computer:
    """One host. `net` None: it shares the loopback with the others."""

    def __init__(self, folder: Path, name: str, net: Net | None = None, index: int = 0) -> None:
        self.name, self.folder, self._net, self._index = name, folder, net, index
        self.config, self.cache = folder / "config" / "expertd", folder / "cache" / "expertd"
        self.identity: Identity = load_identity(self.config, name)
        self.store = PeerStore(self.config)
        self.port = 8080 if net else free_port()
        self.control_port = 7420 if net else free_port()
        self._started: list[Running] = []
        self._born: dict[int, psutil.Process] = {}

    @property
    def address(self) -> str:
        """Where others reach this host."""
        return self._net.hosts[self._index].lan_address if self._net else LOOPBACK

    def start(self, *arguments: str, env: dict[str, str] | None = None, wrap: Sequence[str] = ()) -> Running:
        log = self.folder / f"log{len(self._started)}"
        folders = {
            "XDG_CONFIG_HOME": str(self.folder / "config"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        argv = [*wrap, sys.executable, "-m", "expertd", *arguments]
        with log.open("wb") as out:
            options: dict[str, Any] = {
                "stdout": out,
                "stderr": subprocess.STDOUT,
                "stdin": subprocess.DEVNULL,
                "env": {**os.environ, "PYTHONUNBUFFERED": "1", **folders, **(env or {})},
                "cwd": self.folder,
                "start_new_session": True,
            }
            process = (
                self._net.run(self._index, argv, **options)
                if self._net
                else subprocess.Popen(argv, **options)
            )
        self._started.append(Running(process, log))
        return self._started[-1]

    def serve(self, model: Path | str, *options: str, **more: Any) -> Running:
        return self.start("serve", str(model), *self._ports(self.control_port), *options, **more)

    def join(self, leader: "Computer", *options: str, **more: Any) -> Running:
        return self.start("join", leader.address, *self._ports(leader.control_port), *options, **more)

    def _ports(self, control: int) -> list[str]:
        return ["--port", str(self.port), "--control-port", str(control)]

    @property
    def running(self) -> Running:
        """What was started last."""
        return self._started[-1]

    # Processes.

    def children(self, module: str = "") -> list[psutil.Process]:
        """The living processes that our supervisor started: "expertd.cluster.rank", "expertd.link.process"."""
        try:
            found = psutil.Process(self.running.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self._born |= {p.pid: p for p in found}
        with contextlib.suppress(psutil.Error):
            return [p for p in found if not module or module in p.cmdline()]
        return []

    def part(self, name: str) -> psutil.Process:
        """The supervisor, the rank or the latest link of this computer."""
        if name == "supervisor":
            return psutil.Process(self.running.process.pid)
        module = {"rank": "expertd.cluster.rank", "link": "expertd.link.process"}[name]
        return max(self.children(module), key=lambda p: p.create_time())

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop what was started last, in order, and give its exit code."""
        self.children()
        self.running.process.send_signal(number)
        return self.running.process.wait(END_S)

    def close(self) -> None:
        """Reap everything, whatever its state, and check that nothing outlives its supervisor."""
        if self._started:
            self.children()
        for running in self._started:
            if running.process.poll() is None:
                running.process.send_signal(signal.SIGCONT)
                running.process.send_signal(signal.SIGTERM)
        for running in self._started:
            try:
                running.process.wait(END_S)
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
                raise AssertionError(f"{self.name} did not end: {running.said()[-2000:]}") from None
        self.require_no_orphan()

    def require_no_orphan(self, timeout_s: float = 20.0) -> None:
        """What our supervisors started has ended, too; a stopped process ends once it is continued."""
        for process in self._born.values():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_STOPPED:
                    process.resume()
        _, left = psutil.wait_procs(self._born.values(), timeout_s)
        left = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        for process in left:
            process.kill()
        assert not left, f"{self.name} left processes behind: {left}"

    # What a client sees.

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=timeout_s)
        make: Callable[[], socket.socket] = lambda: socket.create_connection((LOOPBACK, self.port), timeout_s)  # noqa: E731
        connection.sock = self._net.inside(self._index, make) if self._net else make()
        return connection

    def health(self, timeout_s: float = 2.0) -> Health:
        """What /health says, {} when nobody answers."""
        try:
            with contextlib.closing(self._connection(timeout_s)) as connection:
                connection.request("GET", "/health")
                found: Health = json.loads(connection.getresponse().read())
                return found
        except OSError:
            return {}

    def wait(self, condition: Callable[[Health], Any], timeout_s: float = START_S) -> Health:
        """Wait until /health is so; gives it."""
        deadline = time.monotonic() + timeout_s
        health: Health = {}
        while not (health and condition(health)):
            assert time.monotonic() < deadline, f"{self.name}: {health}\n{self.running.said()[-3000:]}"
            assert self.running.process.poll() is None, f"{self.name} ended: {self.running.said()[-3000:]}"
            time.sleep(LOOK_S)
            health = self.health()
        return health

    def ask(self, prompt: str, max_tokens: int = 16, timeout_s: float = ASK_S, **options: Any) -> Answer:
        """One answer, not streamed."""
        body = self._body(prompt, max_tokens, options)
        with contextlib.closing(self._connection(timeout_s)) as connection:
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            found = json.loads(connection.getresponse().read())
        if "error" in found:
            return Answer("", error=found["error"]["message"])
        return Answer(found["choices"][0]["text"], found["usage"]["completion_tokens"])

    def stream(self, prompt: str, max_tokens: int = 16, timeout_s: float = ASK_S, **options: Any) -> "Stream":
        more = {"stream": True, "stream_options": {"include_usage": True}}
        return Stream(self._connection(timeout_s), self._body(prompt, max_tokens, options | more))

    def _body(self, prompt: str, max_tokens: int, options: dict[str, Any]) -> str:
        model = self.health().get("model")
        greedy = {"temperature": 0}
        return json.dumps({"model": model, "prompt": prompt, "max_tokens": max_tokens, **greedy, **options})


@dataclass
class Stream:
    """An answer on its way, read by a thread. `pieces` are (time, text)."""

    connection: http.client.HTTPConnection
    body: str
    pieces: list[tuple[float, str]] = field(default_factory=list)
    error: str = ""
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            headers = {"content-type": "application/json"}
            self.connection.request("POST", "/v1/completions", self.body, headers)
            answer = self.connection.getresponse()
            if answer.status != 200:
                self.error = json.loads(answer.read())["error"]["message"]
            for line in answer:
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]))
        except (OSError, http.client.HTTPException) as e:
            self.error = self.error or f"{type(e).__name__}: {e}"
        finally:
            self.connection.close()

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = event["error"]["message"]
        elif event.get("usage"):
            self.num_tokens = event["usage"]["completion_tokens"]
        elif event["choices"] and (text := event["choices"][0].get("text")):
            self.pieces.append((time.monotonic(), text))

    def wait_pieces(self, number: int, timeout_s: float = ASK_S) -> None:
        """Wait until so many pieces have come."""
        deadline = time.monotonic() + timeout_s
        while len(self.pieces) < number:
            assert self._thread.is_alive(), f"the stream ended after {len(self.pieces)} pieces: {self.error}"
            assert time.monotonic() < deadline, f"only {len(self.pieces)} pieces came"
            time.sleep(LOOK_S / 4)

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    @property
    def longest_gap_s(self) -> float:
        times = [at for at, _ in self.pieces]
        return max((b - a for a, b in pairwise(times)), default=0.0)

    def result(self, timeout_s: float = ASK_S) -> Answer:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"the stream hangs after {len(self.pieces)} pieces"
        return Answer("".join(text for _, text in self.pieces), self.num_tokens, self.error)


def free_port() -> int:
    """One that nothing listens on, from below those that systems give to whoever asks for any: it stays free."""
    for port in random.sample(range(10_000, 30_000), 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind((LOOPBACK, port))
            return port
    raise AssertionError("no port is free")


def pair(*hosts: Computer) -> None:
    """Let every host know every other."""
    for one in hosts:
        for other in hosts:
            if other is not one:
                one.store.add(make_peer(other.name, other.identity.certificate, other.address))


@contextlib.contextmanager
def computers(folder: Path, names: str, net: Net | None = None) -> Iterator[list[Computer]]:
    """Paired computers, one for each letter of `names`."""
    made = []
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        made.append(Computer(folder / name, f"host-{name}", net, index))
    pair(*made)
    with contextlib.ExitStack() as stack:
        for computer in reversed(made):
            stack.callback(computer.close)
        yield made


# Conditions for Computer.wait.


def in_group(num_hosts: int) -> Callable[[Health], bool]:
    """On the leader: so many other hosts take part."""
    return lambda h: (
        sum(host["state"] == "in the group" for host in (h["hosts"] or {"hosts": []})["hosts"]) == num_hosts
    )


def follows(health: Health) -> bool:
    """On a joiner: an epoch of the group runs."""
    return bool(health["hosts"]["state"] == "following" and health["hosts"]["epoch"])


def answers(health: Health) -> bool:
    return bool(health["status"] == "ok")
