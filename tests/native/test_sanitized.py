"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer, driven by C: no Python between."""

import re
from pathlib import Path

from tests.native.compiling import (
    FLOATED,
    FLOATS,
    NATIVE,
    QUANTIZED,
    QUANTIZER,
    TRANSPORT,
    UNCONTRACTED,
    build,
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


def test_float_operations(tmp_path: Path) -> None:
    flags = (UNCONTRACTED, f"-I{NATIVE / 'kernels'}", "-g0")  # -g: half a minute more
    assert run(build(tmp_path / "drive", "drive_floats.c", FLOATS, *flags)) == FLOATED


def test_mutated_frames(tmp_path: Path) -> None:
    """The short form of `make fuzz`."""
    program = build(tmp_path / "fuzz", "fuzz_frame.c", TRANSPORT, "-DRANDOM_INPUTS")
    found = re.fullmatch(r"ok: (\d+) inputs\n", run(program, str(FUZZ_S)))
    assert found
    assert int(found[1]) > 100
