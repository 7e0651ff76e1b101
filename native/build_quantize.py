"""How cffi compiles the quantizer's kernels: API mode, with the header as the one source of declarations."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "quantize.h").read_text())
ffibuilder.set_source(
    "expertd.native._quantize",
    '#include <stddef.h>\n#include <stdint.h>\n#include "quantize.h"',
    sources=sorted(f"native/{p.name}" for p in HERE.glob("quantize*.c")),
    include_dirs=["native"],
    depends=["native/quantize.h", "native/quantize_private.h"],
    # No contraction: a processor that can fuse a product and a sum would choose other codes than one that cannot.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"],
)
