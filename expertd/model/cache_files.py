"""Caches of finished sequences on disk, so that prompts that begin alike are read once even across restarts.

A file is safetensors: the layers' arrays, the tokens, and `about`, which is JSON with what is no array, a key, and a
SHA-256 of all the rest. The key names everything that the bits depend on: checkpoint, kernels, versions. A file is used
only if all of it fits: its bytes, its key, and each array's name, type and shape beside those of a cache that the
loaded model has just made. One that does not fit is removed. Files appear under their names whole, or not at all.

Rank 0 of a host writes, in a thread of its own, from arrays that nobody changes any more; every rank reads when it
starts. A file's name is a digest of its tokens, and so is the sequence that it is loaded as: ranks and hosts know it by
that number when they meet (engine/runner.py).
"""

import hashlib
import json
import logging
import os
import queue
import re
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import ArraysCache, CacheList

from expertd.checkpoint.shards import read_header
from expertd.errors import CheckpointError
from expertd.model.caches import SequenceCache
from expertd.model.rows import CODES, array_of, bytes_of

# Fewer tokens are read about as fast as a file.
MIN_TOKENS = 64
# Snapshots that wait to be written; a further one is not.
MAX_WAITING = 4
NAME = re.compile(r"[0-9a-f]{15}\.safetensors", re.ASCII)
# Above the numbers that leaders give, which have 60 bits.
FIRST_ID = 1 << 60
# Of a shard's bytes, at so many places, so many go into the key: two checkpoints of one shape differ everywhere.
NUM_SAMPLES, SAMPLE_BYTES = 16, 4096

# What reading a file can raise that is not ours, or no longer.
REFUSED = (CheckpointError, ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError)

Values = dict[str, Any]  # arrays and scalars by name

_log = logging.getLogger(__name__)


