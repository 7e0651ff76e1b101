import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from expertd.checkpoint.manifest import (
    QUANTIZATION_MANIFEST,
    FileEntry,
    check_manifest,
    check_sizes,
    make_manifest,
    verify,
)
from expertd.checkpoint.store import Incoming, find_same, read_piece
from expertd.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    (folder / "tokenizer.json").write_text("[]")
    (folder / "run_me.py").write_text("not ours")
    (folder / "model.safetensors.part").write_text("not ours")
    return folder


def hashed(folder: Path, cache: Path) -> int:
    """Bytes that making the manifest reads."""
    totals = [0]
    make_manifest(folder, cache, lambda done, total: totals.append(done))
    return max(totals)


def test_only_data_files_count(folder: Path, tmp_path: Path) -> None:
    manifest = make_manifest(folder, tmp_path / "cache")
    assert [f.name for f in manifest.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert manifest.total_bytes == 100_004


def test_nothing_is_read_twice(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert hashed(folder, cache) == 100_004
    assert hashed(folder, cache) == 0
    (folder / "tokenizer.json").write_text("[1]")
    assert hashed(folder, cache) == 3


def test_a_changed_byte_changes_the_hash(folder: Path, tmp_path: Path) -> None:
    before = make_manifest(folder, tmp_path / "cache").content_hash
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[50_000] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert make_manifest(folder, tmp_path / "cache").content_hash != before


@pytest.mark.parametrize(
    "kept", [b"", b"{", b"[]", b'{"config.json": 1}', b'{"../x": {"seen": [1], "sha256": "00"}}']
)
def test_damaged_cache_is_made_anew(folder: Path, tmp_path: Path, kept: bytes) -> None:
    cache = tmp_path / "cache"
    wanted = make_manifest(folder, cache)
    (file,) = cache.iterdir()
    file.write_bytes(kept)
    assert make_manifest(folder, cache) == wanted


def test_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert make_manifest(folder, tmp_path / "file" / "cache") == make_manifest(folder, tmp_path / "cache")


@pytest.mark.parametrize(
    "name",
    ["../config.json", "/etc/passwd.json", "a/b.json", "run.py", ".hidden.json", "", "x\n.json", "a" * 300],
)
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="not a plain file"):
        check_manifest([FileEntry(name, 1, "0" * 64)])


@pytest.mark.parametrize("change", [{"size": -1}, {"sha256": "0"}, {"sha256": "../" * 21 + "x"}])
def test_hostile_entries_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        check_manifest([replace(FileEntry("config.json", 1, "0" * 64), **change)])
    with pytest.raises(CheckpointError, match="0 files"):
        check_manifest([])
    with pytest.raises(CheckpointError, match="twice"):
        check_manifest([FileEntry("a.json", 1, "0" * 64), FileEntry("A.json", 1, "0" * 64)])


def fetch(incoming: Incoming, folder: Path, piece_bytes: int, num_pieces: int = 1 << 30) -> None:
    for file, offset in incoming.missing():
        while offset < file.size or file.size == 0:
            if num_pieces == 0:
                return
            data = read_piece(folder, file, offset, piece_bytes)
            incoming.write(file, offset, data)
            offset, num_pieces = offset + len(data), num_pieces - 1
            if offset == file.size:
                break


def test_interrupted_copy_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    manifest = make_manifest(folder, tmp_path / "cache")
    fetch(Incoming(manifest, tmp_path / "store"), folder, 1000, num_pieces=50)
    again = Incoming(manifest, tmp_path / "store")
    assert 48_000 < again.num_received < 52_000
    assert find_same(manifest, [], tmp_path / "store", tmp_path / "cache2") is None
    fetch(again, folder, 1000)
    arrived = again.finish(tmp_path / "cache2")
    assert hashed(arrived, tmp_path / "cache2") == 0
    assert find_same(manifest, [], tmp_path / "store", tmp_path / "cache2") == arrived
    assert (arrived / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_damaged_copy_is_refused_and_fetched_again(folder: Path, tmp_path: Path) -> None:
    manifest = make_manifest(folder, tmp_path / "cache")
    incoming = Incoming(manifest, tmp_path / "store")
    fetch(incoming, folder, 1 << 20)
    damaged = tmp_path / "store" / f"{manifest.content_hash}.part" / "model.safetensors"
    damaged.write_bytes(b"x" * 100_000)
    with pytest.raises(CheckpointError, match=r"^model.safetensors: arrived damaged"):
        incoming.finish(tmp_path / "cache2")
    assert [f.name for f, _ in incoming.missing()] == ["model.safetensors"]
    fetch(incoming, folder, 1 << 20)
    assert incoming.finish(tmp_path / "cache2").is_dir()


def test_pieces_must_follow_each_other(folder: Path, tmp_path: Path) -> None:
    manifest = make_manifest(folder, tmp_path / "cache")
    incoming = Incoming(manifest, tmp_path / "store")
    with pytest.raises(CheckpointError, match="do not follow"):
        incoming.write(manifest.files[1], 10, b"x")
    with pytest.raises(CheckpointError, match="do not follow"):
        incoming.write(manifest.files[0], 0, b"{} and more")


def test_full_disk_is_said_before_anything_is_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(folder, tmp_path / "cache")
    monkeypatch.setattr("expertd.checkpoint.store.SPARE_BYTES", 1 << 60)
    with pytest.raises(CheckpointError, match=r"GB free, wanted .* --store"):
        Incoming(manifest, tmp_path / "store")


def test_found_among_folders_by_hash(folder: Path, tmp_path: Path) -> None:
    manifest = make_manifest(folder, tmp_path / "cache")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    found = find_same(manifest, [other, folder], tmp_path / "store", tmp_path / "cache")
    assert found == folder


# The list of files that the quantizer writes.


def list_files(folder: Path) -> Path:
    """Write the folder's list as the quantizer does."""
    files = [
        asdict(f) for f in make_manifest(folder, folder / "no-cache").files if f.name != QUANTIZATION_MANIFEST
    ]
    (folder / QUANTIZATION_MANIFEST).write_text(json.dumps({"effort": "plain", "files": files}))
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_verified_once(folder: Path, tmp_path: Path) -> None:
    verify(folder, tmp_path / "cache")  # without a list there is nothing to compare
    assert not (tmp_path / "cache").exists() and check_sizes(folder) == ()
    list_files(folder)
    totals: list[int] = []
    for _ in range(2):
        verify(folder, tmp_path / "cache", lambda done, total: totals.append(done))
    assert max(totals) == totals[-1] == 100_004 + (folder / QUANTIZATION_MANIFEST).stat().st_size
    assert len(totals) == 4
    assert [file.name for file in check_sizes(folder)] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: flip(f / "model.safetensors"),
            r"model.safetensors: has SHA-256 \w{64}, wanted \w{64} by quant",
        ),
        (
            lambda f: flip(f / "tokenizer.json"),
            "if you changed it on purpose, delete quantization_manifest.json",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 99_999), "has 99999 bytes, wanted 100000"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: absent, but listed"),
        (lambda f: (f / "model-2.safetensors").touch(), "not listed in .*, and mlx-lm would load it"),
        (lambda f: (f / QUANTIZATION_MANIFEST).write_text("{"), "not JSON"),
        (lambda f: (f / QUANTIZATION_MANIFEST).write_text("{}"), "its list of files is damaged"),
        (lambda f: (f / QUANTIZATION_MANIFEST).write_text('{"files": []}'), "its list of files is damaged"),
        (
            lambda f: (f / QUANTIZATION_MANIFEST).write_text(
                '{"files": [{"name": 1, "size": 2, "sha256": 3}]}'
            ),
            "its list of files is damaged",
        ),
        (
            lambda f: (f / QUANTIZATION_MANIFEST).write_text(
                json.dumps({"files": [{"name": "../x.json", "size": 2, "sha256": "0" * 64}]})
            ),
            "its list of files is damaged",
        ),
    ],
)
def test_damage_is_found(damage: Callable[[Path], None], message: str, folder: Path, tmp_path: Path) -> None:
    damage(list_files(folder))
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(folder, tmp_path / "cache")
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_hashing_ends_when_it_is_interrupted(folder: Path, tmp_path: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(1 << 30)
    calls = []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_manifest(folder, tmp_path / "cache", interrupt)
    assert len(calls) <= 4
