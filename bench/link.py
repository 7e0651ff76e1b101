"""Latency and bandwidth of every link of this machine, each beside its floor: `expertd bench link`.

Method. Two processes, pinned to a core each, swap bytes with the library that is installed, called from a loop in C
(floor.c, compiled when the benchmark starts); only MLX's ring is driven from Python, by graphs. Each way of moving
bytes takes its turn in blocks, the order reversed every other round, so that noise and drift hit all; 20 unmeasured
operations open a block. `swap` is one exchange: both sides send and receive at once. `one way` is half a round
trip in which the sides take turns; our exchange is symmetric, so there the other side's message is an empty one,
which the floor does not send. Times are those of side 0. p99.9 is given from 1000 samples on, so not for 1 MiB.
The bytes that came are compared with the right ones after each block. Buffers are warm: the same ones each time.

Floors. Mailbox: the barest swap through shared memory (copy in, flag, spin, copy out). TCP: the same bytes on a bare
socket with TCP_NODELAY, the better of spinning and blocking. Our TCP also computes a CRC32C of all that it sends and
receives, which the floor does not: its cost, measured apart, is in the column `crc`, and the ratio is given with and
without it. `linked` is the way of ranks on two hosts: mailbox, link process, TCP, link process, mailbox; what its two
hops cost is its difference to `tcp`. `verbs` is the same way over RDMA, where a device is ready; its floor is
`ib_send_lat -c UC`, which has no mailboxes, link processes, copies or checksums. Why either is missing is said.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertd.bench import verbs
from expertd.bench.compiling import compile_library
from expertd.bench.hosts import Way, two_hosts
from expertd.bench.link_side import SLOT_BYTES, Job
from expertd.bench.processes import free_ports, wait_for_all
from expertd.errors import ClusterError
from expertd.topology.machine import describe_machine, own_cores, summarize

SIZES = (64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
QUICK_SIZES, QUICK_REPEATS = (4 << 10, 16 << 10), 2
NUM_TOOL_MESSAGES = 1000
DEADLINE_S = 300.0
HERE = Path(__file__).parent
# Ours, its floors (the best of them counts), and the most that the ratio may be, at the sizes of a decode step.
GOALS = {"mailbox": (("memory",), 1.3), "tcp": (("spinning", "blocking"), 1.3)}
GOAL_SIZES = (4 << 10, 16 << 10)


def run(repeats: int, json_file: Path | None, quick: bool = False, verbs_library: str = "") -> None:
    """Measure, print tables, write JSON if asked. Raises ConfigError without a C compiler, ClusterError on failure."""
    sizes, repeats = (QUICK_SIZES, QUICK_REPEATS) if quick else (SIZES, repeats)
    report = measure(sizes, repeats, verbs_library)
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(format_report(report))


def measure(sizes: tuple[int, ...], repeats: int, verbs_library: str = "") -> dict[str, Any]:
    """Measure in processes that have all ended when this returns or raises (see `run`).

    `missing` of the report says for each kind of link that was not measured why.
    """
    missing: dict[str, str] = {}
    usable = _usable(verbs_library, missing)
    cores = own_cores(4) or own_cores(2)
    with tempfile.TemporaryDirectory(prefix="expertd-bench-") as name:
        folder = Path(name)
        library = compile_library(HERE / "floor.c", folder)
        with ExitStack() as stack:
            fds = _fds(stack, cores, usable, verbs_library, missing)
            rows = _run_sides(stack, folder, library, cores, fds, sizes, repeats)
    _add_tool(rows, usable, missing)
    for row in rows:
        row["ratios"] = _ratios(row)
    report = {"machine": describe_machine(), "cores": cores, "repeats": repeats, "rows": rows}
    return {**report, "missing": missing}


def _usable(library: str, missing: dict[str, str]) -> verbs.Usable | None:
    try:
        return verbs.find(library)
    except ClusterError as e:
        missing["verbs"] = str(e)
        return None


def _add_tool(rows: list[dict[str, Any]], usable: verbs.Usable | None, missing: dict[str, str]) -> None:
    """Put the usual tool's figures into the rows, or why there are none."""
    if usable is None:
        return
    try:
        found = verbs.usual_tool(usable, tuple(row["bytes"] for row in rows), NUM_TOOL_MESSAGES)
    except ClusterError as e:
        missing[verbs.TOOL] = str(e)
        return
    for row, figures in zip(rows, found, strict=True):
        row[verbs.TOOL] = {"one_way": figures}


# The two sides.


def _fds(
    stack: ExitStack,
    cores: list[int],
    usable: verbs.Usable | None,
    verbs_library: str,
    missing: dict[str, str],
) -> list[dict[str, int]]:
    """What each side gets by descriptor (link_side.Job)."""
    from expertd.link import mailbox

    fds = {name: mailbox.create(2, SLOT_BYTES) for name in ("mailbox", "memory")}
    for fd in fds.values():
        stack.callback(os.close, fd)
    lifeline, write_end = os.pipe()
    stack.callback(os.close, lifeline)
    stack.callback(os.close, write_end)
    pairs = {name: _tcp_pair(stack) for name in ("connection", "socket")}
    linked = {"linked": two_hosts(stack, SLOT_BYTES, cores[2:] or cores)}
    if usable:
        try:
            way = Way("verbs", usable.address, verbs_library)
            linked["verbs"] = two_hosts(stack, SLOT_BYTES, cores[2:] or cores, way)
        except ClusterError as e:
            missing["verbs"] = str(e)
    return [
        {
            **fds,
            "lifeline": lifeline,
            **{name: pair[side] for name, pair in linked.items()},
            **{name: pair[side].fileno() for name, pair in pairs.items()},
        }
        for side in range(2)
    ]


