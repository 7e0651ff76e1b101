"""How cffi compiles the transport: API mode, with the header as the one source of declarations."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(Path(__file__).with_name("mailbox.h").read_text())
ffibuilder.set_source(
    "expertd.native._transport",
    '#include <stddef.h>\n#include <stdint.h>\n#include "mailbox.h"',
    sources=["native/mailbox.c"],
    include_dirs=["native"],
    depends=["native/mailbox.h"],
    extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra"],
    libraries=[],
)