def checkpoint_key(folder: Path, *parts: object) -> str:
    """A digest of a checkpoint's files (sizes, times and samples: its GBs are not read again) and of `parts`."""
    digest = hashlib.sha256(repr(parts).encode())
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        with path.open("rb") as file:
            for i in range(NUM_SAMPLES):
                file.seek(i * stat.st_size // NUM_SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


class CacheFiles:
    """The files of one key, in a folder of theirs below `folder`, which all keys share `budget_bytes` of."""

    def __init__(self, folder: Path, key: str, budget_bytes: int, writes: bool) -> None:
        self._root, self._folder, self._key = folder, folder / key[:16], key
        self._budget_bytes = budget_bytes
        self._waiting: queue.Queue[tuple[Path, Values]] = queue.Queue(MAX_WAITING)
        self._writes = writes
        if writes:
            for part in folder.glob("*/.*.part"):  # of one who died while writing
                part.unlink(missing_ok=True)
            threading.Thread(target=self._write_all, name="cache files", daemon=True).start()

    def load(self, like: SequenceCache, max_bytes: int) -> dict[int, SequenceCache]:
        """The caches that were written last, up to max_bytes, oldest first; `like` is one of the model with a token."""
        found: dict[int, SequenceCache] = {}
        for path in reversed(_by_age(self._folder)):
            try:
                size = path.stat().st_size
                if size > max_bytes:
                    break
                found[FIRST_ID | int(path.stem, 16)] = load_cache(path, self._key, like)
                max_bytes -= size
            except FileNotFoundError:  # another rank, which shares the folder, removed it
                continue
            except REFUSED as e:
                _log.warning("%s is no cache of this model and is removed: %s", path, e)
                path.unlink(missing_ok=True)
        return dict(reversed(found.items()))

    def save(self, cache: SequenceCache) -> None:
        """Write a finished sequence's cache, soon; not if that is not worth it, or too many wait."""
        is_here = len(cache) == len(cache.known)  # and not at its home, another rank
        if not self._writes or len(cache) < MIN_TOKENS or not is_here:
            return
        path = self._folder / f"{_digest(cache)}.safetensors"
        if path.exists():
            os.utime(path)
            return
        values = _values_of(cache.fork(len(cache)))
        mx.eval([value for value in values.values() if isinstance(value, mx.array)])
        try:
            self._waiting.put_nowait((path, values))
        except queue.Full:
            _log.warning("a cache is not written: the disk is too slow")

    def wait(self) -> None:
        """Until all is written."""
        self._waiting.join()

    def _write_all(self) -> None:
        while True:
            path, values = self._waiting.get()
            try:
                for folder in (self._root, self._folder):  # what people asked is in these files
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                write(path, values, self._key)
                self._evict()
            except OSError as e:
                _log.warning("a cache cannot be written: %s", e)
            finally:
                self._waiting.task_done()

    def _evict(self) -> None:
        """Remove what was unused for longest, of any key, until all the rest is within the budget."""
        files = [(path, path.stat().st_size) for path in _by_age(self._root, "*/")]
        total = sum(size for _, size in files)
        for path, size in files:
            if total <= self._budget_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


def _by_age(folder: Path, below: str = "") -> list[Path]:
    found = []
    for path in folder.glob(f"{below}*"):
        if NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def _digest(cache: SequenceCache) -> str:
    """Of the tokens and the way in which they were read."""
    tokens = np.array([cache.num_read, *cache.tokens], dtype="<i8").tobytes()
    return hashlib.sha256(tokens).hexdigest()[:15]


# Between a cache and the values of a file.


def _values_of(cache: SequenceCache) -> Values:
    """All of a cache by name; arrays are contiguous and in types that NumPy has, none is evaluated."""
    values: Values = {"tokens": mx.array(cache.tokens, dtype=mx.int32), "num_read": cache.num_read}
    for i, layer in enumerate(cache.layers):
        values |= {f"layers.{i}.{path}": value for path, value in _flat(layer.state)}
    for length, state in cache.marks.items():
        for i, of_layer in enumerate(state):
            if of_layer is not None:
                values |= {f"marks.{length}.{i}.{path}": value for path, value in _flat(of_layer)}
    return {name: mx.contiguous(v) if isinstance(v, mx.array) else v for name, v in values.items()}


def _cache_of(values: Values, like: SequenceCache) -> SequenceCache:
    """The opposite; raises ValueError and its kin where a value is not what a cache like `like` has there."""
    tokens, num_read = _tokens_of(values)
    marks: dict[int, dict[int, Values]] = {}
    layers: dict[int, Values] = {i: {} for i in range(len(like.layers))}
    for name, value in values.items():
        kind, first, rest = name.split(".", 2)
        if kind == "layers":
            layers[int(first)][rest] = value
        else:
            layer, path = rest.split(".", 1)
            marks.setdefault(int(first), {}).setdefault(int(layer), {})[path] = value
    cache = SequenceCache([_layer_of(layers[i], like.layers[i], len(tokens)) for i in layers])
    cache.tokens, cache.num_read = tokens, num_read
    cache.share()
    for length, of_layers in marks.items():
        states = {i: _layer_of(found, like.layers[i], length).state for i, found in of_layers.items()}
        state = cache.marks[length] = [states.get(i) for i in range(len(like.layers))]
        if [of_one is None for of_one in state] != like.forgetting or not 0 < length <= len(tokens):
            raise ValueError(f"has a mark at {length} of {len(tokens)} tokens that is none")
    return cache


def _tokens_of(values: Values) -> tuple[list[int], int]:
    tokens, num_read = values.pop("tokens"), values.pop("num_read")
    if tokens.dtype != mx.int32 or tokens.ndim != 1 or not -1 <= num_read <= tokens.size:
        raise ValueError(f"tokens are {tokens.dtype} {tokens.shape}, {num_read} of them read in chunks")
    return tokens.tolist(), num_read


def _flat(tree: Any) -> list[tuple[str, Any]]:
    return tree_flatten(tree)  # type: ignore[return-value]


def _layer_of(values: Values, like: Any, length: int) -> Any:
    wanted = dict(_flat(like.state))
    if values.keys() != wanted.keys():
        raise ValueError(f"has {sorted(values)[:4]}, wanted {sorted(wanted)[:4]}")
    for path, value in values.items():
        _check(path, value, wanted[path], any_length=not isinstance(like, ArraysCache))
    layer = type(like).from_state(tree_unflatten(list(values.items())))
    _check_numbers(layer, like, length)
    return layer


def _check(path: str, value: Any, wanted: Any, any_length: bool) -> None:
    """An array has the type and the shape of the other, but for the number of tokens; the rest has its type."""
    if type(value) is not type(wanted) or (isinstance(value, str) and value != wanted):
        raise ValueError(
            f"{path} is {type(value).__name__} {str(value)[:20]}, wanted {type(wanted).__name__}"
        )
    if not isinstance(value, mx.array):
        return
    shape = list(value.shape)
    if any_length and len(shape) == wanted.ndim == 4:
        shape[2] = wanted.shape[2]
    if value.dtype != wanted.dtype or shape != list(wanted.shape):
        raise ValueError(f"{path} is {value.dtype} {value.shape}, wanted {wanted.dtype} {wanted.shape}")


def _check_numbers(layer: Any, like: Any, length: int) -> None:
    if isinstance(layer, CacheList):
        for each, other in zip(layer.caches, like.caches, strict=True):
            _check_numbers(each, other, length)
        return
    if isinstance(layer, ArraysCache):
        return
    rows = {a.shape[2] for _, a in _flat((layer.keys, layer.values))}
    window = getattr(layer, "max_size", 0)
    same = [getattr(layer, n, 0) == getattr(like, n, 0) for n in ("keep", "max_size", "group_size", "bits")]
    (num_rows,) = rows
    fits = 0 <= layer._idx <= num_rows and num_rows >= min(length, window) if window else num_rows == length
    if layer.offset != length or not all(same) or not fits:
        raise ValueError(f"has {num_rows} rows for {layer.offset} tokens, wanted {length}")


# Between values and a file.


def write(path: Path, values: Values, key: str) -> None:
    """Write values, whose arrays are evaluated, as a file that appears whole or not at all. Raises OSError."""
    arrays = {name: bytes_of(value) for name, value in values.items() if isinstance(value, mx.array)}
    shapes = {name: (CODES[values[name].dtype], list(values[name].shape)) for name in arrays}
    scalars = {name: value for name, value in values.items() if name not in arrays}
    about = {"key": key, "sha256": _sha256(arrays, shapes), "scalars": scalars}
    arrays["about"] = memoryview(json.dumps(about).encode())
    shapes["about"] = ("U8", [len(arrays["about"])])
    header, end = {}, 0
    for name, data in arrays.items():
        code, shape = shapes[name]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + data.nbytes]}
        end += data.nbytes
    text = json.dumps(header).encode()
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(arrays.values())
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load_cache(path: Path, key: str, like: SequenceCache) -> SequenceCache:
    """Raises CheckpointError, ValueError and its kin for anything that is not a cache of this key, written by us."""
    entries = read_header(path)
    data = memoryview(path.read_bytes())
    found = {name: data[entry.begin : entry.end] for name, entry in entries.items()}
    about = json.loads(bytes(found.pop("about")))
    if about["key"] != key:
        raise ValueError("it is of another checkpoint or version")
    shapes = {name: (entries[name].dtype, list(entries[name].shape)) for name in found}
    if about["sha256"] != _sha256(found, shapes):
        raise ValueError("its bytes are not those that were written")
    arrays = {
        name: array_of(entries[name].dtype, list(entries[name].shape), of_one)
        for name, of_one in found.items()
    }
    return _cache_of({**about["scalars"], **arrays}, like)


def _sha256(arrays: dict[str, memoryview], shapes: dict[str, tuple[str, list[int]]]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(shapes.items())).encode())
    for name in sorted(arrays):
        digest.update(arrays[name])
    return digest.hexdigest()
