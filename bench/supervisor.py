"""What a supervisor's own work costs: processor time per token of 100 streams, for each API, over a stub engine.

    python -m expertd.bench.supervisor [--streams 100] [--tokens 200] [--pace-ms 40] [--repeats 5] [--json FILE]

Method. A server in a process of its own, with one rank that computes nothing (supervisor_side.py): a step lasts as long
as --pace-ms says and gives every stream a token. The APIs take turns. What counts is the processor time of the server's
process, as the system counts it (user and system), over a round in which all streams are asked and read to their end,
divided by the tokens. Clients are bare sockets, so that they leave the server a core.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

from expertd.cluster import supervisor
from expertd.config import GroupConfig, ServerConfig
from expertd.errors import ClusterError, ExpertdError
from expertd.server import serve
from expertd.topology.machine import describe_machine, summarize

RANK_MODULE = "expertd.bench.supervisor_side"
READY_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 300.0
ASKED = [{"role": "user", "content": "a question"}]
# Path, body, the name of what bounds the answer, and the bytes that the end of every whole answer has.
APIS: dict[str, tuple[str, dict[str, Any], str, bytes]] = {
    "chat": ("/v1/chat/completions", {"messages": ASKED}, "max_tokens", b"data: [DONE]"),
    "completions": ("/v1/completions", {"prompt": "a question"}, "max_tokens", b"data: [DONE]"),
    "responses": ("/v1/responses", {"input": "a question"}, "max_output_tokens", b"response.incomplete"),
    "messages": ("/v1/messages", {"messages": ASKED}, "max_tokens", b'"message_stop"'),
}


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.serve:
        return _serve(arguments.pace_ms)
    try:
        report = _measure(arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _print(report)
    except ExpertdError as e:
        sys.stderr.write(f"bench supervisor: {e}\n")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expertd.bench.supervisor", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--streams", type=int, default=100, help="requests at once")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each")
    parser.add_argument("--pace-ms", type=float, default=40, help="the length of a step, which all share")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--apis", default=",".join(APIS), help="some of them, with commas")
    parser.add_argument("--json", type=Path, help="figures go there")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def _serve(pace_ms: float) -> None:
    """The measured process: a server over a stub rank; prints its port."""
    supervisor.RANK_MODULE = RANK_MODULE
    config = ServerConfig(port=0, model_id="stub", group=GroupConfig(checkpoint=str(pace_ms)))
    listener = serve.take_port(config)
    port = listener.getsockname()[1]
    asyncio.run(serve.serve(config, listener, lambda cluster: print(port, flush=True)))


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    names = arguments.apis.split(",")
    if unknown := set(names) - set(APIS):
        raise ClusterError(f"--apis: {sorted(unknown)[0]!r} is none of {', '.join(APIS)}.")
    costs: dict[str, list[float]] = {name: [] for name in names}
    command = [
        sys.executable,
        "-m",
        "expertd.bench.supervisor",
        "--serve",
        "--pace-ms",
        str(arguments.pace_ms),
    ]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as server,
    ):
        too_late = threading.Timer(READY_TIMEOUT_S, server.kill)  # then nothing more is said
        too_late.start()
        try:
            assert server.stdout
            port, process = int(server.stdout.readline() or 0), psutil.Process(server.pid)
            too_late.cancel()
            if not port:
                said.seek(0)
                raise ClusterError(f"the server did not start: {said.read()[-500:].decode(errors='replace')}")
            for repeat in range(arguments.repeats + 1):
                for name in names:
                    before = sum(process.cpu_times()[:2])
                    asyncio.run(_ask_all(port, name, arguments.streams, arguments.tokens))
                    seconds = sum(process.cpu_times()[:2]) - before
                    if repeat:  # the first round has imports and caches to fill
                        costs[name].append(1000 * seconds / (arguments.streams * arguments.tokens))
        finally:
            too_late.cancel()
            server.terminate()
    return _report(costs, arguments)


async def _ask_all(port: int, name: str, num_streams: int, num_tokens: int) -> None:
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await asyncio.gather(*(_ask(port, name, num_tokens) for _ in range(num_streams)))


async def _ask(port: int, name: str, num_tokens: int) -> None:
    """One answer, whole and without an error. Raises ClusterError otherwise."""
    path, body, bound, end = APIS[name]
    text = json.dumps({**body, bound: num_tokens, "model": "stub", "stream": True}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(text)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + text)
    answer = bytearray()
    while piece := await reader.read(1 << 16):
        answer += piece
    writer.close()
    if (
        not answer.startswith(b"HTTP/1.1 200")
        or end not in answer[-4000:]
        or answer.count(b"word ") < num_tokens
    ):
        raise ClusterError(f"{path} answered {bytes(answer[:100])!r} ... {bytes(answer[-200:])!r}.")


def _report(costs: dict[str, list[float]], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "machine": describe_machine(),
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "pace_ms": arguments.pace_ms,
        "ms_per_token": {
            name: {"median": round(statistics.median(found), 4), "all": [round(cost, 4) for cost in found]}
            for name, found in costs.items()
        },
    }


def _print(report: dict[str, Any]) -> None:
    say = sys.stdout.write
    say(f"{summarize(report['machine'])}\n")
    say(f"{report['streams']} streams of {report['tokens']} tokens, steps of {report['pace_ms']:g} ms\n")
    say(f"{'API':<12} {'ms/token':>9} {'min..max':>15} {'of a core at 1,000 tokens/s':>28}\n")
    for name, found in report["ms_per_token"].items():
        spread = f"{min(found['all']):.3f}..{max(found['all']):.3f}"
        say(f"{name:<12} {found['median']:>9.3f} {spread:>15} {100 * found['median']:>26.1f} %\n")


if __name__ == "__main__":
    main()
