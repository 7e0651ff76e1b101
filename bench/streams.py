"""Many streams at once, over HTTP: tokens per second of all, and how long each waits for its first.

    python -m expertd.bench.streams CHECKPOINT [--streams 16] [--tokens 48] [--repeats 3] [--rival] [--json FILE]

Method. One server for each row, all loaded and idle but the one that is asked; they take turns, in reversed order every
other round. A rank has a core of its own and its supervisor those of its ranks, so one rank has one core in all, as
mlx-lm's server has. Each request has another short prompt, is greedy, cannot end early (the end token is biased away)
and is streamed; all are sent at once. The first round is not counted. Nothing is guessed (--no-speculate), and no
prompt begins like another, nor like one of an earlier round: mlx-lm's server has the caches of its last prompts.

With --inside there is no HTTP: the groups are opened by this process, on the core of rank 0, as on two machines of one
core each. That is what two ranks do for many streams; with HTTP on the same two cores, server and client are in it too.
Beside them two groups of one rank that know nothing of each other get half of the streams each: what the cores of this
machine give when both are busy, and no split can beat.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2

from expertd.bench.processes import free_ports
from expertd.bench.throughput import paired_ratio, with_ranks
from expertd.checkpoint.config import read_config
from expertd.checkpoint.locate import find_checkpoint
from expertd.cli.signals import run_until_signal
from expertd.cluster.supervisor import Cluster
from expertd.config import GroupConfig
from expertd.engine.messages import Submit, Token
from expertd.errors import ClusterError, ConfigError, ExpertdError
from expertd.topology.machine import describe_machine, own_cores, summarize

LOAD_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 900.0
SUBJECTS = ("Anna", "The fox", "A king", "My sister", "The rain", "Old Tom", "A ship", "Winter")
VERBS = ("said that", "went to", "looked at", "never knew")


@dataclass
class Row:
    """One server. `cores` empty: not pinned."""

    name: str
    command: list[str]
    cores: list[int]
    port: int
    tokens_per_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)


def main() -> None:
    arguments = _parser().parse_args()
    try:
        folder = find_checkpoint(arguments.checkpoint)
        rows = _rows(folder, arguments.kernels.split(","), arguments.rival, arguments.inside)
        if arguments.inside:
            run_until_signal(_measure_inside(rows, folder, arguments))
        else:
            _measure(rows, folder, arguments.streams, arguments.tokens, arguments.repeats)
        report = _report(rows, arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _print(report)
    except ExpertdError as e:
        sys.stderr.write(f"bench streams: {e}\n")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expertd.bench.streams", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--streams", type=int, default=16, help="requests at once")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--kernels", default="native", help="of ours: native, mlx, or both with a comma")
    parser.add_argument("--rival", action="store_true", help="beside mlx_lm.server")
    parser.add_argument("--inside", action="store_true", help="without HTTP")
    parser.add_argument("--json", type=Path, help="figures go there")
    return parser


def _rows(folder: Path, kernels: list[str], rival: bool, inside: bool) -> list[Row]:
    ports = iter(free_ports(2 * len(kernels) + 1))
    rows = []
    for name in kernels:
        for ranks in (1, 2):
            command = ["expertd", "serve", str(folder), "--ranks", str(ranks), "--kernels", name]
            command += ["--no-speculate", "--prefix-cache", "0", *(["--pin"] if ranks > 1 else [])]
            rows.append(_row(f"{ranks} rank(s), {name}", command, ranks, next(ports)))
        if inside:
            rows.append(Row(f"2 apart, {name}", [], [], 0))
    if rival:
        rows.append(_row("mlx_lm.server", ["mlx_lm", "server", "--model", str(folder)], 1, next(ports)))
    return rows


def _row(name: str, command: list[str], num_cores: int, port: int) -> Row:
    return Row(name, [sys.executable, "-m", *command, "--port", str(port)], own_cores(num_cores), port)


def _measure(rows: list[Row], folder: Path, num_streams: int, tokens: int, repeats: int) -> None:
    end = read_config(folder).get("eos_token_id")
    ends = end if isinstance(end, list) else [end]
    bias = {str(token): -100.0 for token in ends if token is not None}
    request = {"max_tokens": tokens, "temperature": 0, "logit_bias": bias, "stream": True}
    with ExitStack() as stack:
        for row in rows:
            stack.enter_context(_running(row))
        models = {row.name: _wait_ready(row) for row in rows}
        for repeat in range(repeats + 1):
            for row in rows if repeat % 2 == 0 else reversed(rows):
                asked = [
                    {**request, "prompt": prompt, "model": models[row.name]}
                    for prompt in _prompts(num_streams, repeat)
                ]
                try:
                    seconds, firsts = asyncio.run(_ask_all(row.port, asked))
                except httpx2.TransportError as e:
                    raise ClusterError(
                        f"{row.name} broke off ({str(e) or type(e).__name__}). Try again."
                    ) from None
                if repeat:
                    row.tokens_per_s.append(num_streams * tokens / seconds)
                    row.first_token_s += firsts


async def _measure_inside(rows: list[Row], folder: Path, arguments: argparse.Namespace) -> None:
    bases = [GroupConfig(str(folder), kernels=name) for name in arguments.kernels.split(",")]
    groups = [groups for base in bases for groups in _groups(base)]
    if cores := own_cores(1):  # each machine has one core, and this process is on the first machine
        os.sched_setaffinity(0, cores)
    async with AsyncExitStack() as stack:

        async def opened(group: GroupConfig) -> Cluster:
            return await stack.enter_async_context(Cluster.open(group))

        turns = [
            (row, [await opened(group) for group in of_row]) for row, of_row in zip(rows, groups, strict=True)
        ]
        for repeat in range(arguments.repeats + 1):
            for row, clusters in turns if repeat % 2 == 0 else reversed(turns):
                began = time.monotonic()
                asked = [
                    (
                        Submit(
                            f"{row.name} {repeat} {i}", prompt, max_tokens=arguments.tokens, ignore_end=True
                        ),
                        i,
                    )
                    for i, prompt in enumerate(_prompts(arguments.streams, repeat))
                ]
                firsts = await asyncio.gather(
                    *(_first_token(clusters[i % len(clusters)], submit, began) for submit, i in asked)
                )
                if repeat:
                    seconds = time.monotonic() - began
                    row.tokens_per_s.append(arguments.streams * arguments.tokens / seconds)
                    row.first_token_s += firsts


def _groups(base: GroupConfig) -> list[list[GroupConfig]]:
    """For each row with these kernels the groups that share its streams. Raises ConfigError without two cores."""
    if len(cores := own_cores(2)) < 2:
        raise ConfigError("bench streams --inside: wanted two cores, on a system that can pin processes.")
    one, two = with_ranks(base, 1, "auto"), with_ranks(base, 2, "auto")
    return [[one], [two], [replace(one, cpus=((core,),)) for core in cores]]


async def _first_token(cluster: Cluster, submit: Submit, began: float) -> float:
    """See one request to its end; gives the seconds until its first token."""
    first = 0.0
    async with aclosing(cluster.generate(submit)) as events:
        async for event in events:
            if isinstance(event, Token):
                first = first or time.monotonic() - began
    return first


def _prompts(number: int, repeat: int) -> list[str]:
    """Those of a round."""
    words = [(SUBJECTS[i % len(SUBJECTS)], VERBS[i // len(SUBJECTS) % len(VERBS)]) for i in range(number)]
    return [f"{who} {repeat} {does} the house number {i}, and" for i, (who, does) in enumerate(words)]


@contextlib.contextmanager
def _running(row: Row) -> Iterator[None]:
    def settle() -> None:
        if row.cores:
            os.sched_setaffinity(0, row.cores)

    server = subprocess.Popen(
        row.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=settle,
    )
    try:
        yield
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
        server.kill()
        server.wait()


def _wait_ready(row: Row) -> str:
    """Wait until the server answers; gives the id of its model. Raises ClusterError after LOAD_TIMEOUT_S."""
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx2.HTTPError, ValueError, LookupError):
            base = f"http://127.0.0.1:{row.port}"
            if httpx2.get(f"{base}/health", timeout=5).status_code == 200:
                if row.command[2] != "expertd":  # its list of models needs a hub's cache folder
                    return "default_model"
                found: str = httpx2.get(f"{base}/v1/models", timeout=30).json()["data"][0]["id"]
                return found
        time.sleep(0.1)
    raise ClusterError(f"{row.name} is not ready after {LOAD_TIMEOUT_S:g} s. Try a smaller checkpoint.")


async def _ask_all(port: int, requests: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """The seconds until all are answered, and until each one's first text."""
    limits = httpx2.Limits(max_connections=len(requests))
    async with httpx2.AsyncClient(timeout=ANSWER_TIMEOUT_S, limits=limits) as client:
        began = time.monotonic()
        firsts = await asyncio.gather(*(_ask(client, port, request, began) for request in requests))
        return time.monotonic() - began, firsts


