"""Two processes with one end of a link each, for test_verbs.py and test_verbs_temper.py."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.link.provider_fixture import Fabric

JOBS = Path(__file__).with_name("verbs_jobs.py")
IPS = ("10.0.0.1", "10.0.0.2")


def start(
    fabric: Fabric,
    job: str,
    host: int,
    side: socket.socket,
    args: dict[str, Any],
    temper: str = "",
    ip: str = "",
) -> subprocess.Popen[str]:
    """Start one end; its side socket is handed over."""
    config = {"library": str(fabric.library), "local_ip": IPS[host], "lint": True} | args.get("config", {})
    lists = job == "list_devices"
    args = {"library": str(fabric.library)} if lists else args | {"config": config}
    with side:
        return subprocess.Popen(
            [sys.executable, str(JOBS), job, str(host), str(side.fileno()), json.dumps(args)],
            pass_fds=[side.fileno()],
            env=os.environ | fabric.environment(ip or IPS[host], temper),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process, if it lives, and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


def outcome(process: subprocess.Popen[str], timeout_s: float = 60) -> dict[str, Any]:
    """What a process gave; {"status": n} for one that gave nothing."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        end(process)
    if not out:
        assert "Traceback" not in err, err[-3000:]
        return {"status": process.returncode}
    return dict(json.loads(out))


def run_pair(
    fabric: Fabric,
    job: str = "pair",
    tempers: tuple[str, str] = ("", ""),
    ips: tuple[str, str] = IPS,
    per_host: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
    **args: Any,
) -> list[dict[str, Any]]:
    """Run the job on both hosts to its end and give both outcomes."""
    sides = socket.socketpair()
    both = [start(fabric, job, h, sides[h], args | per_host[h], tempers[h], ips[h]) for h in (0, 1)]
    try:
        return [outcome(p) for p in both]
    finally:
        for p in both:
            end(p)


def run_one(fabric: Fabric, job: str, temper: str = "", ip: str = IPS[0], **args: Any) -> dict[str, Any]:
    """Run the job on host 0 alone."""
    mine, theirs = socket.socketpair()
    with theirs:
        return outcome(start(fabric, job, 0, mine, args, temper, ip))
