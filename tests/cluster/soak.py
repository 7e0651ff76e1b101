"""`expertd serve` under everything that clients and machines do: requests at random times, clients that leave, cancel
or read slowly, bursts beyond the queue, and ranks that are killed and stopped. Nothing may get stuck, lost or larger.

    python -m tests.cluster.soak [--minutes 60] [--seed 1] [--ranks 2] [--family qwen3_moe] [--kill-every 45]

At the end every request is accounted for: finished (with all the tokens it asked for), refused (429), left or cancelled
by its client; anything else is wrong. The server's own counts must be the clients', nothing may be open, no process may
outlive the server, and neither its memory, nor that of ranks, nor its open files may have grown.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.computers import free_port
from tests.tiny import make_tiny

MODEL = "tiny"
RATE = 4.0  # requests per second
MAX_STREAMS, MAX_WAITING, BURST = 8, 8, 24
# Neither a request, with every restart of ranks in it, nor the server's end takes this long.
STUCK_S, END_S = 60.0, 20.0
# A rank that has lived for a minute may die again at once (restarts.GOOD_LIFE_S); two take turns.
KILL_EVERY_S = 45.0
# Memory is looked at each second. Of a process's life the first part is its warm-up: caches fill, and what Python
# needs for the largest burst is there. Then the line through what it takes may rise by so much.
WARM_UP_S, MIN_RISE_MIB, RISE_MIB_PER_MIN = 60.0, 16.0, 0.5
KINDS = {"stream": 50, "whole": 15, "leaves": 15, "slow": 8, "cancels": 10, "burst": 2}


@dataclass
class Account:
    """What became of all requests. `ends` counts the ways in which the server sees completions end."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    num_kills: int = 0


class Client:
    """Asks in all the ways there are; each request is in the account when its method returns."""

    def __init__(self, port: int, seed: int) -> None:
        self._port, self._random = port, random.Random(seed)
        self.account = Account()

    async def ask(self, kind: str) -> None:
        """One request of a kind, or several."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(STUCK_S):
                await getattr(self, kind)()
        except TimeoutError:
            self._wrong(kind, f"stuck: nothing for {STUCK_S:g} s")
        except (OSError, ValueError, KeyError, IndexError, asyncio.IncompleteReadError) as e:
            self._wrong(kind, f"{type(e).__name__}: {e}")
        self.account.longest_s = max(self.account.longest_s, time.monotonic() - began)

    async def stream(self, pause_s: float = 0.0, leave_after: int | None = None) -> None:
        num_tokens, last = self._random.randint(1, 60), {}
        async with self._post("/v1/completions", self._question(num_tokens, True)) as (status, lines):
            if self._is_refused(status):
                return
            num_events = 0
            async for line in lines:
                if not line.startswith("data: {"):
                    continue
                last, num_events = json.loads(line[6:]), num_events + 1
                if "error" in last:
                    return self._wrong("stream", line)
                if num_events == leave_after:
                    return self._count("left")
                await asyncio.sleep(pause_s)
        self._check(last.get("usage"), num_tokens)

    async def slow(self) -> None:
        await self.stream(pause_s=self._random.choice((0.05, 0.2)))

    async def leaves(self) -> None:
        await self.stream(leave_after=self._random.randint(1, 20))

    async def whole(self) -> None:
        num_tokens = self._random.randint(1, 60)
        status, answer = await self._call("POST", "/v1/completions", self._question(num_tokens, False))
        if not self._is_refused(status):
            self._check(answer.get("usage"), num_tokens)

    async def cancels(self) -> None:
        """An answer that is made in the background, cancelled after a while, and forgotten."""
        question = {"model": MODEL, "input": self._text(), "background": True, "max_output_tokens": 60}
        status, answer = await self._call("POST", "/v1/responses", question)
        if self._is_refused(status):
            return
        await asyncio.sleep(self._random.random())
        path = f"/v1/responses/{answer['id']}"
        status, answer = await self._call("POST", f"{path}/cancel")
        if (status, answer.get("status")) != (200, "cancelled") and "error" in answer:
            status, answer = await self._call("GET", path)
        if answer.get("status") not in ("cancelled", "completed", "incomplete"):
            self._wrong("cancels", f"{status} {answer}")
        await self._call("DELETE", path)
        self._count(f"background {answer.get('status')}")

    async def burst(self) -> None:
        await asyncio.gather(*(self.whole() for _ in range(BURST)))

    def _question(self, num_tokens: int, stream: bool) -> dict[str, Any]:
        sampled = {"temperature": 1.0, "top_p": 0.95, "seed": self._random.randrange(100)}
        question = {"model": MODEL, "prompt": self._text(), "max_tokens": num_tokens, "ignore_eos": True}
        question |= sampled if self._random.random() < 0.5 else {"temperature": 0.0}
        return question | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})

    def _text(self) -> str:
        """One to sixty words, many of which begin like others."""
        words = ["The fox met", "a bear and", "the old king", "said that", "it rains in", "May"]
        return "Once. " + " ".join(self._random.choices(words, k=self._random.randint(1, 20)))

    def _check(self, usage: dict[str, int] | None, num_tokens: int) -> None:
        if not usage or usage["completion_tokens"] != num_tokens:
            return self._wrong("answer", f"{usage}, wanted {num_tokens} tokens")
        self._count("finished")

    def _is_refused(self, status: int) -> bool:
        if status == 429:
            self._count("refused")
        elif status != 200:
            self._wrong("answer", f"status {status}")
        return status != 200

    def _count(self, outcome: str) -> None:
        self.account.outcomes[outcome] += 1

    def _wrong(self, kind: str, what: str) -> None:
        self._count("wrong")
        self.account.wrong.append(f"{kind}: {what}"[:300])

    async def _call(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        async with self._post(path, body, method) as (status, lines):
            text = "".join([line async for line in lines])
        return status, json.loads(text[text.find("{") :]) if "{" in text else {}

    @contextlib.asynccontextmanager
    async def _post(
        self, path: str, body: Any = None, method: str = "POST"
    ) -> AsyncIterator[tuple[int, AsyncIterator[str]]]:
        """The status and the lines of an answer; leaving ends the connection at once."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        data = json.dumps(body).encode() if body is not None else b""
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        try:
            writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
            status = int((await reader.readline()).split()[1])
            chunked = False
            while (line := (await reader.readline()).strip().lower()) != b"":
                chunked |= line == b"transfer-encoding: chunked"
            yield status, _lines(reader, chunked)
        finally:
            writer.transport.abort()


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[str]:
    """The lines of a body. Raises IncompleteReadError when a chunked one breaks off."""
    rest = b""
    while True:
        size = int(await reader.readline() or b"", 16) if chunked else 1 << 16
        data = await reader.readexactly(size + 2) if chunked else await reader.read(size)
        if not data or not size:
            break
        *whole, rest = (rest + (data[:-2] if chunked else data)).split(b"\n")
        for line in whole:
            yield line.decode()
    yield rest.decode()