def _run_sides(
    stack: ExitStack,
    folder: Path,
    library: Path,
    cores: list[int],
    fds: list[dict[str, int]],
    sizes: tuple[int, ...],
    repeats: int,
) -> list[dict[str, Any]]:
    (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    processes: list[subprocess.Popen[bytes]] = []
    stack.callback(_end, processes)
    for side in range(2):
        job = Job(side, str(library), fds[side], cores[side : side + 1], list(sizes), repeats)
        processes.append(_spawn(job, folder))
    wait_for_all(processes, folder, DEADLINE_S)
    rows: list[dict[str, Any]] = json.loads((folder / "0.out").read_text())
    return rows


def _tcp_pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = stack.enter_context(socket.create_connection(server.getsockname()))
        far = stack.enter_context(server.accept()[0])
    for s in (near, far):
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


def _spawn(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    ring = {"MLX_RANK": str(job.side), "MLX_HOSTFILE": str(folder / "hosts.json")}
    with open(folder / f"{job.side}.out", "wb") as out, open(folder / f"{job.side}.err", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "expertd.bench.link_side", json.dumps(asdict(job))],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **ring},
            pass_fds=list(job.fds.values()),
            process_group=0,  # the terminal's Ctrl-C is ours alone
        )


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


# The report.


def _ratios(row: dict[str, Any]) -> dict[str, Any]:
    """Ours to its best floor, of p50s, and the range over the rounds; TCP also without its checksums."""
    ratios = {}
    for ours, (floors, goal) in GOALS.items():
        for pattern in ("swap", "one_way"):
            mine = row[ours][pattern]
            floor = min((row[name][pattern] for name in floors), key=lambda f: float(f["p50_us"]))
            crc = row["crc"]["swap"]["p50_us"] if ours == "tcp" else 0.0  # one sender's and one receiver's
            rounds = [a / b for a, b in zip(mine["rounds_us"], floor["rounds_us"], strict=True)]
            ratio = {
                "floor_p50_us": floor["p50_us"],
                "ratio": round(mine["p50_us"] / floor["p50_us"], 3),
                "ratio_without_crc": round((mine["p50_us"] - crc) / floor["p50_us"], 3),
                "rounds": [round(min(rounds), 3), round(max(rounds), 3)],
            }
            if row["bytes"] in GOAL_SIZES and pattern == "swap":
                ratio |= {"goal": goal, "met": ratio["ratio_without_crc"] <= goal}
            ratios[f"{ours}_{pattern}"] = ratio
    for pattern in ("swap", "one_way"):
        hop = row["linked"][pattern]["p50_us"] - row["tcp"][pattern]["p50_us"]
        ratios[f"linked_{pattern}"] = {"hop_us": round(hop, 3)}
    if "verbs" in row and verbs.TOOL in row:
        more = row["verbs"]["one_way"]["p50_us"] - row[verbs.TOOL]["one_way"]["p50_us"]
        ratios["verbs_one_way"] = {"over_tool_us": round(more, 3)}
    return ratios


def format_report(report: dict[str, Any]) -> str:
    """The tables, for people."""
    lines = [summarize(report["machine"]), _placing(report["cores"]), "Medians of all rounds, in µs."]
    for pattern, title in (("swap", "swap: both sides at once"), ("one_way", "one way: half a round trip")):
        lines += ["", title, *_table(report["rows"], pattern)]
    lines += [f"{kind}: not measured: {why}" for kind, why in report["missing"].items()]
    return "\n".join(lines) + "\n"


def _placing(cores: list[int]) -> str:
    if not cores:
        return "Not pinned (fewer than two cores, or a system without pinning)."
    text = f"The two sides are pinned to cores {cores[0]} and {cores[1]}"
    if len(cores) == 2:
        return f"{text}; `linked` has more processes than cores: a link process shares the core of its side."
    return f"{text}, their link processes to {cores[2]} and {cores[3]}."


def _table(rows: list[dict[str, Any]], pattern: str) -> list[str]:
    kinds = [k for k, v in rows[0].items() if isinstance(v, dict) and pattern in v]
    lines = [
        f"{'size':>7}  {'link':<11} {'p50':>9} {'p99':>9} {'p99.9':>9} {'GB/s':>6}  of its floor (range)"
    ]
    for row in rows:
        for kind in kinds:
            one, ratio = row[kind][pattern], row["ratios"].get(f"{kind}_{pattern}")
            p999 = "-" if one["p999_us"] is None else f"{one['p999_us']:.2f}"
            line = f"{_size(row['bytes']):>7}  {kind:<11} {one['p50_us']:9.2f} {one['p99_us']:9.2f} {p999:>9}"
            line += f" {row['bytes'] / one['p50_us'] / 1e3:6.2f}"
            lines.append(line + (_verdict(ratio, kind) if ratio else ""))
    return lines


def _verdict(ratio: dict[str, Any], kind: str) -> str:
    if "hop_us" in ratio:
        return f"  two hops: {ratio['hop_us']:+.2f} on tcp"
    if "over_tool_us" in ratio:
        return f"  {ratio['over_tool_us']:+.2f} on {verbs.TOOL}"
    text = f"  {ratio['ratio']:.2f}x ({ratio['rounds'][0]:.2f}..{ratio['rounds'][1]:.2f})"
    if kind == "tcp":
        text += f", {ratio['ratio_without_crc']:.2f}x without crc"
    if "goal" in ratio:
        text += f"; goal {ratio['goal']}: {'met' if ratio['met'] else 'missed'}"
    return text


def _size(num_bytes: int) -> str:
    return f"{num_bytes} B" if num_bytes < 1024 else f"{num_bytes >> 10} KiB"
