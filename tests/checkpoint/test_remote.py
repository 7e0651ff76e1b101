"""Tensors from a web server that does what it likes: the right bytes, or one line that says what to do."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from expertd.checkpoint import blocks, ranges, remote
from expertd.checkpoint.blocks import BLOCK_BYTES, BlockFile
from expertd.checkpoint.ranges import Limits
from expertd.checkpoint.remote import PART_BLOCKS, RemoteSource, cut_into_parts
from expertd.checkpoint.remote import Site as Place
from expertd.errors import CheckpointError
from tests.checkpoint.range_server import Site, serve

QUICK = Limits(connect_s=5, silence_s=1.0, try_s=5, num_tries=3, pause_s=0.01)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NUM_TENSORS = 10


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Two shards of about 9 MB, each with ten tensors of about 900 kB, which share blocks with their neighbours."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        arrays = {
            f"layers.{number}.{i:02}": rng.standard_normal((450 + i, 500), np.float32)
            for i in range(NUM_TENSORS)
        }
        save_file(arrays, folder / shard)
        weight_map |= dict.fromkeys(arrays, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def site(local: Path) -> Iterator[Site]:
    with serve(Site().take(local)) as site:
        yield site


@pytest.fixture
def open_remote(site: Site, tmp_path: Path) -> Iterator[Callable[..., RemoteSource]]:
    opened: list[RemoteSource] = []

    def go(cache_bytes: int | None = None, **private: str) -> RemoteSource:
        place = Place("the checkpoint", site.url, private)
        opened.append(RemoteSource(place, tmp_path / "home", cache_bytes, QUICK))
        return opened[-1]

    yield go
    for source in opened:
        source.close()


def faults(fault: str, at: Container[int] = range(2, 10**9)) -> Callable[[str, int], str]:
    """The fault at the given requests for each shard; the first good answer brings the header."""
    return lambda name, n: fault if name in SHARDS and n in at else ""


def tensors(source: RemoteSource) -> list[str]:
    return sorted(name for entries in source.shards.values() for name in entries)


def assert_same(source: RemoteSource, local: Path, names: list[str]) -> None:
    """The bytes of these tensors in the source's folder are the local ones."""
    for shard in {SHARDS[int(name.split(".")[1])] for name in names}:
        here, there = ((folder / shard).read_bytes() for folder in (source.folder, local))
        assert len(here) == len(there)
        for name, entry in source.shards[shard].items():
            if name in names:
                assert here[entry.begin : entry.end] == there[entry.begin : entry.end], name


def disk_bytes(source: RemoteSource) -> int:
    return sum(path.stat().st_blocks * 512 for path in source.folder.glob("*.safetensors"))