@dataclass
class Process:
    """A process of the server, and what it took in each second of its life."""

    name: str
    process: psutil.Process
    born: float = field(default_factory=time.monotonic)
    seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)

    def look(self) -> None:
        with contextlib.suppress(psutil.Error):
            taken = self.process.memory_full_info()
            self.mib.append(getattr(taken, "pss", taken.rss) / 2**20)
            self.seconds.append(time.monotonic() - self.born)

    def rise(self, warm_up_s: float) -> tuple[float, float] | None:
        """How long it was looked at after its warm-up, in minutes, and by how many MiB the line rose; None: hardly."""
        warm = [i for i, s in enumerate(self.seconds) if s >= warm_up_s]
        if len(warm) < 10:
            return None
        minutes = [self.seconds[i] / 60 for i in warm]
        slope = statistics.linear_regression(minutes, [self.mib[i] for i in warm]).slope
        return minutes[-1] - minutes[0], slope * (minutes[-1] - minutes[0])


class Server:
    """`expertd serve` of `folder` in a process of its own; `processes` are all that it ever had."""

    def __init__(self, folder: Path, num_ranks: int, log: Path) -> None:
        self.port, self._log = free_port(), log
        command = [sys.executable, "-m", "expertd", "serve", str(folder), "--ranks", str(num_ranks)]
        command += ["--port", str(self.port), "--max-streams", str(MAX_STREAMS)]
        command += ["--max-waiting", str(MAX_WAITING), "--prefix-cache", "4MB"]
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, cwd=log.parent)
        self.processes = [Process("supervisor", psutil.Process(self._process.pid))]

    def look(self) -> None:
        """Find new processes, and measure all."""
        known = {p.process for p in self.processes}
        with contextlib.suppress(psutil.Error):
            found = self.processes[0].process.children(recursive=True)
            self.processes += [Process("rank", p) for p in found if p not in known]
        for process in self.processes:
            if process.process.is_running():
                process.look()

    def ranks(self) -> list[psutil.Process]:
        return [p.process for p in self.processes[1:] if p.process.is_running()]

    @property
    def num_files(self) -> int:
        return self.processes[0].process.num_fds()

    def end(self) -> list[str]:
        """End it as a user does; what is wrong with that."""
        self._process.terminate()
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return [f"the server had not ended {END_S:g} s after SIGTERM"]
        left = [p.process for p in self.processes if p.process.is_running()]
        wrong = (
            [] if code in (0, -signal.SIGTERM, 128 + signal.SIGTERM) else [f"the server's exit code: {code}"]
        )
        return wrong + [f"process {p.pid} has outlived the server" for p in left]


