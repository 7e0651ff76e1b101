"""Run a job on several rank processes that share a mailbox, as the supervisor would start them.

run_ranks("tests/jobs.py", "job", num_ranks=2, args={...}) -> what each rank's job(mailbox, **args) gave (JSON)
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expertd.link import mailbox

ROOT = Path(__file__).parents[1]
# A living rank must not be taken for dead because the machine that runs the tests is busy.
PATIENT_S = 20.0


def run_ranks(
    file: Path, job: str, num_ranks: int, args: dict[str, Any], timeout_s: float = 120
) -> list[Any]:
    """Start the job on every rank and wait for all; a rank that fails fails the test, with its stderr."""
    fd = mailbox.create(num_ranks, args.pop("slot_bytes", 1 << 16))
    try:
        patient = {"pulse_timeout_s": PATIENT_S}
        ranks = [start_rank(file, job, fd, rank, num_ranks, args, patient) for rank in range(num_ranks)]
    finally:
        os.close(fd)
    return results_of(ranks, timeout_s)


def start_rank(
    file: Path,
    job: str,
    fd: int,
    rank: int,
    num_ranks: int,
    args: dict[str, Any],
    mailbox_args: dict[str, Any] | None = None,
) -> subprocess.Popen[str]:
    """Start one rank on the mailbox `fd`; arguments called `..._fd` are inherited."""
    more = [json.dumps(args), json.dumps(mailbox_args or {})]
    return subprocess.Popen(
        [sys.executable, __file__, str(file), job, str(fd), str(rank), str(num_ranks), *more],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        pass_fds=[fd, *{value for name, value in args.items() if name.endswith("_fd")} - {fd}],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _others(ranks: Sequence["subprocess.Popen[str]"]) -> str:
    """What ranks behind one that failed have said: it may have been their failure."""
    for process in ranks:
        process.kill()
    return "".join(f"\nand another:\n{process.communicate()[1][-3000:]}" for process in ranks)


def results_of(ranks: Sequence["subprocess.Popen[str]"], timeout_s: float = 120) -> list[Any]:
    """Wait for ranks and give what they gave."""
    results = []
    try:
        for rank, process in enumerate(ranks):
            out, err = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, (
                f"rank {rank} ended with {process.returncode}:\n{err[-3000:]}{_others(ranks[rank + 1 :])}"
            )
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return results


def main() -> None:
    file, job, fd, rank, num_ranks, args, mailbox_args = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("jobs", file)
    assert spec and spec.loader
    jobs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(jobs)
    with mailbox.Mailbox(int(fd), int(rank), int(num_ranks), **json.loads(mailbox_args)) as box:
        result = getattr(jobs, job)(box, **json.loads(args))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