def test_lazy_arrays_get_their_bytes_when_they_are_asked_for(
    open_remote: Callable[..., RemoteSource], local: Path
) -> None:
    source = open_remote()
    assert {p.name for p in source.folder.iterdir()} == {p.name for p in local.iterdir()}
    lazy = {name: array for shard in SHARDS for name, array in mx.load(str(source.folder / shard)).items()}  # type: ignore[union-attr]
    assert disk_bytes(source) < BLOCK_BYTES
    source.fetch(tensors(source))
    for shard in SHARDS:
        for name, array in mx.load(str(local / shard)).items():  # type: ignore[union-attr]
            assert mx.array_equal(lazy[name], array)
    source.fetch(tensors(source))
    assert (
        source.held_bytes == sum(-(-(local / s).stat().st_size // BLOCK_BYTES) for s in SHARDS) * BLOCK_BYTES
    )


def test_only_what_is_asked_for_is_read(
    open_remote: Callable[..., RemoteSource], site: Site, local: Path
) -> None:
    source = open_remote()
    before = site.num_bytes()
    source.fetch(["layers.1.04", "layers.1.05"])
    assert_same(source, local, ["layers.1.04", "layers.1.05"])
    # Neighbours are one request; 1.8 MB lie in at most three blocks.
    assert [name for name, _ in site.requests].count(SHARDS[1]) == 2
    assert 1_800_000 < site.num_bytes() - before <= 3 * BLOCK_BYTES
    assert all(headers["accept-encoding"] == "identity" for headers in site.headers)
    assert all(
        h["if-range"] == site.etag
        for h in site.headers
        if "range" in h and not h["range"].startswith("bytes=0-")
    )
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        source.fetch(["nothing"])


def test_parts_are_runs_of_neighbours() -> None:
    wanted = [("a", i) for i in (0, 1, 2, 4)] + [("b", i) for i in range(5, 5 + 2 * PART_BLOCKS + 1)]
    assert list(cut_into_parts(wanted)) == [
        ("a", 0, 3), ("a", 4, 1), ("b", 5, PART_BLOCKS), ("b", 5 + PART_BLOCKS, PART_BLOCKS),
        ("b", 5 + 2 * PART_BLOCKS, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        "truncated",
        "whole",
        "stalled",
        "wrong range",
        "other size",
        "too much",
        "endless",
        "503",
        "429",
        "500",
    ],
)
def test_what_may_pass_is_tried_again(
    fault: str, open_remote: Callable[..., RemoteSource], site: Site, local: Path
) -> None:
    # A false size at the first request is the size.
    site.fault = faults(fault, (2, 3) if fault == "other size" else (1, 3, 4))
    source = open_remote()
    source.fetch(tensors(source))
    assert_same(source, local, tensors(source))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("truncated", "sent .* bytes of|RemoteProtocolError"),
        ("whole", "answered 200 to a request for a range, wanted 206"),
        ("stalled", "ReadTimeout"),
        ("wrong range", "'bytes .*', wanted bytes"),
        ("other size", "'bytes .*', wanted bytes"),
        ("too much", "sent more than"),
        ("endless", "sent more than"),
        ("503", "answered 503"),
    ],
)
def test_what_does_not_pass_is_named(
    fault: str, words: str, open_remote: Callable[..., RemoteSource], site: Site
) -> None:
    source = open_remote()
    site.fault = faults(fault)
    with pytest.raises(CheckpointError, match=words) as raised:
        source.fetch(["layers.1.00"])
    assert f"{site.url}{SHARDS[1]}: " in str(raised.value) and "3 tries in a row" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [name for name, _ in site.requests].count(SHARDS[1]) <= 2 + QUICK.num_tries


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("changed", 'changed while it was read \\(was "first", is "second"\\)'),
        ("compressed", "Content-Encoding 'gzip'"),
        ("404", "no such file"),
        ("403", "refused"),
        ("416", "shorter"),
        ("418", "418"),
    ],
)
def test_what_cannot_pass_ends_at_once(
    fault: str, words: str, open_remote: Callable[..., RemoteSource], site: Site
) -> None:
    source = open_remote()
    site.fault = faults(fault)
    with pytest.raises(CheckpointError, match=words):
        source.fetch(["layers.1.00"])
    assert [name for name, _ in site.requests].count(SHARDS[1]) == 2


def test_a_try_goes_on_where_the_last_one_ended(
    open_remote: Callable[..., RemoteSource], site: Site, local: Path
) -> None:
    """Each answer is cut in half, and that is progress as long as a MiB comes: no number of tries ends it."""
    site.fault = lambda name, n: "truncated" if name == SHARDS[0] and 2 <= n <= 4 else ""
    source = open_remote()
    source.fetch([f"layers.0.{i:02}" for i in range(7)])
    assert_same(source, local, ["layers.0.00", "layers.0.06"])
    spans = [re.findall(r"\d+", span) for name, span in site.requests if name == SHARDS[0] and span][1:]
    assert len(spans) == 4 and len({end for _, end in spans}) == 1
    assert [int(begin) for begin, _ in spans] == sorted({int(begin) for begin, _ in spans})


def test_a_file_may_have_a_date_or_a_weak_tag_but_not_nothing(
    open_remote: Callable[..., RemoteSource], site: Site, local: Path
) -> None:
    site.etag, site.last_modified = "", "Sun, 01 Nov 2026 00:00:00 GMT"
    source = open_remote()
    source.fetch(["layers.0.00"])
    assert site.headers[-1]["if-range"] == site.last_modified
    source.close()
    site.etag = 'W/"weak"'
    source = open_remote()
    source.fetch(["layers.0.00"])
    assert "if-range" not in site.headers[-1]
    assert_same(source, local, ["layers.0.00"])
    source.close()
    site.etag = site.last_modified = ""
    with pytest.raises(CheckpointError, match="neither an ETag nor a Last-Modified"):
        open_remote()


