"""How fast `expertd quantize` is beside `mlx_lm.convert`, and whether it stands being killed.

    python -m expertd.bench.convert [--repeats 5] [--json FILE] [--folder DIR]
    python -m expertd.bench.convert --soak [--kills 20] [--json FILE] [--folder DIR]

Method. Both programs round the same made-up checkpoint of 1.7 GB (bench/synthetic.py) to 2-bit experts, as
processes of their own that may use the same processors. Rounds alternate, the order reversed every other
one, after one unmeasured run of each, so that the source is in the page cache; before each run the disk is let
finish what the last one left. Times are of whole processes, imports and all; ours include hashing, and
waiting until everything is on the disk. Memory is the peak that the system counted for the process.

--soak converts 20 GB, once undisturbed, then killed (SIGKILL) at random moments and started again by the same
command, as often as --kills says. Every run must stay below two layers' tensors and 1 GiB; what a killed run
leaves must not be loadable; and the result must be that of the undisturbed run, to the byte.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expertd.bench.synthetic import Sizes, make_checkpoint
from expertd.checkpoint.inspect import check_checkpoint
from expertd.checkpoint.manifest import hash_files
from expertd.errors import CheckpointError, ClusterError, ConfigError, ExpertdError
from expertd.topology.machine import describe_machine, summarize

THROUGHPUT = Sizes(num_layers=6, num_experts=24)
SOAK = Sizes(num_layers=16, num_experts=128, vocabulary=65_536)
SOAK_PLANTED_BYTES = 1 << 16  # of 3 MB a tensor
LIMIT_S = 3600.0
# ru_maxrss: https://man.freebsd.org/cgi/man.cgi?getrusage(2) in bytes on macOS, kilobytes elsewhere.
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
# Differs with the time that a run takes.
NOT_COMPARED = ("report.html",)


@dataclass(frozen=True)
class Usage:
    """What one process took; `code` is negative for a signal."""

    code: int
    wall_s: float
    cpu_s: float
    peak_bytes: int


def main() -> None:
    arguments = _parser().parse_args()
    try:
        with _workplace(arguments.folder) as folder:
            report = (
                soak(folder, arguments.kills, arguments.seed)
                if arguments.soak
                else throughput(folder, arguments.repeats)
            )
    except ExpertdError as e:
        sys.stderr.write(f"convert: {e}\n")
        sys.exit(e.exit_code)
    report = {"machine": describe_machine(), **report}
    sys.stdout.write(f"{summarize(report['machine'])}\n{report.pop('text')}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expertd.bench.convert", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--soak", action="store_true", help="convert 20 GB, killed again and again")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each program (default 5)")
    parser.add_argument("--kills", type=int, default=20, help="how often --soak kills (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills (default 1)")
    parser.add_argument(
        "--folder", type=Path, help="where to work; 12 GB must be free (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, help="figures go there")
    return parser


@contextlib.contextmanager
def _workplace(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="expertd-convert-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Speed.


def throughput(folder: Path, repeats: int) -> dict[str, Any]:
    """Both programs in turn on the same checkpoint. Raises ClusterError when one fails."""
    if repeats < 1:
        raise ConfigError(f"--repeats {repeats}: wanted at least 1.")
    src = make_checkpoint(folder / "src", THROUGHPUT, planted_bytes=1 << 40)
    commands = {"expertd": ours(src, folder / "dst"), "mlx_lm.convert": theirs(src, folder / "dst")}
    taken: dict[str, list[Usage]] = {name: [] for name in commands}
    for number in range(repeats + 1):
        turn = list(commands.items())
        for name, command in turn if number % 2 else reversed(turn):
            usage = _measure(command, folder)
            if number:
                taken[name].append(usage)
    rows = {name: _row(usages, THROUGHPUT.num_bytes) for name, usages in taken.items()}
    ratio = rows["expertd"]["wall_s"] / rows["mlx_lm.convert"]["wall_s"]
    return {
        "kind": "throughput", "source_bytes": THROUGHPUT.num_bytes, "rows": rows, "wall_ratio": round(ratio, 3),
        "runs": {name: [asdict(usage) for usage in usages] for name, usages in taken.items()},
        "text": _table(rows, ratio),
    }  # fmt: skip


def ours(src: Path, dst: Path) -> list[str]:
    return [sys.executable, "-m", "expertd", "quantize", str(src), str(dst), "--effort", "plain"]


def theirs(src: Path, dst: Path) -> list[str]:
    own = ["--hf-path", str(src), "--mlx-path", str(dst), "-q", "--q-bits", "2", "--q-group-size", "64"]
    return [sys.executable, "-m", "mlx_lm", "convert", *own]


def _measure(command: list[str], folder: Path) -> Usage:
    os.sync()
    usage = _run(command, folder)
    if usage.code:
        raise ClusterError(f"{_what_failed(command, usage, folder)}")
    shutil.rmtree(folder / "dst")
    return usage


def _row(usages: list[Usage], source_bytes: int) -> dict[str, Any]:
    wall = [usage.wall_s for usage in usages]
    return {
        "wall_s": round(statistics.median(wall), 3),
        "min_s": round(min(wall), 3),
        "max_s": round(max(wall), 3),
        "cpu_s": round(statistics.median(usage.cpu_s for usage in usages), 3),
        "source_gb_per_s": round(source_bytes / statistics.median(wall) / 1e9, 3),
        "peak_bytes": max(usage.peak_bytes for usage in usages),
    }


def _table(rows: dict[str, dict[str, Any]], ratio: float) -> str:
    lines = [f"{'':<16}{'s':>8}{'min..max':>16}{'CPU s':>8}{'GB/s':>8}{'peak GB':>9}"]
    for name, row in rows.items():
        spread = f"{row['min_s']:.2f}..{row['max_s']:.2f}"
        lines.append(
            f"{name:<16}{row['wall_s']:>8.2f}{spread:>16}{row['cpu_s']:>8.2f}{row['source_gb_per_s']:>8.2f}"
            f"{row['peak_bytes'] / 1e9:>9.2f}"
        )
    return "\n".join([*lines, f"expertd takes {ratio:.2f} times as long as mlx_lm.convert\n"])


# Kills.


def soak(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Convert 20 GB undisturbed and killed.

    Raises ClusterError for other bytes, for a run over the bound on memory, and for remains that can be loaded.
    """
    src = make_checkpoint(folder / "src", SOAK, SOAK_PLANTED_BYTES)
    dst, bound = folder / "dst", 2 * SOAK.layer_bytes + (1 << 30)
    whole = _run(ours(src, dst), folder)
    if whole.code:
        raise ClusterError(_what_failed(ours(src, dst), whole, folder))
    wanted = _hashes(dst)
    shutil.rmtree(dst)
    rng, runs = random.Random(seed), [whole]
    num_killed = num_converted = 0
    is_complete = False
    while num_killed < kills or not is_complete:
        # A tenth of a run on average: twenty kills are spread over about two conversions.
        after_s = rng.uniform(0, whole.wall_s / 5) if num_killed < kills else None
        runs.append(usage := _run(ours(src, dst), folder, after_s))
        if usage.code not in (0, -9):
            raise ClusterError(_what_failed(ours(src, dst), usage, folder))
        num_killed += usage.code == -9
        _refuse_loadable(dst.with_name("dst.partial"))
        if is_complete := dst.exists():
            _compare(_hashes(dst), wanted)
            shutil.rmtree(dst)
            num_converted += 1
    peak = max(run.peak_bytes for run in runs)
    if peak > bound:
        raise ClusterError(f"a run took {peak / 1e9:.2f} GB of memory, the bound is {bound / 1e9:.2f} GB.")
    return {
        "kind": "soak", "source_bytes": SOAK.num_bytes, "kills": num_killed, "conversions": num_converted,
        "peak_bytes": peak, "bound_bytes": bound, "runs": [asdict(run) for run in runs],
        "text": f"{SOAK.num_bytes / 1e9:.1f} GB in {whole.wall_s:.0f} s undisturbed; {num_killed} kills over "
                f"{num_converted} conversions, every file the same; peak {peak / 1e9:.2f} GB of {bound / 1e9:.2f}\n",
    }  # fmt: skip


