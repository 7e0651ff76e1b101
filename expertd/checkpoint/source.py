"""A checkpoint whose tensors are read one by one, wherever it is: a folder here, the hub, or a web server."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from expertd.checkpoint.inspect import check_shards
from expertd.checkpoint.locate import (
    WANTED_FILES,
    cached_snapshot,
    find_checkpoint,
    hub_files,
    is_here,
    is_url,
    split_hub_id,
)
from expertd.checkpoint.manifest import FILE_NAME, hash_files
from expertd.checkpoint.ranges import Limits, Unreachable, check_url
from expertd.checkpoint.remote import RemoteSource, Site, disk_errors, drop_others, listed_files
from expertd.checkpoint.shards import TensorEntry, header_bytes
from expertd.errors import CheckpointError

UNBOUNDED = 1 << 62

# What is being done, bytes done, of.
Report = Callable[[str, int, int], None]


class Source(Protocol):
    """A checkpoint's folder whose shards have their full size and real headers, and the way to their bytes.

    `shards` has each file's tensors by name, as read_header gives them. A tensor's bytes are in `folder` from
    `fetch` to `release`, which raise CheckpointError; local ones always are. `identity` is a digest of the content.
    """

    name: str
    folder: Path
    shards: dict[str, dict[str, TensorEntry]]
    is_remote: bool
    identity: str

    def fetch(self, names: Iterable[str]) -> None: ...

    def release(self, names: Iterable[str]) -> None: ...

    def close(self) -> None: ...


class LocalSource:
    """A folder. `identity` holds as long as no file's size, time or header changes. Raises CheckpointError."""

    is_remote = False

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.shards = check_shards(folder)
        self.identity = _local_identity(folder, sorted(self.shards))

    def fetch(self, names: Iterable[str]) -> None:
        """All bytes are here."""

    def release(self, names: Iterable[str]) -> None:
        """Nothing to drop."""

    def close(self) -> None:
        """Nothing is held."""


def open_source(
    name: str, cache: Path, cache_bytes: int | None = None, limits: Limits | None = None
) -> Source:
    """The checkpoint `name`: a folder, `demo`, a hub id `org/name` or `org/name@revision`, or the URL of a folder.

    Of what is not here, tensors are read by byte range into the folder `cache`, where released ones take up to
    `cache_bytes` (default: 50 GB, or half of the free disk where that is less). A hub id that was downloaded
    before is read from the hub's own cache. Raises CheckpointError.
    """
    if is_here(name):
        return LocalSource(name, find_checkpoint(name))
    if is_url(name):
        site = Site(name, check_url(name))
    else:
        hub_id, revision = split_hub_id(name)
        if folder := _complete(cached_snapshot(hub_id, revision)):
            return LocalSource(name, folder)
        url, files, private = hub_files(hub_id, revision)
        site = Site(name, url, private, tuple(file for file in files if _is_wanted(file)))
    home = cache / "remote" / _key(site.url)
    with disk_errors(cache):
        drop_others(home)
    return RemoteSource(site, home, cache_bytes, limits)


def download_url(
    name: str,
    cache: Path,
    report: Report = lambda what, done, total: None,
    limits: Limits | None = None,
) -> Path:
    """The whole checkpoint at a URL, in a folder of its own; goes on where an earlier call was cut off.

    A complete folder is taken again for as long as the server's files are the same, and when it does not
    answer. Raises CheckpointError.
    """
    url = check_url(name)
    root = cache / "checkpoints-from-urls"
    try:
        with disk_errors(root):
            return _download(Site(name, url), root, report, limits)
    except Unreachable:
        complete = [folder for folder in root.glob(f"{_key(url)}-*") if folder.is_dir()]
        if not complete:
            raise
        return max(complete, key=lambda folder: folder.stat().st_mtime_ns)


def _download(site: Site, root: Path, report: Report, limits: Limits | None) -> Path:
    part = root / f"{_key(site.url)}.part"
    with RemoteSource(site, part, UNBOUNDED, limits, num_homes=1) as source:
        final = root / f"{_key(site.url)}-{source.identity[:16]}"
        if not final.is_dir():
            source.fetch_all(lambda done, total: report("downloading", done, total))
            _verify(source, report)
            for path in source.folder.iterdir():
                _to_disk(path)
            os.replace(source.folder, final)
        shutil.rmtree(part, ignore_errors=True)
    return final


def _verify(source: RemoteSource, report: Report) -> None:
    """Compare with the SHA-256 that the checkpoint's own manifest promises, where it has one."""
    promised = {
        name: sha256 for name, sha256 in listed_files(source.folder) if (source.folder / name).is_file()
    }
    found = hash_files(source.folder, list(promised), lambda done, total: report("verifying", done, total))
    damaged = sorted(name for name in promised if found[name] != promised[name])
    if not damaged:
        return
    for name in damaged:
        source.drop_shard(name)
    raise CheckpointError(
        f"{source.name}: {damaged[0]} is not what its manifest promises ({len(damaged)} of {len(promised)} files). "
        "What came was deleted: start again, and if it stays so, ask whoever keeps the URL."
    )


def _local_identity(folder: Path, names: list[str]) -> str:
    digest = hashlib.sha256()
    try:
        for name in ["config.json", *names]:
            path = folder / name
            found = path.stat()
            digest.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode())
            if name != "config.json":
                with path.open("rb") as file:
                    first = file.read(8)
                    digest.update(first + file.read(header_bytes(str(path), first, found.st_size) - 8))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}). Check it.") from error
    return digest.hexdigest()


def _complete(snapshot: Path | None) -> Path | None:
    """`snapshot`, if all that the index names is in it: the hub's cache may hold a part of a repository."""
    try:
        if snapshot is not None and (snapshot / "config.json").is_file():
            check_shards(snapshot)
            return snapshot
    except CheckpointError:
        pass
    return None


def _is_wanted(name: str) -> bool:
    return bool(FILE_NAME.fullmatch(name)) and any(fnmatchcase(name, pattern) for pattern in WANTED_FILES)


def _key(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def _to_disk(path: Path) -> None:
    """Wait until a file is on the disk: a folder's name that says "whole" must not outlive a power cut without it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
