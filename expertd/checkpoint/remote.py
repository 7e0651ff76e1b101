"""A checkpoint on a web server, read as if its folder were here: tensors come when they are asked for, and go again.

`<home>/files` looks like the checkpoint's folder: config, tokenizer and index are the server's, and each shard
has its full size and its real header, but only those blocks of tensors that were fetched (blocks.py). What was released
stays until the bound on the disk is reached, then the blocks used longest ago go first. What is in use is never
dropped: whoever asks for more than the bound at once gets it, if the disk has room, and the bound holds again after
the release.

Everything that is fetched is kept by block, so a process that is killed goes on where it stopped. Two processes
never share a home: each locks its own.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from expertd.checkpoint.blocks import BLOCK_BYTES, BlockFile
from expertd.checkpoint.config import read_json
from expertd.checkpoint.inspect import INDEX, check_shards, read_index
from expertd.checkpoint.manifest import (
    FILE_NAME,
    MAX_FILES,
    QUANTIZATION_MANIFEST,
    FileEntry,
    check_manifest,
    write_atomically,
)
from expertd.checkpoint.ranges import Limits, RemoteFile, WebReader
from expertd.checkpoint.shards import TensorEntry, header_bytes, parse_header
from expertd.errors import CheckpointError

# A web server lists no folder, so these are the files besides the shards that are asked for.
TEXT_NAMES = (
    "config.json",
    INDEX,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "hf_quant_config.json",
    QUANTIZATION_MANIFEST,
)
DEFAULT_CACHE_BYTES = 50 * 10**9
# Free space that is left on the disk of the cache.
SPARE_BYTES = 1 << 30
PART_BLOCKS = 8
MAX_HOMES = 4

# A shard's name and one of its blocks.
Block = tuple[str, int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Site:
    """A checkpoint's folder on a web server: its URL with a slash at the end, the headers for that host alone, and
    the names of its files where they are known."""

    name: str
    url: str
    private: dict[str, str] = field(default_factory=dict, repr=False)
    file_names: tuple[str, ...] | None = None


class RemoteSource:
    """The `Source` of a Site. `cache_bytes` bounds the disk that released tensors may take.

    Opening reads the small files and the shards' headers. Raises CheckpointError, as do fetch and release.
    """

    is_remote = True

    def __init__(
        self,
        site: Site,
        home: Path,
        cache_bytes: int | None = None,
        limits: Limits | None = None,
        num_homes: int = MAX_HOMES,
    ) -> None:
        self.name = site.name
        self._site = site
        self._reader = WebReader(site.private, limits)
        self._pool = ThreadPoolExecutor(self._reader.limits.num_connections, "fetch")
        self._lock_fd = -1
        self._fetching = threading.Lock()  # one fetch at a time
        self._state = threading.Lock()  # guards what follows, for moments
        self._pinned: set[str] = set()
        self._pins: dict[Block, int] = {}
        self._idle: OrderedDict[Block, None] = OrderedDict()
        self._sound: set[Block] = set()
        try:
            with disk_errors(home):
                self._home, self._lock_fd = claim_home(home, num_homes)
                self.folder = self._home / "files"
                self._open(cache_bytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RemoteSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way and let another process have the cache."""
        self._reader.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    @property
    def held_bytes(self) -> int:
        """The disk space of the blocks that are here, headers not counted."""
        return self._num_held * BLOCK_BYTES

    def fetch(self, names: Iterable[str]) -> None:
        """Bring the bytes of these tensors into `folder`, where they stay until they are released."""
        with self._fetching, disk_errors(self._home):
            self._bring(self._pin(names))

    def fetch_all(self, progress: Progress = lambda done, total: None) -> None:
        """Bring every byte of every shard, and keep it. `progress(bytes done, of)`."""
        with self._fetching, disk_errors(self._home):
            blocks = [(name, i) for name, file in self._blocks.items() for i in range(file.num_blocks)]
            with self._state:
                self._keep(blocks)
            self._bring(blocks, progress)

    def drop_shard(self, name: str) -> None:
        """Forget what came of one shard, for it proved to be wrong; the source is of no use after that."""
        if name in self._blocks:
            self._blocks[name].drop_all()

    def release(self, names: Iterable[str]) -> None:
        """Let the bytes of these tensors go when the room is needed."""
        with self._state, disk_errors(self._home):
            for name in names:
                if name not in self._pinned:
                    continue
                self._pinned.discard(name)
                for block in self._blocks_of(name):
                    self._pins[block] -= 1
                    if not self._pins[block]:
                        del self._pins[block]
                        self._idle[block] = None
            self._shrink(0)

    # Opening.

    def _open(self, cache_bytes: int | None) -> None:
        (self._home / "blocks").mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        self._fetch_texts()
        names = self._shard_names()
        keep = {*names, *self._texts}
        for path in self.folder.iterdir():
            if path.name not in keep:
                path.unlink()
        opened = self._pool.map(self._open_shard, names)
        found = dict(zip(names, opened, strict=True))
        self._files: dict[str, RemoteFile] = {n: file for n, (file, _, _) in found.items()}
        self._blocks: dict[str, BlockFile] = {n: blocks for n, (_, blocks, _) in found.items()}
        self.shards: dict[str, dict[str, TensorEntry]] = check_shards(self.folder)
        self._where: dict[str, list[tuple[str, TensorEntry]]] = {}
        for shard, entries in self.shards.items():
            for tensor, entry in entries.items():
                self._where.setdefault(tensor, []).append((shard, entry))
        kept = [(n, i) for n, f in sorted(self._blocks.items()) for i in range(f.num_blocks) if f.has(i)]
        self._idle.update(dict.fromkeys(kept))
        self._num_held = len(kept)
        self._bound = (self._default_bytes() if cache_bytes is None else cache_bytes) // BLOCK_BYTES
        self.identity = self._identity({n: digest for n, (_, _, digest) in found.items()})
        self._shrink(0)

    def _default_bytes(self) -> int:
        return min(DEFAULT_CACHE_BYTES, (shutil.disk_usage(self._home).free + self.held_bytes) // 2)

    def _fetch_texts(self) -> None:
        """Read the small files anew into `folder`; `_texts` are those that there are, with their SHA-256."""
        listed = self._site.file_names
        wanted = TEXT_NAMES if listed is None else [n for n in listed if not n.endswith(".safetensors")]
        for name in wanted:
            self._check_name(name)

        def fetch(name: str) -> bytes | None:
            return self._reader.read_small(self._site.url + name, name == "config.json" or listed is not None)

        self._texts: dict[str, str] = {}
        self._keep_texts(wanted, fetch)
        if listed is None:
            more = [name for name, _ in listed_files(self.folder) if not name.endswith(".safetensors")]
            self._keep_texts([name for name in more if name not in TEXT_NAMES], fetch)

    def _keep_texts(self, names: Sequence[str], fetch: Callable[[str], bytes | None]) -> None:
        for name, data in zip(names, self._pool.map(fetch, names), strict=True):
            if data is None:
                (self.folder / name).unlink(missing_ok=True)
            else:
                self._texts[name] = hashlib.sha256(data).hexdigest()
                write_atomically(self.folder / name, data)

    def _shard_names(self) -> list[str]:
        listed = [n for n in self._site.file_names or () if n.endswith(".safetensors")]
        indexed = set(read_index(self.folder).values()) if INDEX in self._texts else set()
        names = sorted({*listed, *indexed} or {"model.safetensors"})
        for name in names:
            self._check_name(name)
        if len(names) > MAX_FILES or len({name.lower() for name in names}) != len(names):
            raise CheckpointError(
                f"{self.name}: names {len(names)} shards, wanted up to {MAX_FILES}, none twice. Check the URL."
            )
        return names

    def _check_name(self, name: str) -> None:
        if not FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"{self.name}: names {name[:80]!r}, which is no plain name of a checkpoint's file. Check the URL."
            )

    def _open_shard(self, name: str) -> tuple[RemoteFile, BlockFile, str]:
        """The file on the server, the one here, and the SHA-256 of its header."""
        url = self._site.url + name
        file, first = self._reader.open_file(url)
        end = header_bytes(url, first, file.size)
        header = first[:end] + self._reader.read_range(file, min(len(first), end), end)
        parse_header(url, header, file.size)
        record = self._home / "blocks" / f"{name}.blocks"
        blocks = BlockFile(self.folder / name, record, file.size, f"{url} {file.validator}", header)
        return file, blocks, hashlib.sha256(header).hexdigest()

    def _identity(self, headers: dict[str, str]) -> str:
        shards = {n: [f.size, f.validator, headers[n]] for n, f in self._files.items()}
        about = [self._site.url, shards, self._texts]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    # Blocks that come and go.

    def _blocks_of(self, tensor: str) -> list[Block]:
        if tensor not in self._where:
            raise CheckpointError(f"{self.name}: has no tensor {tensor[:200]!r}. Check the checkpoint.")
        found = self._where[tensor]
        return [
            (shard, i) for shard, entry in found for i in self._blocks[shard].blocks(entry.begin, entry.end)
        ]

    def _pin(self, names: Iterable[str]) -> list[Block]:
        """Keep the blocks of these tensors from now on; gives them, sorted."""
        wanted: set[Block] = set()
        with self._state:
            for name in names:
                blocks = self._blocks_of(name)
                wanted.update(blocks)
                if name in self._pinned:
                    continue
                self._pinned.add(name)
                self._keep(blocks)
        return sorted(wanted)

    def _keep(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._pins[block] = self._pins.get(block, 0) + 1
            self._idle.pop(block, None)

    def _bring(self, wanted: list[Block], progress: Progress = lambda done, total: None) -> None:
        self._check(wanted)
        missing = [(name, i) for name, i in wanted if not self._blocks[name].has(i)]
        if not missing:
            return
        with self._state:
            self._make_room(len(missing))
        total = sum(self._length(block) for block in wanted)
        done = total - sum(self._length(block) for block in missing)
        progress(done, total)
        parts: list[Future[int]] = []
        try:
            for run in cut_into_parts(missing):
                parts.append(self._pool.submit(self._bring_part, *run))
            for part in as_completed(parts):
                done += part.result()
                progress(done, total)
        except (RuntimeError, CancelledError) as error:  # the pool takes no more, or dropped what waited
            raise CheckpointError(f"{self.name}: was closed while it was read. Open it again.") from error
        finally:
            for part in parts:
                part.cancel()

    def _length(self, block: Block) -> int:
        begin, end = self._blocks[block[0]].span(block[1])
        return end - begin

    def _check(self, wanted: list[Block]) -> None:
        """Compare those blocks of an earlier process that this one has not used yet; what is damaged goes."""
        kept = [
            block for block in wanted if block not in self._sound and self._blocks[block[0]].has(block[1])
        ]
        results = self._pool.map(lambda block: self._blocks[block[0]].check(block[1]), kept)
        for block, sound in zip(kept, results, strict=True):
            with self._state:
                if sound:
                    self._sound.add(block)
                else:
                    self._num_held -= 1
                    self._idle.pop(block, None)

    def _bring_part(self, name: str, first: int, num_blocks: int) -> int:
        file, blocks = self._files[name], self._blocks[name]
        begin, end = blocks.span(first)[0], blocks.span(first + num_blocks - 1)[1]
        data = self._reader.read_range(file, begin, end)
        blocks.write(first, data)
        with self._state:
            for block in ((name, first + i) for i in range(num_blocks)):
                self._num_held += block not in self._sound
                self._sound.add(block)
                if block not in self._pins:
                    self._idle[block] = None
        return end - begin

    def _make_room(self, num_blocks: int) -> None:
        """Raises CheckpointError when the disk has no room for so many more blocks."""
        self._shrink(num_blocks)
        wanted = num_blocks * BLOCK_BYTES + SPARE_BYTES
        while (free := shutil.disk_usage(self._home).free) < wanted:
            if not self._drop_oldest():
                raise CheckpointError(
                    f"{self._home}: {free / 1e9:.1f} GB free, wanted {wanted / 1e9:.1f} GB for what is read next. "
                    "Free some: what came is kept."
                )

    def _shrink(self, num_more: int) -> None:
        """Drop what was released, the oldest first, until `num_more` blocks fit into the bound."""
        while self._num_held + num_more > self._bound and self._drop_oldest():
            pass

    def _drop_oldest(self) -> bool:
        """Whether there was something to drop."""
        if not self._idle:
            return False
        name, block = next(iter(self._idle))
        if self._blocks[name].drop(block):
            self._forget([(name, block)])
            return True
        # The file system makes no holes: only shards of which nothing is in use can go.
        in_use = {shard for shard, _ in self._pins}
        shard = next((shard for shard, _ in self._idle if shard not in in_use), None)
        if shard is None:
            return False
        self._blocks[shard].drop_all()
        self._forget([key for key in self._idle if key[0] == shard])
        return True

    def _forget(self, dropped: list[Block]) -> None:
        self._num_held -= len(dropped)
        for block in dropped:
            self._idle.pop(block, None)
            self._sound.discard(block)


def listed_files(folder: Path) -> list[tuple[str, str]]:
    """Name and SHA-256 of each file that our quantizer listed in the folder's manifest; none without one.

    Raises CheckpointError for a manifest that lists what is no plain file.
    """
    path = folder / QUANTIZATION_MANIFEST
    if not path.is_file():
        return []
    try:
        listed = check_manifest([FileEntry(**entry) for entry in read_json(path)["files"]]).files
    except (TypeError, KeyError, AttributeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: its list of files is damaged. Download it again.") from error
    return [(file.name, file.sha256) for file in listed if file.name != QUANTIZATION_MANIFEST]


def cut_into_parts(blocks: list[Block]) -> Iterator[tuple[str, int, int]]:
    """Runs of up to PART_BLOCKS neighbours in a sorted list: shard, first block, number of blocks.

    Ranges with a gap of less than a block share blocks or have neighbouring ones, so they are one request.
    """
    at = 0
    while at < len(blocks):
        name, first = blocks[at]
        count = 1
        while count < PART_BLOCKS and blocks[at + count : at + count + 1] == [(name, first + count)]:
            count += 1
        yield name, first, count
        at += count


def claim_home(home: Path, num_homes: int) -> tuple[Path, int]:
    """Lock `home`, or `home.2` and so on while other processes use those; gives it and the lock's descriptor.

    The lock ends with the process or when the descriptor is closed.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, num_homes + 1):
        mine = home if number == 1 else home.with_name(f"{home.name}.{number}")
        fd = lock(mine)
        if fd is not None:
            return mine, fd
    raise CheckpointError(f"{home}: in use by another expertd. Wait until that has ended, then start again.")


def lock(home: Path) -> int | None:
    """The descriptor of the locked file beside `home`; None when another process has it."""
    fd = os.open(home.with_name(home.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def drop_others(home: Path) -> None:
    """Delete what other sources left beside `home`, unless a process uses it: the bound is for all together."""
    for other in home.parent.glob("*"):
        if other.is_dir() and other.name.split(".")[0] != home.name and (fd := lock(other)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(fd)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn the disk's refusals into CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{where}: cannot be written ({error.strerror or error}). Free some space, or choose another folder: "
            "what came is kept."
        ) from error
