"""One remote file as a local one: of the same size, with holes, and a record of which blocks are there.

The record holds a digest per block, and a block counts as present only if its bytes have that digest: they are
compared the first time that it is used in a process. So neither file is ever synced, and their order on the disk
does not matter. A process killed between the two writes, a power cut that loses pages, a record that is torn or belongs
to another version of the file: each ends in a digest that does not fit, and the block is fetched again. Nothing
relies on finding holes: a file system may fill them, and zeros may be data.

The header of the file is real from the start and never dropped, so that readers which parse it and read lazily
(mx.load does) can open the file before any tensor is there. A dropped block's space goes back to the disk while
the file stays as it is, also for whoever has it open.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import struct
import sys
from pathlib import Path

from expertd.checkpoint.manifest import write_atomically

BLOCK_BYTES = 1 << 20
DIGEST_BYTES = 8
ABSENT = bytes(DIGEST_BYTES)
KEY_BYTES = 32
# Holes have to begin and end at a block of the file system.
HOLE_ALIGNMENT = 1 << 12
KEEP_SIZE, PUNCH_HOLE = 1, 2  # linux/falloc.h
F_PUNCHHOLE = 99  # sys/fcntl.h of macOS
UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY}


class BlockFile:
    """A file of `size` bytes at `path`, whose blocks come and go; its record lies at `record`.

    `version` says what the bytes are: with another one, nothing that is there counts. `header` are the file's first
    bytes. Different blocks may be written at the same time. Every method raises OSError as files do.
    """

    def __init__(self, path: Path, record: Path, size: int, version: str, header: bytes) -> None:
        self.path, self.size = path, size
        self.num_blocks = -(-size // BLOCK_BYTES)
        self._record = record
        self._header = header
        about = f"{size} {BLOCK_BYTES} {version}\n".encode()
        self._key = hashlib.blake2b(about + header, digest_size=KEY_BYTES).digest()
        self._digests = self._reuse() or self._begin()
        self._write(0, header)

    def span(self, block: int) -> tuple[int, int]:
        """The bytes [begin, end) of the file that a block has."""
        return block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.size)

    def blocks(self, begin: int, end: int) -> range:
        """The blocks that bytes [begin, end) lie in."""
        return range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES) if begin < end else begin // BLOCK_BYTES)

    def has(self, block: int) -> bool:
        """Whether the record says that the block is there."""
        return self._digest(block) != ABSENT

    def check(self, block: int) -> bool:
        """Whether the bytes of a recorded block are what was written; if not, it is there no longer."""
        begin, end = self.span(block)
        with self.path.open("rb") as file:
            file.seek(begin)
            found = _digest_of(file.read(end - begin))
        if found == self._digest(block):
            return True
        self._note(block, ABSENT)
        return False

    def write(self, first: int, data: bytes | bytearray) -> None:
        """Put whole blocks in, from block `first` on."""
        self._write(first * BLOCK_BYTES, data)
        with memoryview(data) as view:
            starts = range(0, len(data), BLOCK_BYTES)
            self._note(first, b"".join(_digest_of(view[i : i + BLOCK_BYTES]) for i in starts))

    def drop(self, block: int) -> bool:
        """Give the block's space back. False where the file system cannot: then the block stays."""
        begin, end = self.span(block)
        begin = max(begin, -(-len(self._header) // HOLE_ALIGNMENT) * HOLE_ALIGNMENT)
        end -= end % HOLE_ALIGNMENT
        digest = self._digest(block)
        self._note(block, ABSENT)
        if begin >= end:
            return True
        fd = os.open(self.path, os.O_RDWR)
        try:
            _punch(fd, begin, end - begin)
        except OSError as e:
            if e.errno not in UNSUPPORTED:
                raise
            self._note(block, digest)
            return False
        finally:
            os.close(fd)
        return True

    def drop_all(self) -> None:
        """Give the space of all blocks back, on any file system; the file stays the same one."""
        self._digests[:] = bytes(len(self._digests))
        self._save()
        os.truncate(self.path, 0)
        os.truncate(self.path, self.size)
        self._write(0, self._header)

    def _digest(self, block: int) -> bytes:
        return bytes(self._digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES])

    def _note(self, first: int, digests: bytes) -> None:
        at = first * DIGEST_BYTES
        self._digests[at : at + len(digests)] = digests
        with self._record.open("r+b") as file:
            file.seek(KEY_BYTES + at)
            file.write(digests)

    def _write(self, offset: int, data: bytes | bytearray) -> None:
        with self.path.open("r+b", buffering=0) as file, memoryview(data) as view:
            file.seek(offset)
            done = 0
            while done < len(data):
                done += file.write(view[done:])

    def _reuse(self) -> bytearray | None:
        """The digests of an earlier process, if file and record are still those of this version."""
        try:
            kept = self._record.read_bytes()
            same = self.path.stat().st_size == self.size and not self.path.is_symlink()
        except OSError:
            return None
        whole = len(kept) == KEY_BYTES + self.num_blocks * DIGEST_BYTES
        return bytearray(kept[KEY_BYTES:]) if same and whole and kept[:KEY_BYTES] == self._key else None

    def _begin(self) -> bytearray:
        self._record.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        with self.path.open("xb") as file:
            file.truncate(self.size)
        self._digests = bytearray(self.num_blocks * DIGEST_BYTES)
        self._save()
        return self._digests

    def _save(self) -> None:
        write_atomically(self._record, self._key + self._digests)


def _digest_of(data: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
    return digest if digest != ABSENT else b"\x01" * DIGEST_BYTES


def _punch(fd: int, offset: int, length: int) -> None:
    """Give [offset, offset + length) of a file back to the disk. Raises OSError, one of UNSUPPORTED where it cannot."""
    if sys.platform == "darwin":
        # struct fpunchhole_t: flags, reserved, offset, length
        fcntl.fcntl(fd, F_PUNCHHOLE, struct.pack("=IIqq", 0, 0, offset, length))
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
