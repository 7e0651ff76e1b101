"""Caches on disk: used again with the same bits, and never when anything about a file is not as it was written."""

import json
import os
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from expertd.cluster.rank import _open_files
from expertd.config import GroupConfig
from expertd.engine.messages import Ready
from expertd.engine.runner import SOLO
from expertd.model.cache_files import REFUSED, CacheFiles, checkpoint_key, load_cache, write
from expertd.model.caches import Piece, SequenceCache
from expertd.model.model import Model
from tests.engine.test_prefix import FAMILIES, SYSTEM, done, serve
from tests.engine.test_recovery import CHUNK, Served, load
from tests.tiny import make_tiny

GB = 1 << 30
FIRST = SYSTEM + "a first question, which is long enough to be kept in a file"


def like(model: Model) -> SequenceCache:
    cache = SequenceCache(model.new_cache())
    model.prefill([0, 0], cache.layers, SOLO)
    return cache


def restarted(model: Model, folder: Path, files: CacheFiles) -> Served:
    served = serve(model, folder, GB)
    served.caches, served.files = files.load(like(model), GB), files
    return served


@pytest.mark.parametrize("family", [*FAMILIES, "bfloat16", "kv bits"])
def test_a_file_gives_the_bits_of_no_file(family: str, tmp_path: Path) -> None:
    dtype = "bfloat16" if family == "bfloat16" else "float32"
    special = {"bfloat16": "qwen3_moe", "kv bits": "qwen3_moe_heads_of_32"}
    folder = make_tiny(tmp_path / "tiny", special.get(family, family), dtype)
    model = load(folder, "native", kv_bits=4 if family == "kv bits" else 0)
    files = CacheFiles(tmp_path / "files", checkpoint_key(folder), GB, writes=True)
    before = restarted(model, tmp_path / "before", files)
    before.ask("first", FIRST)
    assert before.live() and done(before, "first").cached_tokens == 0
    files.wait()
    prompts = {
        "again": FIRST,
        "turn": FIRST + "".join(map(chr, before.ids("first"))) + " and then?",
        "other": SYSTEM + "four five, another question",
    }
    after, alone = restarted(model, tmp_path / "after", files), serve(model, tmp_path / "alone", 0)
    for name, prompt in prompts.items():
        after.ask(name, prompt)
        alone.ask(name, prompt)
    assert after.live() and alone.live()
    cached = {name: done(after, name).cached_tokens for name in prompts}
    assert cached["again"] == len(FIRST) - 1
    assert cached["turn"] >= len(FIRST) // CHUNK * CHUNK - CHUNK  # the last mark may have been thinned out
    assert cached["other"] >= (len(SYSTEM) // CHUNK * CHUNK if family != "qwen3_next" else 1)
    for name in prompts:
        assert np.array_equal(after.logits(name), alone.logits(name)), name


def made(length: int = 70) -> SequenceCache:
    """A cache of every kind, as after `length` tokens that were read in one chunk; small, as others see it."""
    window, both = RotatingKVCache(max_size=8), CacheList(KVCache(), KVCache())
    layers = [KVCache(), window, ArraysCache(2), both]
    rows = mx.arange(length * 4, dtype=mx.float32).reshape(1, 2, length, 2)
    for layer in (layers[0], window, *both.caches):
        layer.update_and_fetch(rows.astype(mx.bfloat16), rows)
    layers[2][0], layers[2][1] = rows[:, :, :1, :], mx.ones((1, 3))
    cache = SequenceCache(layers)
    cache.extend(list(range(length)), decode=False)
    cache.mark()
    return cache


def test_every_kind_comes_back(tmp_path: Path) -> None:
    files = CacheFiles(tmp_path, "key", GB, writes=True)
    files.save(made())
    files.wait()
    ((number, cache),) = CacheFiles(tmp_path, "key", GB, writes=False).load(made(2), GB).items()
    assert number >> 60 == 1 and cache.tokens == list(range(70)) and cache.num_read == 70
    assert cache.lengths() == [70] and list(cache.marks) == [70]
    for layer, other in zip(cache.layers, made().fork(70).layers, strict=True):
        for (_, a), (_, b) in zip(tree_flatten(layer.state), tree_flatten(other.state), strict=True):
            assert mx.array_equal(a, b) if isinstance(a, mx.array) else a == b
    assert oct(next(tmp_path.iterdir()).stat().st_mode)[-3:] == "700"
    assert [p.name for p in tmp_path.glob("*/.*")] == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    files = CacheFiles(tmp_path, "key", GB, writes=True)
    files.save(made())
    files.wait()
    (path,) = tmp_path.glob("*/*.safetensors")
    return path


def test_damage_is_noticed_wherever_it_is(saved: Path) -> None:
    whole, rng, wanted = saved.read_bytes(), random.Random(3), made(2)
    load_cache(saved, "key", wanted)
    for _ in range(300):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            # Half of the changes in the header, where they are not mere numbers.
            data[rng.randrange(rng.choice((3000, len(data))))] ^= 1 << rng.randrange(8)
        saved.write_bytes(data)
        with pytest.raises(REFUSED):
            load_cache(saved, "key", wanted)


@pytest.mark.parametrize("change", ["key", "shape", "type", "name", "offset", "mark", "number", "scalars"])
def test_what_is_whole_but_does_not_fit_is_removed(saved: Path, change: str, tmp_path: Path) -> None:
    """As another version or a stranger might have written it, hash and all."""
    from expertd.model import cache_files

    values: dict[str, Any] = cache_files._values_of(made())
    key = "another" if change == "key" else "key"
    if change == "shape":
        values["layers.0.0"] = values["layers.0.0"][:, :1]
    elif change == "type":
        values["layers.2.0.1"] = values["layers.2.0.1"].astype(mx.float16)
    elif change == "name":
        values["layers.9.0"] = values["layers.0.0"]
    elif change == "offset":
        values["layers.0.2"] = 10**6
    elif change == "mark":
        values |= {name.replace("marks.70", "marks.71"): v for name, v in values.items() if "marks" in name}
    elif change == "number":
        values["layers.1.5"] = -3
    elif change == "scalars":
        del values["num_read"]
    mx.eval([v for v in values.values() if isinstance(v, mx.array)])
    write(saved, {n: mx.contiguous(v) if isinstance(v, mx.array) else v for n, v in values.items()}, key)
    files = CacheFiles(tmp_path, "key", GB, writes=False)
    assert files.load(made(2), GB) == {} and not saved.exists()


def test_budgets_keep_the_newest(tmp_path: Path) -> None:
    files = CacheFiles(tmp_path, "key", GB, writes=True)
    for n in range(70, 76):
        files.save(made(n))
        files.wait()
        (path,) = [p for p in tmp_path.glob("*/*") if p.stat().st_mtime_ns > 10**18]
        os.utime(path, ns=(n, n))
    files.save(made(70))  # there already: used again
    os.utime(max(tmp_path.glob("*/*"), key=lambda p: p.stat().st_mtime_ns), ns=(99, 99))
    size = max(p.stat().st_size for p in tmp_path.glob("*/*"))
    reader = CacheFiles(tmp_path, "key", 3 * size, writes=False)
    assert [len(c) for c in reader.load(made(2), 3 * size).values()] == [74, 75, 70]
    reader._evict()
    assert [len(c) for c in reader.load(made(2), GB).values()] == [74, 75, 70]


def test_short_and_divided_ones_are_not_written_and_strange_files_not_touched(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    strange = tmp_path / "key" / "notes.txt"
    strange.write_text("mine")
    (tmp_path / "key" / f"{'a' * 15}.safetensors").symlink_to(strange)
    files = CacheFiles(tmp_path, "key", 0, writes=True)
    files.save(made(10))
    elsewhere = made()
    elsewhere.share()
    elsewhere.home, elsewhere.pending = 1, [Piece([1], True)]
    files.save(elsewhere)
    files.wait()
    files._evict()
    assert files.load(made(2), GB) == {} and strange.read_text() == "mine"
    assert len(list(tmp_path.glob("*/*"))) == 2


def test_caches_of_other_bits_are_other_files(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "tiny", "mixtral")
    opened = [
        _open_files(GroupConfig(str(folder), kv_bits=bits, prefix_cache_dir=str(tmp_path)), Ready(1), folder)
        for bits in (0, 8, 8)
    ]
    keys = [files._key for files in opened if files]
    assert len(keys) == 3 and keys[0] != keys[1] == keys[2]


def test_the_key_is_the_checkpoint_s(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "tiny", "mixtral")
    key = checkpoint_key(folder, "native", 8)
    assert key == checkpoint_key(folder, "native", 8) != checkpoint_key(folder, "native", 16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert checkpoint_key(folder, "native", 8) != key
