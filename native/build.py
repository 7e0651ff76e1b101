"""How cffi compiles the transport: API mode, with the headers as the one source of declarations."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
# The contracts, in the order in which they build on each other; each has its .c beside it.
HEADERS = [
    name
    for name in ("mailbox.h", "transport.h", "verbs.h", "pump.h")
    if (HERE / name).with_suffix(".c").exists()
]

ffibuilder = FFI()
for header in HEADERS:
    ffibuilder.cdef((HERE / header).read_text())
ffibuilder.set_source(
    "expertd.native._transport",
    "\n".join(["#include <stddef.h>", "#include <stdint.h>", *(f'#include "{h}"' for h in HEADERS)]),
    # Not what cffi leaves here, and not the quantizer, which is a module of its own (build_quantize.py).
    sources=sorted(f"native/{p.name}" for p in HERE.glob("*.c") if not p.name.startswith(("_", "quantize"))),
    include_dirs=["native"],
    depends=sorted(f"native/{p.name}" for p in HERE.glob("*.h")),
    extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra"],
    libraries=["dl"],
)
