import platform
import subprocess
import sys

import pytest

# A tensor of 64 MiB is made three times; the page faults of the third are counted.
PROGRAM = """
import resource, sys
from expertd.quant.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"1" * (64 << 20))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_the_next_tensor_finds_memory_that_is_there() -> None:
    kept, returned = (_faults(how) for how in ("kept", "returned"))
    assert kept < 100 < returned


def _faults(how: str) -> int:
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, check=True, timeout=60, text=True).stdout)
