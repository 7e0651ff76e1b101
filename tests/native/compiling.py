"""Compile C beside the package: the sources in native/ with a driver of these tests, under the sanitizers."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native"
TRANSPORT = ("crc32c.c", "frame.c", "transport.c", "tcp.c", "self_test.c")
QUANTIZER = tuple(sorted(p.name for p in NATIVE.glob("quantize_*.c")))
KERNELS = tuple(sorted(f"kernels/{p.name}" for p in (NATIVE / "kernels").glob("*.c")))
# The float operations of native/kernels/: without cpu.c and the affine products.
FLOATS = (
    *(f"kernels/{part}.c" for part in ("attention", "numbers", "ops", "plain", "pool", "product")),
    *(f"kernels/floats_{isa}.c" for isa in ("avx2", "neon", "portable")),
)
# As in native/build_quantize.py: or the bits would depend on the processor.
UNCONTRACTED = "-ffp-contract=off"
# What drive_quantize.c prints on every processor, with every compiler. Kernels that choose otherwise change it.
QUANTIZED = "ok 0e8b96e04ae2668c\n"
# The last line of drive_kernels.c, the same on every processor.
PRODUCTS = "ok 990102fa34a56b62\n"
# The kernels' functions as calls: inlined as in the product, they take GCC minutes under the sanitizers. Where these
# make it ignore how far a loop is to be unrolled it warns, which is no error.
CALLS = ("-DXD_INLINE=static __attribute__((unused))", f"-I{NATIVE / 'kernels'}", UNCONTRACTED, "-Wno-error")
# What drive_floats.c prints, likewise. An order of sums or an approximation that is changed changes it.
FLOATED = "ok 01960742af6d2291\n"
# With AVX-512 in plain C (avx512_emulated.h).
EMULATED = (f"-I{HERE}", "-DXD_SIMDE", "-mavx2", "-mfma", "-mf16c")
STRICT = ("-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}")
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = ("-g", "-O1", "-fsanitize=thread")
PROBE = "int main(void) { return 0; }\n"


def compiler(sanitize: tuple[str, ...] = SANITIZE) -> str:
    """A compiler that can link the sanitizers; skips the test, with the reason, where there is none."""
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler: `cc` is not found")
    command = [cc, *sanitize, "-x", "c", "-", "-o", "/dev/null"]
    probe = subprocess.run(command, input=PROBE, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"cc cannot link the sanitizers: {probe.stderr.strip().splitlines()[-1]}")
    return cc


def build(
    out: Path, driver: str, sources: Iterable[str], *flags: str, sanitize: tuple[str, ...] = SANITIZE
) -> Path:
    """Compile a driver of this folder with sources of native/."""
    files = [HERE / driver, *(NATIVE / name for name in sources)]
    command = [
        compiler(sanitize),
        *STRICT,
        *sanitize,
        *flags,
        *map(str, files),
        "-o",
        str(out),
        "-lpthread",
        "-lm",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def run(program: Path, *args: str, timeout_s: float = 120) -> str:
    """What it prints; a sanitizer's report, or any other end than 0, fails the test."""
    done = subprocess.run([program, *args], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return done.stdout
