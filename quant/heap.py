"""What malloc does with memory that is free again, while tensors of many megabytes come and go."""

import ctypes
import platform

# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let this process keep up to KEPT_BYTES that it freed, for its next tensor; for larger tensors nothing changes.

    glibc gives each tensor above 32 MiB pages of its own and gives these back at once, so that the kernel clears new
    ones for the next: 3 of the 15 seconds of processor time in which 1.75 GB are rounded (bench/LOG.md). Other
    libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
