"""How cffi compiles the CPU kernels: API mode, with the headers as the one source of declarations."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent / "kernels"
HEADERS = [name for name in ("kernels.h", "ops.h") if (HERE / name).exists()]

ffibuilder = FFI()
for header in HEADERS:
    ffibuilder.cdef((HERE / header).read_text())
ffibuilder.set_source(
    "expertd.native._kernels",
    "\n".join(["#include <stddef.h>", "#include <stdint.h>", *(f'#include "{h}"' for h in HEADERS)]),
    sources=sorted(f"native/kernels/{p.name}" for p in HERE.glob("*.c")),
    include_dirs=["native/kernels"],
    depends=sorted(f"native/kernels/{p.name}" for p in HERE.glob("*.h")),
    # No contraction: a fused product and sum rounds once, and only where the order of a sum says so.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"],
    libraries=["pthread"],
)