def test_redirects_do_not_carry_the_token(
    open_remote: Callable[..., RemoteSource], site: Site, local: Path
) -> None:
    with serve(Site().take(local)) as other:
        site.elsewhere = other.url.replace("127.0.0.1", "localhost")
        site.fault = faults("redirect", range(1, 10**9))
        source = open_remote(Authorization="Bearer secret")
        source.fetch(["layers.0.01"])
        assert_same(source, local, ["layers.0.01"])
        assert all(headers["authorization"] == "Bearer secret" for headers in site.headers)
        assert other.requests and not any("authorization" in headers for headers in other.headers)
        # The way is remembered, until it is refused: then the first host is asked again.
        assert [name for name, _ in site.requests].count(SHARDS[0]) == 1
        other.fault = lambda name, n: "403" if n == len(refused) + 1 else ""
        refused = [name for name, _ in other.requests if name == SHARDS[0]]
        source.fetch(["layers.0.05"])
        assert_same(source, local, ["layers.0.05"])
        assert [name for name, _ in site.requests].count(SHARDS[0]) == 2


@pytest.mark.parametrize(
    "where",
    ["http://example.com/", "ftp://127.0.0.1/", "http://[", "http://u:p@127.0.0.1/", "", "file:///etc/"],
)
def test_redirects_to_less_safe_places_are_refused(
    where: str, open_remote: Callable[..., RemoteSource], site: Site
) -> None:
    site.elsewhere, site.fault = where, faults("redirect", range(1, 10**9))
    with pytest.raises(CheckpointError, match="redirected"):
        open_remote()


def test_redirects_in_a_circle_end(open_remote: Callable[..., RemoteSource], site: Site) -> None:
    site.elsewhere, site.fault = site.url, faults("redirect", range(1, 10**9))
    with pytest.raises(CheckpointError, match="redirected more than"):
        open_remote()


def test_small_files_are_bounded(
    open_remote: Callable[..., RemoteSource], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "MAX_SMALL_FILE_BYTES", 4 << 20)
    site.fault = lambda name, n: "endless" if name == "tokenizer.json" else ""
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: larger than 4 MiB"):
        open_remote()
    site.fault = lambda name, n: "503" if name == "tokenizer.json" and n == 2 else ""
    assert (open_remote().folder / "tokenizer.json").read_text() == "{}"


def test_no_config_is_no_checkpoint(open_remote: Callable[..., RemoteSource], site: Site) -> None:
    del site.files["config.json"]
    with pytest.raises(CheckpointError, match=r"config.json: no such file \(404\)"):
        open_remote()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../../evil.safetensors"}}', "evil"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "e vil?.safetensors"}}', "plain name"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "A.safetensors", "b": "a.safetensors"}}', "twice"),
        ("model.safetensors.index.json", b"[", "not JSON"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "no such file"),
        ("quantization_manifest.json", b'{"files": [{"name": "../x"}]}', "list of files"),
        (SHARDS[0], (1 << 60).to_bytes(8, "little") + b"{}", "header length"),
        (SHARDS[0], (1 << 20).to_bytes(8, "little") + b"{}", "truncated"),
        (SHARDS[0], (2).to_bytes(8, "little") + b"[]", "JSON list"),
        (SHARDS[0], b"1234", "wanted a safetensors file"),
        (SHARDS[0], b"", "'bytes 0--1/0'"),
    ],
)  # fmt: skip
def test_strange_checkpoints_are_refused(
    name: str, data: bytes, words: str, open_remote: Callable[..., RemoteSource], site: Site, tmp_path: Path
) -> None:
    site.files[name] = data
    with pytest.raises(CheckpointError, match=words):
        open_remote()
    assert not list(tmp_path.rglob("*evil*"))


