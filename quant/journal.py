"""The record of what a conversion has written so far: one JSON line per unit, appended, never changed.

The first line is the header, which says what run this is; it is written with the file, in one rename. A line
counts only with its line feed, so that one torn by a kill does not; whatever is no record is left out, and
its unit is written again. A later line for the same unit replaces the earlier.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# macOS has none; there fsync does as little, and neither waits for the drive's own cache.
sync_data = getattr(os, "fdatasync", os.fsync)


@dataclass(frozen=True)
class Record:
    """The CRC-32 of a unit's bytes, and what its maker noted about it."""

    crc32: int
    note: dict[str, Any] = field(default_factory=dict)


class Journal:
    """Units by name as they are on the disk. `append` returns when its lines are there, too."""

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, -1

    def read(self) -> tuple[dict[str, Any] | None, dict[str, Record]]:
        """The header, None if it is damaged, and the newest record of each unit."""
        first, *lines = self._path.read_bytes().split(b"\n")[:-1] or [b""]
        records = (_record(_object(line)) for line in lines)
        return _object(first), dict(record for record in records if record)

    def create(self, header: dict[str, Any], records: Mapping[str, Record]) -> None:
        """Replace the file by this header and these records, all at once, and open it for `append`."""
        self.close()
        fresh = self._path.with_name(self._path.name + ".new")
        with fresh.open("wb") as file:
            file.write(_line(header) + b"".join(_lines(records.items())))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        sync_path(self._path.parent)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def append(self, records: Iterable[tuple[str, Record]]) -> None:
        data = memoryview(b"".join(_lines(records)))
        while data:
            data = data[os.write(self._fd, data) :]
        sync_data(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def sync_path(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lines(records: Iterable[tuple[str, Record]]) -> Iterable[bytes]:
    return (_line({"unit": name, "crc32": r.crc32, "note": r.note}) for name, r in records)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"  # ASCII: any line feed in a name is escaped


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _record(value: dict[str, Any] | None) -> tuple[str, Record] | None:
    name, crc32, note = ((value or {}).get(key) for key in ("unit", "crc32", "note"))
    if isinstance(name, str) and isinstance(crc32, int) and isinstance(note, dict):
        return name, Record(crc32, note)
    return None