class Soak:
    """One server and its clients, for a while."""

    def __init__(self, server: Server, seed: int, kill_every_s: float) -> None:
        self.server, self.client = server, Client(server.port, seed)
        self.account = self.client.account
        self._random, self._kill_every_s = random.Random(seed), kill_every_s
        self._asked: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float) -> None:
        await self._until(self._is_healthy, "healthy")
        files = self.server.num_files
        others = [asyncio.create_task(work) for work in (self._look(), self._kill())]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
            task = asyncio.create_task(self.client.ask(kind))
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
            await asyncio.sleep(self._random.expovariate(RATE))
        for task in others:
            task.cancel()
        await asyncio.gather(*self._asked)
        await self._until(self._is_healthy, "healthy")
        await self._until(self._is_quiet, "without open requests")
        await self._until(lambda: self._has_files(files), f"down to {files} open files")
        self._compare(await self._counts())

    async def _look(self) -> None:
        while True:
            self.server.look()
            await asyncio.sleep(1)

    async def _kill(self) -> None:
        """Kill or stop ranks, each in its turn, so that none is taken for one that keeps dying."""
        while True:
            await asyncio.sleep(self._kill_every_s * self._random.uniform(0.8, 1.2))
            self.server.look()
            victim = max(self.server.ranks(), key=lambda p: time.time() - p.create_time())
            number = signal.SIGKILL if self._random.random() < 0.7 else signal.SIGSTOP
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, number)
                self.account.num_kills += 1

    async def _until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + STUCK_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
                found = condition()
                if await found if asyncio.iscoroutine(found) else found:
                    return
            await asyncio.sleep(0.1)
        self.account.wrong.append(f"the server is not {what} after {STUCK_S:g} s")

    async def _is_healthy(self) -> bool:
        status, health = await self.client._call("GET", "/health")
        return status == 200 and all(rank["state"] == "running" for rank in health["group"]["ranks"])

    async def _is_quiet(self) -> bool:
        counts = await self._counts()
        names = ("open_requests", "num_requests_running", "num_requests_waiting")
        return not any(counts[f"expertd_{name}"] for name in names)

    def _has_files(self, number: int) -> bool:
        return self.server.num_files <= number

    async def _counts(self) -> dict[str, float]:
        """The server's own figures, without labels: sums."""
        async with self.client._post("/metrics", method="GET") as (_, lines):
            counts: dict[str, float] = defaultdict(float)
            async for line in lines:
                name, _, value = line.strip().rpartition(" ")
                if name and not name.startswith("#"):
                    counts[name.partition("{")[0]] += float(value)
                    counts[name] += float(value) if "{" in name else 0.0
        return counts

    def _compare(self, counts: dict[str, float]) -> None:
        """The server's account and ours. A client that left may have had its whole answer on the way."""
        ours, wrong = self.account.outcomes, self.account.wrong
        ended = counts["expertd_request_success_total"]
        refused = counts['expertd_request_failure_total{reason="busy"}']
        failed = counts["expertd_request_failure_total"] - refused
        if ended != ours.total() - ours["refused"] - ours["wrong"]:
            wrong.append(f"the server counts {ended:g} requests that ended, the clients {dict(ours)}")
        if refused != ours["refused"] or failed:
            wrong.append(
                f"the server refused {refused:g} and failed {failed:g}, the clients count {dict(ours)}"
            )

    def report(self, warm_up_s: float) -> str:
        """For people; adds to what is wrong whose memory has grown."""
        account = self.account
        lines = [f"{account.outcomes.total()} requests, {account.num_kills} ranks killed or stopped"]
        lines += [f"{outcome} {count}" for outcome, count in sorted(account.outcomes.items())]
        lines.append(f"the longest took {account.longest_s:.1f} s")
        for process in self.server.processes:
            if rise := process.rise(warm_up_s):
                minutes, mib = rise
                bound = max(MIN_RISE_MIB, RISE_MIB_PER_MIN * minutes)
                text = f"{process.name}: {process.mib[-1]:.0f} MiB, {mib:+.1f} in {minutes:.1f} min"
                lines.append(f"{text} (at most {bound:.0f})")
                account.wrong += [f"{text}: wanted at most {bound:.0f}"] if mib > bound else []
        return "\n".join([*lines, *(f"WRONG: {text}" for text in account.wrong)])


def soak(
    folder: Path, seconds: float, seed: int, num_ranks: int = 2, kill_every_s: float = KILL_EVERY_S
) -> tuple[str, list[str]]:
    """Serve the checkpoint for so long; gives the report and what is wrong."""
    with tempfile.TemporaryDirectory() as logs:
        server = Server(folder, num_ranks, Path(logs) / "log")
        run = Soak(server, seed, kill_every_s)
        try:
            asyncio.run(run.run(seconds))
        finally:
            run.account.wrong += server.end()
            log = (Path(logs) / "log").read_text(errors="replace")
        run.account.wrong += [line for line in log.splitlines() if "Traceback" in line or "bug" in line]
        report = run.report(min(WARM_UP_S, seconds / 3))
        return report + (f"\n{log[-3000:]}" if run.account.wrong else ""), run.account.wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--kill-every", type=float, default=KILL_EVERY_S)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny(Path(folder) / MODEL, options.family)
        report, wrong = soak(model, options.minutes * 60, options.seed, options.ranks, options.kill_every)
    print(report)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