def test_a_large_header_is_read_in_two_pieces(
    open_remote: Callable[..., RemoteSource], site: Site, local: Path
) -> None:
    """Of 200 kB, where the first request brings 128 KiB; its bytes stay when its blocks are dropped."""
    whole = (local / SHARDS[0]).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length] + b" " * 200_000
    site.files[SHARDS[0]] = len(header).to_bytes(8, "little") + header + whole[8 + length :]
    source = open_remote(0)
    source.fetch(tensors(source))
    source.release(tensors(source))
    assert source.held_bytes == 0
    here = (source.folder / SHARDS[0]).read_bytes()
    assert here[: 8 + len(header)] == site.files[SHARDS[0]][: 8 + len(header)]
    assert not any(here[8 + len(header) + 4096 : 8 + len(header) + 500_000])


# The disk.


def test_released_tensors_go_when_the_room_is_needed(
    open_remote: Callable[..., RemoteSource], site: Site, local: Path
) -> None:
    bound = 5 * BLOCK_BYTES
    source = open_remote(bound)
    names = tensors(source)
    for name in names:
        source.fetch([name])
        assert_same(source, local, [name])
        assert disk_bytes(source) <= bound + 2 * 8192
        source.release([name])
    # The last ones are still there, and the first ones come again.
    before = len(site.requests)
    source.fetch(names[-2:])
    assert len(site.requests) == before
    assert_same(source, local, names[-2:])
    source.fetch(names[:1])
    assert len(site.requests) == before + 1
    assert_same(source, local, [names[0], *names[-2:]])


def test_what_is_in_use_stays_whatever_the_bound(
    open_remote: Callable[..., RemoteSource], local: Path
) -> None:
    source = open_remote(2 * BLOCK_BYTES)
    names = tensors(source)
    source.fetch(names)
    assert_same(source, local, names)
    source.release(names[2:])
    assert_same(source, local, names[:2])
    assert source.held_bytes <= 3 * BLOCK_BYTES
    source.release(names)
    source.release(names)
    assert source.held_bytes <= 2 * BLOCK_BYTES
    assert disk_bytes(source) <= 2 * BLOCK_BYTES + 2 * 8192


def test_threads_may_share_a_source(open_remote: Callable[..., RemoteSource], local: Path) -> None:
    """One fetches ahead while others use and release theirs; blocks are shared, and the bound is small."""
    source = open_remote(3 * BLOCK_BYTES)
    names = tensors(source)

    def use(number: int) -> None:
        chance = random.Random(number)
        for _ in range(12):
            some = chance.sample(names[number::3], 2)
            source.fetch(some)
            assert_same(source, local, some)
            source.release(some)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(use, range(3)))
    assert source.held_bytes <= 3 * BLOCK_BYTES
    assert disk_bytes(source) <= source.held_bytes + 2 * 8192