async def _ask(client: httpx2.AsyncClient, port: int, request: dict[str, Any], began: float) -> float:
    first = 0.0
    async with client.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=request) as answer:
        if answer.status_code != 200:
            raise ClusterError(f"port {port} answered {answer.status_code}: {(await answer.aread())[:200]!r}")
        async for line in answer.aiter_lines():
            if not first and line.startswith("data: {") and json.loads(line[6:])["choices"][0].get("text"):
                first = time.monotonic() - began
    if not first:
        raise ClusterError(f"port {port}: an answer without text.")
    return first


def _report(rows: list[Row], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "machine": describe_machine(),
        "model": arguments.checkpoint,
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "rows": [
            {
                "name": row.name,
                "tokens_per_s": round(statistics.median(row.tokens_per_s), 1),
                "min": round(min(row.tokens_per_s), 1),
                "max": round(max(row.tokens_per_s), 1),
                "ratio": paired_ratio(row.tokens_per_s, rows[0].tokens_per_s),
                "first_token_p50_s": round(statistics.median(row.first_token_s), 3),
                "first_token_p99_s": round(_p99(row.first_token_s), 3),
            }
            for row in rows
        ],
    }


def _p99(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def _print(report: dict[str, Any]) -> None:
    say = sys.stdout.write
    say(
        f"{summarize(report['machine'])}\n{report['model']}: {report['streams']} streams of {report['tokens']}\n"
    )
    say(f"{'server':<20} {'tokens/s':>9} {'min..max':>17} {'ratio':>7}  first token p50, p99\n")
    for row in report["rows"]:
        spread = f"{row['min']:.1f}..{row['max']:.1f}"
        say(f"{row['name']:<20} {row['tokens_per_s']:>9.1f} {spread:>17} {row['ratio']:>6.2f}x  ")
        say(f"{row['first_token_p50_s']:.2f} s, {row['first_token_p99_s']:.2f} s\n")


if __name__ == "__main__":
    main()
