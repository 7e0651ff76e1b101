"""The C code runs on ARM: compiled for it from any machine, and run by QEMU where there is no such processor."""

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.native.compiling import (
    FLOATED,
    FLOATS,
    HERE,
    KERNELS,
    NATIVE,
    PRODUCTS,
    QUANTIZED,
    QUANTIZER,
    STRICT,
    TRANSPORT,
    UNCONTRACTED,
)

# The C library of Debian's libc6-arm64-cross. Without it Zig compiles one, musl, which takes it more than a minute.
GNU = Path("/usr/aarch64-linux-gnu")
SOURCES = (*TRANSPORT, "mailbox.c", "pump.c", *QUANTIZER)
RUN_S = 120

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def emulator() -> list[str]:
    """What runs an ARM program here: nothing on ARM itself."""
    if (platform.system(), platform.machine()) == ("Linux", "aarch64"):
        return []
    if found := shutil.which("qemu-aarch64"):
        return [found, "-L", str(GNU)] if (GNU / "lib/ld-linux-aarch64.so.1").exists() else [found]
    pytest.skip("no qemu-aarch64: on Debian, `apt-get install qemu-user libc6-arm64-cross`")


@pytest.fixture(scope="module")
def build(emulator: list[str], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile a driver of this folder with all of the C code that needs no hardware, for the C library that is there;
    linked whole, with musl, where there is none."""
    if not importlib.util.find_spec("ziglang"):
        pytest.skip("no cross compiler: `pip install ziglang` (100 MB), or make cross")
    folder, libc = tmp_path_factory.mktemp("arm64"), "gnu" if "-L" in emulator else "musl"

    def compiled(driver: str, *flags: str, sources: Iterable[str] = SOURCES) -> Path:
        out = folder / driver.removesuffix(".c")
        command = [
            sys.executable,
            "-m",
            "ziglang",
            "cc",
            "-target",
            f"aarch64-linux-{libc}",
            *STRICT,
            "-O2",
            *flags,
        ]
        command += [str(HERE / driver), *(str(NATIVE / s) for s in sources), "-o", str(out), "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return out

    return compiled


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("driver", ["drive.c", "drive_mailbox.c", "drive_pump.c"])
def test_runs(emulator: list[str], build: Build, driver: str) -> None:
    assert run([*emulator, str(build(driver))]) == "ok\n"


def test_quantizer_chooses_as_everywhere(emulator: list[str], build: Build) -> None:
    assert run([*emulator, str(build("drive_quantize.c", UNCONTRACTED))]) == QUANTIZED


@pytest.fixture(scope="module")
def kernels(build: Build) -> str:
    return str(build("drive_kernels.c", UNCONTRACTED, f"-I{NATIVE / 'kernels'}", sources=KERNELS))


def test_kernels_give_the_bits_of_x86(emulator: list[str], kernels: str) -> None:
    found = run([*emulator, kernels])
    assert found.endswith(PRODUCTS)
    if emulator:
        assert found == f"neon-i8mm neon portable\n{PRODUCTS}"


@pytest.mark.parametrize(("cpu", "isas"), [("neoverse-n1", "neon portable\n"), ("cortex-a72", "portable\n")])
def test_kernels_of_older_processors(emulator: list[str], kernels: str, cpu: str, isas: str) -> None:
    if not emulator:
        pytest.skip("no QEMU to be another processor")
    assert run([*emulator, "-cpu", cpu, kernels, "names"]) == isas


def test_float_operations_have_the_bits_that_they_have_everywhere(emulator: list[str], build: Build) -> None:
    """NEON beside plain C, both beside what the tests on x86-64 print."""
    program = build("drive_floats.c", UNCONTRACTED, f"-I{NATIVE / 'kernels'}", sources=FLOATS)
    assert run([*emulator, str(program)]) == FLOATED


def test_mutated_frames(emulator: list[str], build: Build) -> None:
    found = re.fullmatch(
        r"ok: (\d+) inputs\n", run([*emulator, str(build("fuzz_frame.c", "-DRANDOM_INPUTS")), "2"])
    )
    assert found and int(found[1]) > 20


def test_checksum_by_instruction_equals_the_table(emulator: list[str], build: Build, tmp_path: Path) -> None:
    """QEMU lists what it translates, which is what is about to run: both instructions of the fast way are there."""
    program, log = str(build("drive_crc.c")), tmp_path / "translated"
    traced = [*emulator, "-d", "in_asm", "-D", str(log), program] if emulator else [program]
    assert run(traced) == "ok\n"
    if emulator:
        ran = set(re.findall(r"\b(crc32cx|crc32cb|pmull)\b", log.read_text()))
        assert ran == {"crc32cx", "crc32cb", "pmull"}