def test_shards_are_emptied_where_there_are_no_holes(
    open_remote: Callable[..., RemoteSource], local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(blocks, "_punch", refuse)
    source = open_remote(BLOCK_BYTES)
    lazy = mx.load(str(source.folder / SHARDS[0]))
    names = tensors(source)
    for name in names * 2:
        source.fetch([name])
        assert_same(source, local, [name])
        source.release([name])
        # One shard at most: of the other, nothing was in use when room was needed.
        assert disk_bytes(source) <= 10 * BLOCK_BYTES
    source.fetch(names[:1])
    assert mx.array_equal(lazy[names[0]], mx.load(str(local / SHARDS[0]))[names[0]])  # type: ignore[index,call-overload]


def test_a_full_disk_is_an_answer(
    open_remote: Callable[..., RemoteSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_remote()
    with monkeypatch.context() as patch:
        patch.setattr(remote.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
        with pytest.raises(CheckpointError, match=r"1.1 GB free, wanted 1.1 GB for what is read next"):
            source.fetch(["layers.0.00"])

    def full(self: BlockFile, offset: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BlockFile, "_write", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*what came is kept"):
        source.fetch(["layers.0.00"])


# From one process to the next.


def test_the_next_process_reads_only_what_is_missing(
    open_remote: Callable[..., RemoteSource], site: Site, local: Path
) -> None:
    first = open_remote()
    first.fetch(["layers.0.00", "layers.0.01"])
    first.close()
    second = open_remote()
    assert second.identity == first.identity
    before = len(site.requests)
    second.fetch(["layers.0.00", "layers.0.01"])
    assert len(site.requests) == before
    second.fetch(tensors(second))
    assert_same(second, local, tensors(second))


def test_damage_between_processes_is_noticed(
    open_remote: Callable[..., RemoteSource], site: Site, local: Path
) -> None:
    """Random bytes of the files or of the records are changed, or their ends cut off: the bytes come out right."""
    rng = random.Random(5)
    source = open_remote()
    source.fetch(tensors(source))
    for _ in range(12):
        source.close()
        home = source.folder.parent
        path = rng.choice([*(home / "blocks").iterdir(), *source.folder.glob("*.safetensors")])
        data = bytearray(path.read_bytes())
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        source = open_remote()
        source.fetch(tensors(source))
        assert_same(source, local, tensors(source))


def test_holes_are_never_taken_for_data(
    open_remote: Callable[..., RemoteSource], site: Site, local: Path
) -> None:
    """A record that reached the disk although the data did not, as after a power cut."""
    source = open_remote()
    source.fetch(tensors(source))
    source.close()
    path = source.folder / SHARDS[0]
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)
    source = open_remote()
    source.fetch(tensors(source))
    assert_same(source, local, tensors(source))


def test_another_version_starts_from_nothing(
    open_remote: Callable[..., RemoteSource], site: Site, tmp_path: Path
) -> None:
    first = open_remote()
    first.fetch(tensors(first))
    first.close()
    site.take(other := write_checkpoint(tmp_path / "other", seed=1)).etag = '"new"'
    second = open_remote()
    assert second.identity != first.identity
    assert second.held_bytes == 0
    second.fetch(tensors(second))
    assert_same(second, other, tensors(second))


def test_two_processes_have_folders_of_their_own(
    open_remote: Callable[..., RemoteSource], local: Path, tmp_path: Path
) -> None:
    first, second = open_remote(), open_remote()
    assert first.folder != second.folder
    first.fetch(["layers.0.00"])
    second.fetch(["layers.0.00"])
    assert_same(second, local, ["layers.0.00"])
    first.close()
    remote.drop_others(tmp_path / "another")
    assert not first.folder.exists() and second.folder.exists()


CHILD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from expertd.checkpoint.ranges import Limits
from expertd.checkpoint.remote import RemoteSource, Site
source = RemoteSource(Site("x", sys.argv[1]), Path(sys.argv[2]), limits=Limits(num_connections=2))
for entries in source.shards.values():
    for name in entries:
        source.fetch([name])
        print(name, flush=True)
"""


@pytest.mark.fault
def test_a_killed_process_goes_on(
    open_remote: Callable[..., RemoteSource], site: Site, local: Path, tmp_path: Path
) -> None:
    """Killed again and again, in the middle of a body: what was fetched before is not asked for again."""
    done: list[str] = []
    for at in (4, 9, 14):
        site.requests.clear()
        site.fault = lambda name, n, at=at: (
            "stalled" if name in SHARDS and len(site.requests) > 20 + at else ""
        )
        command = [sys.executable, "-c", CHILD, site.url, str(tmp_path / "home")]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(site.requests) <= 20 + at and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        done += child.communicate(timeout=60)[0].split()
    site.requests.clear()
    site.fault = lambda name, n: ""
    source = open_remote()
    before = len(site.requests)
    source.fetch(set(done))
    assert len(done) > 5 and len(site.requests) == before
    source.fetch(tensors(source))
    assert_same(source, local, tensors(source))


def test_closing_ends_what_waits(site: Site, tmp_path: Path) -> None:
    """A server that stands still does not hold a process that wants to end."""
    source = RemoteSource(Place("x", site.url), tmp_path / "home", limits=Limits(silence_s=60))
    site.fault = faults("stalled")
    failed: list[str] = []

    def fetch() -> None:
        try:
            source.fetch(["layers.0.00"])
        except CheckpointError as error:
            failed.append(str(error))

    thread = threading.Thread(target=fetch)
    thread.start()
    while [name for name, _ in site.requests].count(SHARDS[0]) < 2:
        time.sleep(0.01)
    source.close()
    thread.join(timeout=10)
    assert failed and not thread.is_alive()
    with pytest.raises(CheckpointError, match="was closed"):
        source.fetch(["layers.0.00"])
