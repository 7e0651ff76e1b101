"""Run a command on hosts with real RDMA verbs: Soft-RoCE in a QEMU guest, needing neither KVM nor root.

    python -m tests.rxe.boot --hosts 2 -- ip netns exec a ibv_devinfo

The command sees this machine's files, read-only, at their paths; the checkout is writable; /tmp is empty. Its
output comes out here, its exit status is ours. 124: it ran past --timeout; 125: the guest failed, with the reason.
README.md beside this file says what it needs and what can be learned here.

QEMU is a child that dies with us, so nothing is left whoever is killed. The status comes through a folder shared with
the guest, the output through a virtio port that is QEMU's standard output.
"""

import argparse
import contextlib
import ctypes
import json
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tests.rxe import kernel
from tests.rxe.kernel import ROOT, HarnessError

TIMED_OUT = 124
FAILED = 125
QEMU = "qemu-system-x86_64"
HERE = Path(__file__).resolve().parent
# What of our environment the command gets; the rest stays outside.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TERM", "VIRTUAL_ENV")
PASSED_ON_PREFIXES = ("XD_", "EXPERTD_", "PYTEST_")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.rxe.boot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--hosts", type=int, default=2, help="2 to 8, each with a cable to each other (%(default)s)"
    )
    parser.add_argument("--mtu", type=int, default=4200, help="of the cables; 4200 gives a path MTU of 4096")
    parser.add_argument("--memory", type=int, default=1024, metavar="MiB", help="of the guest (%(default)s)")
    parser.add_argument("--cpus", type=int, default=1, help="more are slower on a busy machine (%(default)s)")
    parser.add_argument("--timeout", type=float, default=540, metavar="S", help="for all of it (%(default)s)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Boot, run, and give the exit status."""
    options = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if shutil.which(QEMU) is None:
            raise HarnessError(f"no command {QEMU}: apt-get install qemu-system-x86")
        image, modules = kernel.fetch()
        with tempfile.TemporaryDirectory(prefix="rxe-") as folder:
            return run(options, Path(folder), image, modules)
    except HarnessError as e:
        print(f"rxe: {e}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run(options: argparse.Namespace, folder: Path, image: Path, modules: list[Path]) -> int:
    """One guest, from boot to power-off. `folder` is empty and ours."""
    control = folder / "control"
    control.mkdir()
    environment = {k: v for k, v in os.environ.items() if k in PASSED_ON or k.startswith(PASSED_ON_PREFIXES)}
    job = {
        "argv": options.command,
        "cwd": os.getcwd(),
        "environment": environment,
        "num_hosts": options.hosts,
        "mtu": options.mtu,
    }
    (control / "job.json").write_text(json.dumps(job))
    paths = {"XD_WORK": ROOT, "XD_PYTHON": sys.executable, "XD_GUEST": HERE / "guest.py"}
    settings = "".join(f"{name}={shlex.quote(str(path))}\n" for name, path in paths.items())
    (folder / "initrd").write_bytes(kernel.initrd(HERE / "init.sh", settings, modules))
    with qemu(options, folder, image) as process:
        ended = copy_output(process, time.monotonic() + options.timeout)
    return verdict(options, folder, ended)


def verdict(options: argparse.Namespace, folder: Path, ended: bool) -> int:
    """The exit status, after saying why when it is not the command's own."""
    status = folder / "control/status"
    if status.exists() and ended:
        return int(status.read_text())
    why = "the guest failed" if ended else f"not done after {options.timeout:g} s"
    console = (folder / "console").read_text(errors="replace").splitlines()[-30:]
    print(f"rxe: {why}; the end of its console:", *console, sep="\n  ", file=sys.stderr)
    return FAILED if ended else TIMED_OUT


@contextlib.contextmanager
def qemu(options: argparse.Namespace, folder: Path, image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The guest's process, gone at the end. The output port needs standard input to stay open."""
    argv = [QEMU, "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", str(options.cpus)]
    argv += ["-m", str(options.memory), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-kernel", str(image), "-initrd", str(folder / "initrd")]
    argv += ["-append", "console=ttyS0 quiet panic=-1", "-serial", f"file:{folder / 'console'}"]
    argv += ["-device", "virtio-serial-pci", "-chardev", "stdio,id=out,signal=off"]
    argv += ["-device", "virtserialport,chardev=out,name=xd.out"]
    for tag, path, more in (
        ("root", "/", ",readonly=on"),
        ("work", ROOT, ""),
        ("control", folder / "control", ""),
    ):
        escaped = str(path).replace(",", ",,")
        argv += ["-fsdev", f"local,id={tag},path={escaped},security_model=none,multidevs=remap{more}"]
        argv += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _die_with_parent() -> None:
    """PR_SET_PDEATHSIG, so that a killed harness leaves no guest."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def copy_output(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Copy the command's output to ours until the guest is off; False when the deadline came first."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left) and not _copy_some(process.stdout, sys.stdout.buffer):
                return True
    return False


def _copy_some(source: IO[bytes], target: IO[bytes]) -> bool:
    piece = os.read(source.fileno(), 65536)
    target.write(piece)
    target.flush()
    return bool(piece)


if __name__ == "__main__":
    sys.exit(main())
