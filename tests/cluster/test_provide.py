"""Copying a checkpoint between two hosts: piece by piece, on where it was cut off, and never a damaged one."""

import asyncio
import os
from pathlib import Path
from typing import Any, cast

import pytest

from expertd.checkpoint.manifest import FileEntry, Manifest, make_manifest
from expertd.checkpoint.store import Incoming, find_same
from expertd.cluster import provide
from expertd.cluster.host_messages import Fetch, Refused, Want
from expertd.cluster.provide import Provider, fetch
from expertd.errors import CheckpointError, LinkDown, RemoteProtocolError
from tests.cluster.hosts import finish
from tests.cluster.stub_hosts import StubChannel

PIECE_BYTES = 1000


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provide, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr("expertd.checkpoint.store.SPARE_BYTES", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(os.urandom(20 * PIECE_BYTES + 7))
    (made / "model-empty.safetensors").write_bytes(b"")
    return made


def manifest_of(folder: Path, tmp_path: Path) -> Manifest:
    return make_manifest(folder, tmp_path / "cache-a")


class Cable:
    """Two ends of a channel; cut after `num_pieces` pieces. `wanted` are the pieces that were asked for."""

    def __init__(self, num_pieces: int = 1 << 30) -> None:
        self.wanted: list[Want] = []
        self._left = num_pieces
        self.here = StubChannel("a", self._to_there)
        self.there = StubChannel("b", self._to_here)

    def _to_there(self, message: Any) -> None:
        if isinstance(message, Want):
            self.wanted.append(message)
        self.there.say(message)

    def _to_here(self, message: Any) -> None:
        self._left -= 1
        self.here.hang_up() if self._left < 0 else self.here.say(message)


async def copy(cable: Cable, provider: Provider, incoming: Incoming) -> list[tuple[int, int]]:
    """What `progress` was told."""
    told: list[tuple[int, int]] = []
    there: Any = cable.there
    first = cast(Any, cable.here)

    async def serve() -> None:
        await provider.serve(there, await there.receive())

    serving = asyncio.create_task(serve())
    try:
        await fetch(first, incoming, lambda done, total: told.append((done, total)))
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    return told


def test_a_cut_copy_goes_on_and_the_next_start_reads_nothing(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        manifest = manifest_of(folder, tmp_path)
        provider, store, cache = Provider(folder, manifest), tmp_path / "store", tmp_path / "cache-b"
        with pytest.raises(LinkDown):
            await copy(Cable(6), provider, Incoming(manifest, store))
        assert find_same(manifest, [], store, cache) is None
        begun = Incoming(manifest, store)
        had = begun.num_received
        assert 4 * PIECE_BYTES < had < 7 * PIECE_BYTES
        cable = Cable()
        told = await copy(cable, provider, begun)
        assert min(w.offset for w in cable.wanted if w.name == "model.safetensors") > 4 * PIECE_BYTES
        assert told[0][0] > had and told[-1] == (manifest.total_bytes, manifest.total_bytes)
        hashed: list[int] = []
        copied = begun.finish(cache, lambda done, total: hashed.append(done))
        assert hashed[-1] == manifest.total_bytes
        assert {p.name: p.read_bytes() for p in copied.iterdir()} == {
            p.name: p.read_bytes() for p in folder.iterdir()
        }
        hashed.clear()
        assert find_same(manifest, [], store, cache, lambda done, total: hashed.append(done)) == copied
        assert hashed == [], "verified once is enough"

    finish(main())


def test_a_damaged_piece_is_noticed_and_the_file_fetched_again(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        manifest = manifest_of(folder, tmp_path)
        data = bytearray((folder / "model.safetensors").read_bytes())
        good = bytes(data)
        data[12345] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        provider, incoming = Provider(folder, manifest), Incoming(manifest, tmp_path / "store")
        await copy(Cable(), provider, incoming)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: arrived damaged"):
            incoming.finish(tmp_path / "cache-b")
        (folder / "model.safetensors").write_bytes(good)
        cable = Cable()
        await copy(cable, provider, incoming)
        assert {w.name for w in cable.wanted} == {"model.safetensors"}
        incoming.finish(tmp_path / "cache-b")

    finish(main())


def test_a_copy_that_was_changed_afterwards_is_replaced(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        manifest = manifest_of(folder, tmp_path)
        store, cache = tmp_path / "store", tmp_path / "cache-b"
        provider = Provider(folder, manifest)
        for _ in range(2):
            incoming = Incoming(manifest, store)
            await copy(Cable(), provider, incoming)
            copied = incoming.finish(cache)
            assert find_same(manifest, [], store, cache) == copied
            (copied / "config.json").write_text("[]")
            assert find_same(manifest, [], store, cache) is None

    finish(main())


@pytest.mark.parametrize(
    "want",
    [
        Want("../secret.json", 0, 10),
        Want("config.json", -1, 10),
        Want("config.json", 0, PIECE_BYTES + 1),
        Want("config.json", 3, 10),
        Refused("no"),
    ],
)
def test_only_pieces_of_the_checkpoint_are_given(folder: Path, tmp_path: Path, want: Any) -> None:
    async def main() -> None:
        manifest = manifest_of(folder, tmp_path)
        channel = StubChannel("b")
        channel.say(want)
        with pytest.raises(RemoteProtocolError, match="no piece of this checkpoint"):
            await Provider(folder, manifest).serve(cast(Any, channel), Fetch(manifest.content_hash))
        assert channel.sent == []

    finish(main())


def test_another_checkpoint_and_a_file_that_shrank_are_said(folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        manifest = manifest_of(folder, tmp_path)
        provider = Provider(folder, manifest)
        other = Manifest((*manifest.files[:1], FileEntry("tokenizer.json", 5, "0" * 64)))
        with pytest.raises(CheckpointError, match="another checkpoint is served now"):
            await copy(Cable(), provider, Incoming(other, tmp_path / "store-2"))
        (folder / "model.safetensors").write_bytes(b"short")
        with pytest.raises(CheckpointError, match="shorter than it was"):
            await copy(Cable(), provider, Incoming(manifest, tmp_path / "store"))

    finish(main())
