"""Checkpoints that came from another host: found by their content hash, received piece by piece, verified.

A checkpoint arrives in `<store>/<hash>.part/`, where a file may be incomplete, and is renamed to `<store>/<hash>/` when
every file's SHA-256 is right. So what has the final name is whole, and what was cut off goes on where it stopped.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from expertd.checkpoint.manifest import (
    FileEntry,
    Manifest,
    file_names,
    hash_files,
    make_manifest,
    write_manifest,
)
from expertd.errors import CheckpointError

Progress = Callable[[int, int], None]

# Free space to leave on the disk beside the checkpoint.
SPARE_BYTES = 1 << 30


class Incoming:
    """One checkpoint on its way in: ask `missing` for what to fetch, hand it to `write`, then `finish`."""

    def __init__(self, manifest: Manifest, store: Path) -> None:
        self.manifest = manifest
        self.folder = store / manifest.content_hash
        self._part = store / f"{manifest.content_hash}.part"
        try:
            self._part.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._part).free
        except OSError as e:
            raise CheckpointError(f"{self._part}: cannot be written: {e.strerror}.") from e
        wanted = manifest.total_bytes - self.num_received
        if free < wanted + SPARE_BYTES:
            raise CheckpointError(
                f"{store}: {free / 1e9:.1f} GB free, wanted {(wanted + SPARE_BYTES) / 1e9:.1f} GB for this checkpoint. "
                "Free some, or give a folder on another disk with --store."
            )

    @property
    def num_received(self) -> int:
        """Bytes that are here already."""
        return sum(min(self._have(f), f.size) for f in self.manifest.files)

    def missing(self) -> Iterator[tuple[FileEntry, int]]:
        """Each file that is not complete, and the offset at which to go on."""
        for file in self.manifest.files:
            have = self._have(file)
            if have > file.size:
                self._path(file).unlink()
                have = 0
            if have < file.size or not self._path(file).exists():
                yield file, have

    def write(self, file: FileEntry, offset: int, data: bytes) -> None:
        """Append a piece. Raises CheckpointError when it does not follow what is here, or the disk refuses it."""
        if offset != self._have(file) or offset + len(data) > file.size:
            raise CheckpointError(
                f"{file.name}: {len(data)} bytes at {offset} do not follow the {self._have(file)} of {file.size} here."
            )
        try:
            with self._path(file).open("ab") as out:
                out.write(data)
        except OSError as e:
            raise CheckpointError(f"{self._path(file)}: cannot be written: {e.strerror}.") from e

    def finish(self, cache: Path, progress: Progress = lambda done, total: None) -> Path:
        """Verify every file and give the folder; `progress(bytes done, of)`.

        Raises CheckpointError for a damaged one, which is then deleted.
        """
        found = hash_files(self._part, [f.name for f in self.manifest.files], progress)
        damaged = [f.name for f in self.manifest.files if found[f.name] != f.sha256]
        for name in damaged:
            (self._part / name).unlink(missing_ok=True)
        if damaged:
            raise CheckpointError(
                f"{damaged[0]}: arrived damaged ({len(damaged)} of {len(self.manifest.files)} files). It was deleted; "
                "start again to fetch it anew."
            )
        try:
            _to_disk(self._part, self.manifest)
            # What has the name already is not this checkpoint, or nothing would have been fetched.
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self._part, self.folder)
        except OSError as e:
            raise CheckpointError(f"{self.folder}: cannot be written: {e.strerror}.") from e
        write_manifest(self.manifest, self.folder, cache)
        return self.folder

    def _path(self, file: FileEntry) -> Path:
        return self._part / file.name

    def _have(self, file: FileEntry) -> int:
        try:
            return self._path(file).stat().st_size
        except FileNotFoundError:
            return 0


def find_same(
    manifest: Manifest,
    folders: list[Path],
    store: Path,
    cache: Path,
    progress: Progress = lambda done, total: None,
) -> Path | None:
    """The folder with exactly these bytes: in the store by its name, else among `folders`.

    Only a folder whose files have the right names and sizes is read at all, and that once (see make_manifest).
    """
    wanted = {f.name: f.size for f in manifest.files}
    for folder in (*folders, store / manifest.content_hash):
        if not folder.is_dir() or {n: (folder / n).stat().st_size for n in file_names(folder)} != wanted:
            continue
        if make_manifest(folder, cache, progress).content_hash == manifest.content_hash:
            return folder
    return None


def read_piece(folder: Path, file: FileEntry, offset: int, size: int) -> bytes:
    """Bytes of a file to send. Raises CheckpointError when it is no longer as the manifest says."""
    try:
        with (folder / file.name).open("rb") as source:
            source.seek(offset)
            data = source.read(size)
    except OSError as e:
        raise CheckpointError(f"{folder / file.name}: cannot be read: {e.strerror}.") from e
    if len(data) != min(size, file.size - offset):
        raise CheckpointError(f"{folder / file.name}: shorter than it was. Start expertd again.")
    return data


def _to_disk(folder: Path, manifest: Manifest) -> None:
    """Wait until the files are on the disk: a name that says "whole" must not outlive a power cut without them."""
    for file in manifest.files:
        with (folder / file.name).open("rb") as out:
            os.fsync(out.fileno())