def _hashes(folder: Path) -> dict[str, str]:
    names = sorted(path.name for path in folder.iterdir() if path.name not in NOT_COMPARED)
    return hash_files(folder, names, lambda done, total: None)


def _compare(found: dict[str, str], wanted: dict[str, str]) -> None:
    if differing := sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name)):
        raise ClusterError(f"after kills {', '.join(differing)} differ from those of the undisturbed run.")


def _refuse_loadable(work: Path) -> None:
    """Raises ClusterError when any folder of a killed run passes for a checkpoint."""
    for folder in [work, *work.glob("**/")]:
        with contextlib.suppress(CheckpointError):
            check_checkpoint(folder)
            raise ClusterError(f"{folder.name} of a killed run can be loaded.")


# Processes.


def _run(command: list[str], folder: Path, kill_after_s: float | None = None) -> Usage:
    """Run a command to its end or its kill; what it says goes to `folder`/said."""
    began = time.monotonic()
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        timer = threading.Timer(LIMIT_S if kill_after_s is None else kill_after_s, process.kill)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return Usage(
        process.returncode,
        time.monotonic() - began,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * RSS_UNIT_BYTES,
    )


def _what_failed(command: list[str], usage: Usage, folder: Path) -> str:
    said = [line for line in (folder / "said").read_text(errors="replace").splitlines() if line.strip()]
    return f"{' '.join(command[2:4])} ended with code {usage.code}: {(said or ['it said nothing'])[-1][:300]}"


if __name__ == "__main__":
    main()
