"""What a checkpoint is, to the byte: its files with sizes and SHA-256, and one hash over all of them.

Two hosts may only work together on the same bytes, and 100 GB are not read again at every start: the manifest of a
folder is kept in the user's cache, and a file is hashed anew only when its size, time or inode changed.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertd.checkpoint.config import read_json
from expertd.checkpoint.locate import WANTED_FILES
from expertd.errors import CheckpointError

# Written by our quantizer: every other file of the folder, with size and SHA-256, and how it was made.
QUANTIZATION_MANIFEST = "quantization_manifest.json"
# Plain names of data files: nothing that is run, nothing outside the folder. Peers' manifests are checked by it too.
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.(?:safetensors|json|jinja|model|txt)", re.ASCII)
MAX_FILES = 10_000
HASH_THREADS = 4
_ANEW = "Copy or download the checkpoint again."


@dataclass(frozen=True)
class FileEntry:
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint, sorted by name. `content_hash` is 64 hex digits."""

    files: tuple[FileEntry, ...]

    @property
    def content_hash(self) -> str:
        """SHA-256 over one line `name size sha256` per file, in the order of their names."""
        lines = (f"{f.name} {f.size} {f.sha256}\n" for f in sorted(self.files, key=lambda f: f.name))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        return sum(f.size for f in self.files)


def check_manifest(files: list[FileEntry]) -> Manifest:
    """A manifest that came from elsewhere. Raises CheckpointError when it is not one that we could have made."""
    names = [f.name for f in files]
    if not 0 < len(files) <= MAX_FILES or len({n.lower() for n in names}) != len(names):
        raise CheckpointError(f"manifest: {len(files)} files, wanted 1 to {MAX_FILES}, no name twice.")
    for f in files:
        if not FILE_NAME.fullmatch(f.name) or f.size < 0 or not re.fullmatch("[0-9a-f]{64}", f.sha256):
            raise CheckpointError(f"manifest: {f.name[:80]!r} is not a plain file of a checkpoint.")
    return Manifest(tuple(files))


def file_names(folder: Path) -> list[str]:
    """The files of a checkpoint's folder that make it what it is."""
    found = {path.name for pattern in WANTED_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(name for name in found if FILE_NAME.fullmatch(name))


def make_manifest(
    folder: Path, cache: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Manifest:
    """The manifest of `folder`; only what is not in the folder `cache` is read. `progress(bytes done, of)`.

    Raises CheckpointError when a file cannot be read or changes meanwhile.
    """
    kept_at = cache / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    kept = _read_kept(kept_at)
    names = file_names(folder)
    stats = {name: _fingerprint(folder / name) for name in names}
    fresh = [name for name in names if kept.get(name, {}).get("seen") != stats[name]]
    hashes = hash_files(folder, fresh, progress)
    for name in fresh:
        if _fingerprint(folder / name) != stats[name]:
            raise CheckpointError(
                f"{folder / name}: changed while it was read. Try again when it is complete."
            )
        kept[name] = {"seen": stats[name], "sha256": hashes[name]}
    if fresh:
        _keep(kept_at, {name: kept[name] for name in names})
    return Manifest(tuple(FileEntry(n, stats[n][0], kept[n]["sha256"]) for n in names))


def check_sizes(folder: Path) -> tuple[FileEntry, ...]:
    """The files that the folder's quantization manifest lists, none without one; their sizes are right.

    Raises CheckpointError for a manifest that is none, a file that is absent, of another size, or a shard that
    is not listed: mlx-lm would load it.
    """
    path = folder / QUANTIZATION_MANIFEST
    if not path.is_file():
        return ()
    entries: Any = read_json(path).get("files")
    try:
        listed = check_manifest([FileEntry(**entry) for entry in entries]).files
    except (TypeError, AttributeError, CheckpointError) as e:
        raise CheckpointError(f"{path}: its list of files is damaged. {_ANEW}") from e
    for file in listed:
        if not (folder / file.name).is_file():
            raise CheckpointError(f"{folder / file.name}: absent, but listed in {path.name}. {_ANEW}")
        if (found := _fingerprint(folder / file.name)[0]) != file.size:
            raise CheckpointError(
                f"{folder / file.name}: has {found} bytes, wanted {file.size} by {path.name}. {_anew(file)}"
            )
    for name in sorted(set(file_names(folder)) - {file.name for file in listed}):
        if name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / name}: not listed in {path.name}, and mlx-lm would load it. Move it away."
            )
    return listed


def verify(
    folder: Path, cache: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Compare a folder with its quantization manifest, if it has one; `cache` as for `make_manifest`, which says
    what is read. Raises CheckpointError for the first file that is not as listed.
    """
    if not (listed := check_sizes(folder)):
        return
    found = {file.name: file.sha256 for file in make_manifest(folder, cache, progress).files}
    for file in listed:
        if found.get(file.name) != file.sha256:
            raise CheckpointError(
                f"{folder / file.name}: has SHA-256 {found.get(file.name)}, wanted {file.sha256} by "
                f"{QUANTIZATION_MANIFEST}. {_anew(file)}"
            )


def hash_files(folder: Path, names: list[str], progress: Callable[[int, int], None]) -> dict[str, str]:
    """SHA-256 of files, by name; what `progress` raises ends it. Raises CheckpointError."""
    counter = _Counter(sum(_fingerprint(folder / name)[0] for name in names), progress)
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashlib lets others run meanwhile
        try:
            return dict(zip(names, pool.map(lambda n: _hash(folder / n, counter), names), strict=True))
        except BaseException:  # Ctrl-C, say: the pool waits for its threads, which may have 5 GB left each
            counter.is_stopped = True
            raise


def write_manifest(manifest: Manifest, folder: Path, cache: Path) -> None:
    """Keep the manifest of a folder whose files have just been verified, so that they are not read again."""
    kept_at = cache / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    kept = {f.name: {"seen": _fingerprint(folder / f.name), "sha256": f.sha256} for f in manifest.files}
    _keep(kept_at, kept)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that a reader finds the old or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def _anew(file: FileEntry) -> str:
    if file.name.endswith(".safetensors"):
        return _ANEW
    return f"{_ANEW[:-1]}; if you changed it on purpose, delete {QUANTIZATION_MANIFEST}."


def _keep(path: Path, kept: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it saves time, no more: a home that is read-only must not matter
        write_atomically(path, json.dumps(kept).encode())


class _Counter:
    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()
        self.is_stopped = False

    def add(self, num_bytes: int) -> None:
        with self._lock:
            if self.is_stopped:
                raise CancelledError
            self._done += num_bytes
            self._progress(self._done, self._total)


def _hash(path: Path, counter: _Counter) -> str:
    digest, buffer = hashlib.sha256(), bytearray(4 << 20)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(view[:size])
                counter.add(size)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}.") from e
    return digest.hexdigest()


def _fingerprint(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}.") from e
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _read_kept(path: Path) -> dict[str, dict[str, Any]]:
    """What was kept; anything unexpected means that nothing was, and the files are read again."""
    try:
        kept = json.loads(path.read_bytes())
        files = [FileEntry(n, e["seen"][0], e["sha256"]) for n, e in kept.items()]
        check_manifest(files)
        return dict(kept)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, CheckpointError):
        return {}
