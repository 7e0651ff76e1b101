"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer, driven by C: no Python between."""

import platform
import re
import subprocess
from pathlib import Path

import pytest

from tests.native.compiling import (
    CALLS,
    EMULATED,
    FLOATED,
    FLOATS,
    KERNELS,
    NATIVE,
    PRODUCTS,
    QUANTIZED,
    QUANTIZER,
    THREADS,
    TRANSPORT,
    UNCONTRACTED,
    build,
    compiler,
    run,
)

FUZZ_S = 2


def test_transport(tmp_path: Path) -> None:
    assert run(build(tmp_path / "drive", "drive.c", TRANSPORT)) == "ok\n"


def test_mailbox(tmp_path: Path) -> None:
    assert run(build(tmp_path / "drive", "drive_mailbox.c", ["mailbox.c"])) == "ok\n"


def test_pump(tmp_path: Path) -> None:
    assert run(build(tmp_path / "drive", "drive_pump.c", [*TRANSPORT, "mailbox.c", "pump.c"])) == "ok\n"


def test_quantizer(tmp_path: Path) -> None:
    assert run(build(tmp_path / "drive", "drive_quantize.c", QUANTIZER, UNCONTRACTED)) == QUANTIZED


@pytest.fixture(scope="module")
def emulation() -> str:
    """What is in the way of emulating AVX-512 here; "" if nothing is."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the emulation is for x86-64"
    probe = [compiler(), "-E", "-include", "simde/x86/avx512.h", "-x", "c", "/dev/null"]
    return (
        "no SIMDe: on Debian, `apt-get install libsimde-dev`"
        if subprocess.run(probe, capture_output=True).returncode
        else ""
    )


@pytest.fixture(scope="module")
def products(emulation: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What drive_kernels.c prints. It takes 20 s to build: once for all tests."""
    flags = CALLS if emulation else (*CALLS, *EMULATED)
    return run(build(tmp_path_factory.mktemp("kernels") / "drive", "drive_kernels.c", KERNELS, *flags))


def test_kernels(products: str) -> None:
    assert products.endswith(f" portable\n{PRODUCTS}") or products == f"portable\n{PRODUCTS}"


def test_kernels_for_avx512(products: str, emulation: str) -> None:
    """Few of the machines that run these tests have it."""
    if emulation:
        pytest.skip(emulation)
    assert products == f"avx512 avx2 portable\n{PRODUCTS}"


def test_threads_of_the_kernels(tmp_path: Path) -> None:
    sources = ["kernels/pool.c"]
    include = CALLS[1]
    assert run(build(tmp_path / "drive", "drive_pool.c", sources, include)) == "ok\n"
    program = build(tmp_path / "threads", "drive_pool.c", sources, include, sanitize=THREADS)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run with this kernel's random addresses")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr[-3000:]


def test_float_operations(tmp_path: Path) -> None:
    flags = (UNCONTRACTED, f"-I{NATIVE / 'kernels'}", "-g0")  # -g: half a minute more
    assert run(build(tmp_path / "drive", "drive_floats.c", FLOATS, *flags)) == FLOATED


def test_mutated_frames(tmp_path: Path) -> None:
    """The short form of `make fuzz`."""
    program = build(tmp_path / "fuzz", "fuzz_frame.c", TRANSPORT, "-DRANDOM_INPUTS")
    found = re.fullmatch(r"ok: (\d+) inputs\n", run(program, str(FUZZ_S)))
    assert found
    assert int(found[1]) > 100
