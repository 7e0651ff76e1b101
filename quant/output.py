"""Writing a checkpoint so that a kill at any point costs seconds, and nothing half-written can be loaded.

Theory of operation. Shapes say where every byte will lie, so each shard has its full size from the start and
units are written at their places in any order, from any thread. All this is in `<dst>.partial`, beside `dst`:

    lock                         held while a run works on it
    journal                      which units are written, with checksums (journal.py)
    redo                         the unit that is being written again
    state/                       the run's own files, for its caller
    checkpoint/*.safetensors.part   the shards; no loader takes such a name

`write` puts a unit's bytes into their place and returns; a thread then waits until they are on the disk and
only then appends the unit to the journal, as many units at a time as came meanwhile. So a journaled unit is
whole even after a power cut, and no unit waits for the disk. The next run reads every journaled unit again:
what has not its checksum is written anew. That is a CRC-32, which zlib does at 2.8 GiB/s per core where
BLAKE2 does 0.6 and SHA-256 without instructions of its own 0.4: it must find bytes that a kill or a disk
damaged, not a forger. Writing a unit a second time goes through `redo`, so that the
unit is always either the old or the new one.

`finish` names the shards, adds texts, index and manifest, then config.json, without which neither we nor
mlx-lm load anything, and last renames the folder to `dst`. All that is a function of the units' bytes alone,
so the result is the same to the byte whatever was killed.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import expertd
from expertd.checkpoint.config import Config, write_config
from expertd.checkpoint.inspect import INDEX
from expertd.checkpoint.locate import WANTED_FILES
from expertd.checkpoint.manifest import (
    QUANTIZATION_MANIFEST,
    FileEntry,
    Manifest,
    file_names,
    hash_files,
    write_manifest,
)
from expertd.errors import ConfigError
from expertd.quant.journal import Journal, Record, sync_data, sync_path
from expertd.quant.shards import (
    SHARD_BYTES,
    Array,
    ShardFile,
    TensorPlan,
    Unit,
    array_of,
    bytes_of,
    plan_shards,
)

__all__ = ["Output", "TensorPlan", "Unit", "copy_texts"]

# Of the work folder: a run with another one cannot go on where this left off.
FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT)
# Space for what is not shards (tokenizer, index), and for the file system's own tables.
SPARE = 0.01
# Describe the source's weights, not those that we write.
NOT_COPIED = ("config.json", INDEX, "hf_quant_config.json", QUANTIZATION_MANIFEST)
HASH_THREADS = min(8, os.cpu_count() or 1)

Progress = Callable[[int, int, str], None]


class Output:
    """The checkpoint `dst` while it is written: a context manager; leaving it without `finish` keeps the work.

    `units` lie in the shards in this order. `fingerprint` (values that JSON holds) is all that the bytes
    depend on: settings, and what the source is. `progress(done_bytes, total_bytes, name)` follows the reading
    of what an earlier run wrote. Entering raises ConfigError for a `dst` that is not empty, a full disk, a
    second run, and an earlier run with another fingerprint. `state` is a folder for the caller's own
    files, deleted by `finish`; call `sync` before keeping there what counts on units that were written.
    """

    def __init__(
        self,
        dst: Path,
        units: Sequence[Unit],
        fingerprint: Mapping[str, Any],
        num_parameters: int,
        shard_bytes: int = SHARD_BYTES,
        progress: Progress = lambda done, total, name: None,
    ) -> None:
        self.dst = dst.resolve()
        self.work = self.dst.with_name(self.dst.name + ".partial")
        self.state = self.work / "state"
        self._folder = self.work / "checkpoint"
        plans = plan_shards(units, shard_bytes)
        self._shards = [ShardFile(plan, self._folder) for plan in plans]
        self._homes = {unit.name: shard for shard in self._shards for unit in shard.plan.units}
        self._units = {unit.name: unit for unit in units}
        self._num_parameters, self._progress = num_parameters, progress
        plan = blake2b(b"".join(plan.header for plan in plans), digest_size=20).hexdigest()
        # Through JSON, as it is when it is read again: tuples are lists, keys are strings.
        self._header = json.loads(json.dumps({**fingerprint, "plan of tensors": plan, "format": FORMAT}))
        self._journal = Journal(self.work / "journal")
        self._redo = self.work / "redo"
        self._redo_lock = threading.Lock()
        self._written: dict[str, Record] = {}
        self._changed = threading.Condition()  # guards all below, and `_written`
        self._queue: list[str] = []
        self._num_queued = self._num_journaled = 0
        self._failure: BaseException | None = None
        self._is_closing = False

    def __enter__(self) -> "Output":
        self._check_dst()
        self._check_space()
        with contextlib.ExitStack() as stack, self.disk_errors():
            self._lock(stack)
            records = self._read_journal()
            self._open_shards(stack)
            self._written = self._verify(records)
            self._redo_torn()
            self._journal.create(self._header, self._written)
            stack.callback(self._journal.close)
            self._start_threads(stack)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            with contextlib.suppress(ConfigError):  # it is on its way already, or the next run will say it
                self.sync()
        finally:
            self._closing.close()
        if not self._written and not any(self.state.glob("*")):
            shutil.rmtree(self.work, ignore_errors=True)

    def __contains__(self, unit: object) -> bool:
        """Whether the unit is written, by this run or, verified, by an earlier one."""
        return unit in self._written

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(unit.num_bytes for unit in self._units.values())

    def unit(self, name: str) -> Unit:
        """What was planned for a unit."""
        return self._units[name]

    @property
    def notes(self) -> dict[str, dict[str, Any]]:
        """What was noted with each unit that is written, in the order of the units."""
        return {name: self._written[name].note for name in self._units if name in self._written}

    def write(self, unit: str, arrays: Mapping[str, Any], note: Mapping[str, Any] | None = None) -> None:
        """Write a unit's tensors (C-contiguous buffers by name), with a note that JSON can hold.

        From any thread; a unit may be written again, which replaces it. Raises ConfigError when the disk is
        full: all that is written stays, and the same command goes on.
        """
        plan = self._units[unit]
        if arrays.keys() != {tensor.name for tensor in plan.tensors}:
            raise ValueError(f"unit {unit!r}: tensors {sorted(arrays)}, planned others")
        parts = [bytes_of(tensor, arrays[tensor.name]) for tensor in plan.tensors]
        record = Record(_crc32(parts), json.loads(json.dumps(dict(note or {}))))
        self._check_failure()
        with self.disk_errors():
            if unit in self._written:
                self._rewrite(unit, parts, record)
            else:
                self._homes[unit].write(unit, parts)
                self._enqueue(unit, record)

    def read(self, unit: str) -> dict[str, Array]:
        """A written unit's tensors; bfloat16 and 8-bit floats as unsigned integers of their bits."""
        shard = self._homes[unit]
        at = shard.plan.spans[unit][0]
        arrays: dict[str, Array] = {}
        with self.disk_errors():
            for tensor in self._units[unit].tensors:
                arrays[tensor.name] = array_of(tensor, b"".join(shard.read(at, at + tensor.num_bytes)))
                at += tensor.num_bytes
        return arrays

    def sync(self) -> None:
        """Wait until all that was written so far outlives a kill. Raises ConfigError, as `write` does."""
        with self._changed:
            wanted = self._num_queued
            self._changed.wait_for(lambda: self._num_journaled >= wanted or self._failure is not None)
        self._check_failure()

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turn an OSError of the block into a ConfigError that says what to do; for the caller's files, too."""
        try:
            yield
        except OSError as error:
            raise self._explain(error) from error

    def finish(
        self,
        config: Config,
        texts_from: Path,
        manifest_extra: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
        cache: Path | None = None,
    ) -> Path:
        """Complete the checkpoint, with further `files` by name, and give its folder, which appears now.

        The manifest has `manifest_extra` and each file's size and SHA-256. `cache` is the folder of
        `make_manifest`: with it, this machine need not read the checkpoint to know its content. Raises
        ConfigError when the disk is full or `dst` is taken, ValueError when units are missing.
        """
        self.sync()
        if missing := [name for name in self._units if name not in self._written]:
            raise ValueError(f"{len(missing)} units are not written, such as {missing[0]!r}")
        with self.disk_errors():
            with ThreadPoolExecutor(HASH_THREADS) as pool:
                hashes = dict(
                    zip(
                        (shard.plan.name for shard in self._shards),
                        pool.map(ShardFile.finish_hash, self._shards),
                        strict=True,
                    )
                )
            for shard in self._shards:
                shard.sync()
                shard.publish()
            manifest = self._write_texts(config, texts_from, manifest_extra, files or {}, hashes)
            self._publish()
            if cache:
                write_manifest(manifest, self.dst, cache)
        return self.dst

    # Beginning.

    def _check_dst(self) -> None:
        if not self.dst.exists() or (self.dst.is_dir() and not any(self.dst.iterdir())):
            if self.dst.is_mount():
                raise ConfigError(f"{self.dst}: is a mount point. Choose a folder inside it.")
            return
        if (self.work / "journal").exists() and not self._folder.exists():
            shutil.rmtree(self.work, ignore_errors=True)  # of the run that completed dst, killed just after
        raise ConfigError(
            f"{self.dst}: exists and is not an empty folder. Choose another, or delete it first."
        )

    def _check_space(self) -> None:
        needed, free = self._missing_bytes(), self._free_bytes()
        if free < needed:
            raise ConfigError(
                f"{self.dst}: needs {_in_words(needed)} more, the disk has {_in_words(free)}. "
                "Free some space, or choose another disk."
            )

    def _missing_bytes(self) -> int:
        """What must still be allocated: files of full size have holes until they are written."""
        total = sum(shard.plan.num_bytes for shard in self._shards)
        allocated = sum(path.stat().st_blocks * 512 for path in self._folder.glob("*.safetensors*"))
        return max(0, total - allocated) + int(total * SPARE)

    def _free_bytes(self) -> int:
        parent = next(folder for folder in self.dst.parents if folder.exists())
        return shutil.disk_usage(parent).free

    def _lock(self, stack: contextlib.ExitStack) -> None:
        """Make the work folder ours. Raises ConfigError when another run has it, or it is not a work folder."""
        if not (self.work / "journal").exists() and (strange := self._strange()):
            raise ConfigError(
                f"{self.work}: holds {strange[0]!r} and no journal, so it is not from expertd. "
                f"Delete it, or choose another name than {self.dst.name}."
            )
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / "lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        stack.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.read(fd, 20).decode(errors="replace").strip()
            raise ConfigError(
                f"{self.dst}: process {pid or '(just started)'} is writing it. "
                "Wait for that, end it, or choose another DST."
            ) from error
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(fd)):
            raise ConfigError(f"{self.dst}: another run has just ended. Give the same command again.")
        os.truncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def _strange(self) -> list[str]:
        """What of the work folder no run makes before its journal."""
        return sorted({path.name for path in self.work.glob("*")} - {"lock", "journal.new"})

    def _read_journal(self) -> dict[str, Record]:
        """What an earlier run journaled. Raises ConfigError when that was another conversion."""
        try:
            header, records = self._journal.read()
        except FileNotFoundError:
            self._journal.create(self._header, {})
            return {}
        if header is None:
            raise ConfigError(f"{self.work}: its journal is damaged. Delete that folder to start anew.")
        before, now = _flatten(header), _flatten(self._header)
        for key in [*now, *before]:
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"{self.work}: was begun with {key} {_short(before.get(key))}, this run has "
                    f"{_short(now.get(key))}. Give the same settings and source to go on, "
                    "or delete that folder to start anew."
                )
        return {name: record for name, record in records.items() if name in self._units}

    def _open_shards(self, stack: contextlib.ExitStack) -> None:
        self.state.mkdir(exist_ok=True)
        self._folder.mkdir(exist_ok=True)
        (self._folder / "config.json").unlink(missing_ok=True)  # first: without it nothing here is loadable
        for shard in self._shards:
            stack.callback(shard.close)
            shard.open()
        sync_path(self._folder)
        sync_path(self.work)

    def _verify(self, records: dict[str, Record]) -> dict[str, Record]:
        """The records whose unit has its checksum: every one is read again."""
        total = sum(self._units[name].num_bytes for name in records)
        done = 0

        def is_right(name: str) -> bool:
            nonlocal done
            shard = self._homes[name]
            right = _crc32(shard.read(*shard.plan.spans[name])) == records[name].crc32
            with self._changed:
                done += self._units[name].num_bytes
                self._progress(done, total, name)
            return right

        with ThreadPoolExecutor(HASH_THREADS) as pool:
            right = list(pool.map(is_right, records))
        return {name: records[name] for name, is_good in zip(records, right, strict=True) if is_good}

    # Writing.

    def _start_threads(self, stack: contextlib.ExitStack) -> None:
        hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        stack.callback(hasher.shutdown, cancel_futures=True)
        committer = threading.Thread(target=self._commit, args=(hasher,), name="journal")
        committer.start()
        stack.callback(committer.join)
        stack.callback(self._close_queue)

    def _close_queue(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def _enqueue(self, unit: str, record: Record) -> None:
        with self._changed:
            self._written[unit] = record
            self._queue.append(unit)
            self._num_queued += 1
            self._changed.notify_all()

    def _commit(self, hasher: ThreadPoolExecutor) -> None:
        """Journal what was written, when it is on the disk, until closing."""
        try:
            while names := self._next_names():
                batch = {name: self._written[name] for name in names}
                shards = {self._homes[name].plan.name: self._homes[name] for name in batch}
                for shard in shards.values():
                    sync_data(shard.fd)
                self._journal.append(batch.items())
                with self._changed:
                    self._num_journaled += len(names)
                    self._changed.notify_all()
                for shard in shards.values():
                    hasher.submit(shard.hash_up_to, self._ready_bytes(shard), lambda: self._is_closing)
        except BaseException as error:  # of whatever kind: those who wait must know
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next_names(self) -> list[str]:
        """The units that were written meanwhile; none when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closing)
            names, self._queue = self._queue, []
            return names

    def _ready_bytes(self, shard: ShardFile) -> int:
        """How far from its start the shard is written without a gap."""
        end = len(shard.plan.header)
        for unit in shard.plan.units:
            if unit.name not in self._written:
                break
            end = shard.plan.spans[unit.name][1]
        return end

    def _check_failure(self) -> None:
        if isinstance(self._failure, OSError):
            raise self._explain(self._failure) from self._failure
        if self._failure is not None:
            raise self._failure

    # Writing a unit again.

    def _rewrite(self, unit: str, parts: list[Array], record: Record) -> None:
        with self._redo_lock:
            self.sync()
            with self._redo.open("wb") as file:
                head = {"unit": unit, "crc32": record.crc32, "note": record.note}
                file.write(json.dumps(head).encode() + b"\n")
                for part in parts:
                    file.write(part.data)
                file.flush()
                sync_data(file.fileno())
            sync_path(self.work)
            self._homes[unit].write(unit, parts)
            self._enqueue(unit, record)
            self.sync()  # `redo` may be overwritten now

    def _redo_torn(self) -> None:
        """Complete what a kill interrupted while a unit was written again."""
        try:
            line, _, data = self._redo.read_bytes().partition(b"\n")
            head = json.loads(line)
            unit, record = self._units[head["unit"]], Record(head["crc32"], head["note"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return
        known = self._written.get(unit.name)
        if len(data) == unit.num_bytes and _crc32([data]) == record.crc32 and record != known:
            self._homes[unit.name].write(unit.name, [bytes_of(TensorPlan("", "U8", (len(data),)), data)])
            self._homes[unit.name].sync()
            self._written[unit.name] = record

    # Ending.

    def _write_texts(
        self,
        config: Config,
        texts_from: Path,
        manifest_extra: Mapping[str, Any],
        files: Mapping[str, bytes],
        hashes: dict[str, str],
    ) -> Manifest:
        """All but the shards; config.json waits in the work folder."""
        folder, shards = self._folder, {shard.plan.name for shard in self._shards}
        for path in folder.iterdir():  # texts of a run that was killed here
            if path.name not in shards:
                path.unlink()
        copy_texts(texts_from, folder)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        _write_json(folder / INDEX, self._index())
        write_config(self.work, config)
        rest = [name for name in file_names(folder) if name not in hashes]
        hashes |= hash_files(folder, rest, lambda done, total: None)
        hashes |= hash_files(self.work, ["config.json"], lambda done, total: None)
        sizes = {name: (folder / name).stat().st_size for name in hashes if name != "config.json"}
        sizes["config.json"] = (self.work / "config.json").stat().st_size
        entries = [{"name": n, "size": sizes[n], "sha256": hashes[n]} for n in sorted(hashes)]
        made_by = {"tool": f"expertd {expertd.__version__}", "files": entries}
        _write_json(folder / QUANTIZATION_MANIFEST, {**manifest_extra, **made_by})
        own = hash_files(folder, [QUANTIZATION_MANIFEST], lambda done, total: None)
        sizes[QUANTIZATION_MANIFEST] = (folder / QUANTIZATION_MANIFEST).stat().st_size
        return Manifest(tuple(FileEntry(n, sizes[n], digest) for n, digest in sorted((hashes | own).items())))

    def _index(self) -> dict[str, Any]:
        places = {
            tensor.name: shard.plan.name
            for shard in self._shards
            for unit in shard.plan.units
            for tensor in unit.tensors
        }
        return {
            "metadata": {"total_size": self.num_bytes, "total_parameters": self._num_parameters},
            "weight_map": dict(sorted(places.items())),
        }

    def _publish(self) -> None:
        """From here on the folder is whole: config.json comes last, then the name."""
        for path in self._folder.iterdir():
            sync_path(path)
        sync_path(self.work / "config.json")
        sync_path(self._folder)
        (self.work / "config.json").replace(self._folder / "config.json")
        sync_path(self._folder)
        try:
            self._folder.replace(self.dst)
        except OSError as error:
            raise ConfigError(
                f"{self.dst}: no longer free ({error.strerror}), so the checkpoint, which is whole, is in "
                f"{self._folder}. Move it, or clear {self.dst} and give the same command again."
            ) from error
        sync_path(self.dst.parent)
        shutil.rmtree(self.work, ignore_errors=True)

    def _explain(self, error: OSError) -> ConfigError:
        if error.errno in FULL:
            return ConfigError(
                f"{self.dst}: the disk is full: {_in_words(self._missing_bytes())} more are needed, "
                f"{_in_words(self._free_bytes())} are free. {len(self._written)} of {len(self._units)} units are "
                f"done and stay in {self.work}: free some space and give the same command again, it goes on."
            )
        return ConfigError(f"{self.dst}: cannot be written ({error.strerror or error}). Choose another.")


def copy_texts(src: Path, dst: Path) -> None:
    """Copy tokenizer, chat template and generation settings, never code or weights."""
    patterns = tuple(p for p in WANTED_FILES if not p.endswith(".safetensors"))
    for path in sorted({path for pattern in patterns for path in src.glob(pattern)}):
        if path.name not in NOT_COPIED and path.is_file():
            shutil.copyfile(path, dst / path.name)


def _crc32(parts: Iterable[Any]) -> int:
    crc32 = 0
    for part in parts:
        crc32 = zlib.crc32(part, crc32)
    return crc32


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, so that the one that differs can be named."""
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flatten(part, f"{prefix}{key}.") if isinstance(part, dict) else {f"{prefix}{key}": part}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"
