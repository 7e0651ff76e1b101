"""A conversion's output: the same bytes whatever happens to the process, and nothing half-written loadable."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from expertd.checkpoint.inspect import check_checkpoint
from expertd.checkpoint.manifest import make_manifest, verify
from expertd.errors import CheckpointError, ConfigError
from expertd.quant import output, shards
from expertd.quant.output import Output, TensorPlan, Unit
from tests.quant.output_jobs import CONFIG, FINGERPRINT, SHARD_BYTES, content, convert, make_texts, unit

UNITS = [unit(i, rows=20) for i in range(8)]
SMALL_SHARD = 12_000  # of three units


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return make_texts(tmp_path / "texts")


def begin(dst: Path, fingerprint: dict[str, Any] = FINGERPRINT, units: list[Unit] = UNITS) -> Output:
    return Output(dst, units, fingerprint, 1000, SMALL_SHARD)


def complete(dst: Path, texts: Path) -> dict[str, str]:
    """Write what is missing and finish; the files' hashes."""
    with begin(dst) as out:
        for u in UNITS:
            if u.name not in out:
                out.write(u.name, content(u), {"n": 1})
        out.finish(CONFIG, texts, {"notes": out.notes})
    return hashes(dst)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def wanted(tmp_path: Path, texts: Path) -> dict[str, str]:
    """What an uninterrupted run gives."""
    return complete(tmp_path / "wanted", texts)


def write_some(dst: Path, count: int) -> Path:
    """What a run leaves that ends after `count` units; gives the work folder."""
    with begin(dst) as out:
        for u in UNITS[:count]:
            out.write(u.name, content(u), {"n": 1})
    return out.work


def test_shards_hold_what_was_written(wanted: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "wanted"
    names = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    assert {*names, "config.json", "tokenizer.json", "model.safetensors.index.json"} < wanted.keys()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(u.num_bytes for u in UNITS), "total_parameters": 1000}
    assert sorted(set(index["weight_map"].values())) == names
    for u in UNITS:
        with safe_open(folder / index["weight_map"][f"{u.name}.weight"], framework="np") as shard:
            assert shard.metadata() == {"format": "mlx"}
            assert shard.get_tensor(f"{u.name}.weight").tobytes() == content(u)[f"{u.name}.weight"]
        assert len({index["weight_map"][t.name] for t in u.tensors}) == 1
    assert check_checkpoint(folder).total_bytes == sum(u.num_bytes for u in UNITS)
    assert not (tmp_path / "wanted.partial").exists() and "evil.py" not in wanted


def test_large_units_have_shards_of_their_own(tmp_path: Path) -> None:
    sizes = [50, 60, 200, 10, 30]
    plans = shards.plan_shards([Unit(str(n), (TensorPlan(str(n), "U8", (n,)),)) for n in sizes], 100)
    assert [[u.num_bytes for u in plan.units] for plan in plans] == [[50], [60], [200], [10, 30]]
    (plan,) = shards.plan_shards([Unit("a", (TensorPlan("a", "F32", (2, 3)),))])
    assert (plan.name, plan.num_bytes) == ("model.safetensors", len(plan.header) + 24)


def test_any_order_gives_the_same_bytes(wanted: dict[str, str], texts: Path, tmp_path: Path) -> None:
    with begin(tmp_path / "dst") as out:
        for u in reversed(UNITS):
            assert u.name not in out
            out.write(u.name, content(u, seed=5))
        for u in UNITS[::2] + UNITS[1::2]:
            out.write(u.name, content(u), {"n": 1})
            assert out.read(u.name)[f"{u.name}.weight"].shape == u.tensors[0].shape
        out.finish(CONFIG, texts, {"notes": out.notes})
    assert hashes(tmp_path / "dst") == wanted


def test_manifest_is_right_and_known(texts: Path, tmp_path: Path) -> None:
    cache, dst = tmp_path / "cache", tmp_path / "dst"
    with begin(dst) as out:
        for u in UNITS:
            out.write(u.name, content(u))
        out.finish(CONFIG, texts, {"effort": "plain"}, {"report.html": b"<html>"}, cache)
    listed = json.loads((dst / "quantization_manifest.json").read_text())
    assert listed["effort"] == "plain" and (dst / "report.html").read_bytes() == b"<html>"
    assert {f["name"]: f["sha256"] for f in listed["files"]} == {
        n: h for n, h in hashes(dst).items() if n not in ("quantization_manifest.json", "report.html")
    }

    def nothing_is_read(done: int, total: int) -> None:
        raise AssertionError("the checkpoint was read again")

    verify(dst, cache, nothing_is_read)
    assert make_manifest(dst, cache, nothing_is_read) == make_manifest(dst, tmp_path / "other")


def test_a_run_goes_on_where_the_last_ended(wanted: dict[str, str], texts: Path, tmp_path: Path) -> None:
    work = write_some(tmp_path / "dst", 5)
    assert sorted(path.name for path in (work / "checkpoint").iterdir()) == [
        f"model-{n:05}-of-00003.safetensors.part" for n in (1, 2, 3)
    ]
    with begin(tmp_path / "dst") as out:
        assert [u.name in out for u in UNITS] == [True] * 5 + [False] * 3
        assert out.notes == {u.name: {"n": 1} for u in UNITS[:5]}
        assert out.read("model.layers.4")["model.layers.4.scales"].dtype == np.uint16
        (out.state / "mine").write_text("x")
    assert complete(tmp_path / "dst", texts) == wanted
    assert not work.exists()


def test_nothing_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "dst"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", [0, 2, 4])
def test_damaged_bytes_are_found(which: int, wanted: dict[str, str], texts: Path, tmp_path: Path) -> None:
    work = write_some(tmp_path / "dst", 5)
    files = sorted((work / "checkpoint").iterdir())
    plan = shards.plan_shards(UNITS, SMALL_SHARD)[which // 3]
    begin_at, end = plan.spans[UNITS[which].name]
    with files[which // 3].open("r+b") as file:
        file.seek((begin_at + end) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with begin(tmp_path / "dst") as out:
        assert [u.name in out for u in UNITS[:5]] == [n != which for n in range(5)]
    assert complete(tmp_path / "dst", texts) == wanted


def test_lost_shard_is_written_again(wanted: dict[str, str], texts: Path, tmp_path: Path) -> None:
    work = write_some(tmp_path / "dst", 8)
    next((work / "checkpoint").glob("model-00002*")).unlink()
    os.truncate(next((work / "checkpoint").glob("model-00001*")), 100)
    with begin(tmp_path / "dst") as out:
        assert [u.name in out for u in UNITS] == [False] * 5 + [True] * 3
    assert complete(tmp_path / "dst", texts) == wanted


@pytest.mark.parametrize("stop_in", ["_put", "sync_data"])
def test_unit_that_is_written_again_is_old_or_new(
    stop_in: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_some(tmp_path / "dst", 8)
    put, (name, *_) = shards.ShardFile._put, [t.name for t in UNITS[4].tensors]

    def torn(self: shards.ShardFile, at: int, data: Any) -> None:
        put(self, at, memoryview(data)[:50])
        raise KeyboardInterrupt

    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "dst") as out:
        monkeypatch.setattr(
            *{"_put": (shards.ShardFile, "_put", torn)}.get(stop_in, (output, stop_in, interrupt))
        )
        out.write("model.layers.4", content(UNITS[4], seed=1), {"n": 2})
    monkeypatch.undo()
    assert (out.work / "redo").stat().st_size > UNITS[4].num_bytes
    if stop_in == "sync_data":  # what was not waited for may be lost with the power
        os.truncate(out.work / "redo", 100)
    seed = int(stop_in == "_put")
    for _ in range(2):
        with begin(tmp_path / "dst") as out:
            assert len(out.notes) == 8 and out.notes["model.layers.4"] == {"n": 1 + seed}
            assert out.read("model.layers.4")[name].tobytes() == content(UNITS[4], seed)[name]


def test_torn_journal(wanted: dict[str, str], texts: Path, tmp_path: Path) -> None:
    journal = write_some(tmp_path / "dst", 3) / "journal"
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    first = len(lines[0])
    for text in (
        *(whole[:cut] for cut in range(first, len(whole), 23)),
        whole + b'{"unit": "model.layers.7", "crc32": 0, "note": {}}\n' + b"\0" * 100,
        lines[0] + b'[]\n{"unit": 3}\n{"unit": "none", "crc32": 1, "note": {}}\n\xff\n' + b"".join(lines[1:]),
    ):
        journal.write_bytes(text)
        with begin(tmp_path / "dst") as out:
            assert set(out.notes) <= {u.name for u in UNITS[:3]}
            journal.write_bytes(journal.read_bytes())  # keep the folder: it is deleted when nothing is in it
            out.write("model.layers.0", content(UNITS[0]), {"n": 1})
    assert complete(tmp_path / "dst", texts) == wanted
    write_some(tmp_path / "new", 1)
    (tmp_path / "new.partial" / "journal").write_bytes(b"\0" * 50 + b"\n")
    with (
        pytest.raises(ConfigError, match=r"its journal is damaged. Delete that folder"),
        begin(tmp_path / "new"),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"settings": {"experts_bits": 3, "trunk": [4, 16]}},
            r"with settings.experts_bits 2, this run has 3",
        ),
        ({"source": "abd"}, r'with source "abc", this run has "abd"'),
        ({"seed": 1}, r"with seed null, this run has 1"),
    ],
)
def test_other_settings_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_some(tmp_path / "dst", 5)
    with pytest.raises(ConfigError, match=message) as caught, begin(tmp_path / "dst", FINGERPRINT | change):
        pass
    assert "delete that folder to start anew" in str(caught.value)
    with (
        pytest.raises(ConfigError, match="begun with plan of tensors"),
        begin(tmp_path / "dst", units=UNITS[1:]),
    ):
        pass
    with begin(tmp_path / "dst") as out:
        assert len(out.notes) == 5


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with begin(tmp_path / "dst") as out:
        with (
            pytest.raises(ConfigError, match=f"process {os.getpid()} is writing it"),
            begin(tmp_path / "dst"),
        ):
            pass
        out.write("model.layers.0", content(UNITS[0]))
    with begin(tmp_path / "dst") as out:
        assert "model.layers.0" in out


def test_destinations_that_are_refused(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"), begin(tmp_path / "dst"):
        pass
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="holds 'precious' and no journal"), begin(tmp_path / "other"):
        pass
    with pytest.raises(ConfigError, match="cannot be written"), begin(tmp_path / "dst" / "precious" / "dst"):
        pass
    with pytest.raises(ConfigError, match=r"no longer free .* is whole"), begin(tmp_path / "late") as out:
        for u in UNITS:
            out.write(u.name, content(u))
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "precious").write_text("x")
        out.finish(CONFIG, texts, {})
    assert (tmp_path / "late" / "precious").exists()


def test_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(u.num_bytes for u in UNITS)
    write_some(tmp_path / "dst", 5)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: type("Usage", (), {"free": needed * 0.6})())
    with pytest.raises(ConfigError, match=r"needs .* more, the disk has"), begin(tmp_path / "deep" / "dst"):
        pass
    assert not (tmp_path / "deep").exists()
    with begin(tmp_path / "dst") as out:  # what is written already needs no space
        assert len(out.notes) == 5


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "write"])
def test_full_disk(
    code: int, call: str, wanted: dict[str, str], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_some(tmp_path / "dst", 3)

    def full(*arguments: Any) -> int:
        raise OSError(code, os.strerror(code))

    with pytest.raises(ConfigError, match=r"the disk is full: .* [34] of 8 units are done") as caught:  # noqa: SIM117
        with begin(tmp_path / "dst") as out:
            monkeypatch.setattr(os, call, full)
            out.write("model.layers.5", content(UNITS[5]))
            out.sync()
    assert "give the same command again" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    assert complete(tmp_path / "dst", texts) == wanted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_is_really_full(
    small_disk: Path, wanted: dict[str, str], texts: Path, tmp_path: Path
) -> None:
    with (
        pytest.raises(ConfigError, match=r"the disk is full: .* MB more are needed"),
        begin(small_disk / "a") as out,
    ):
        out.write("model.layers.0", content(UNITS[0]), {"n": 1})
        out.sync()
        (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
        complete_rest(out)
    with pytest.raises(ConfigError, match="MB more, the disk has"), begin(small_disk / "a"):
        pass
    (small_disk / "filler").unlink()
    assert complete(small_disk / "a", texts) == wanted


def complete_rest(out: Output) -> None:
    for u in UNITS:
        out.write(u.name, content(u), {"n": 1})


def test_interrupted_while_finishing(
    wanted: dict[str, str], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every sync, of which there is one before each step that matters."""
    for stop_at in range(1, 100):
        calls = iter(range(1, 1000))

        def sync(path: Path, stop_at: int = stop_at, calls: Iterator[int] = calls) -> None:
            if next(calls) == stop_at:
                raise KeyboardInterrupt

        write_some(tmp_path / "dst", 8)
        with begin(tmp_path / "dst") as out:
            monkeypatch.setattr(output, "sync_path", sync)
            try:
                out.finish(CONFIG, texts, {"notes": out.notes})
            except KeyboardInterrupt:
                if not (out.dst.exists() or (out.work / "checkpoint" / "config.json").exists()):
                    with pytest.raises(CheckpointError):
                        check_checkpoint(out.work / "checkpoint")
        monkeypatch.undo()
        if out.dst.exists():
            break
        assert complete(tmp_path / "dst", texts) == wanted
        shutil.rmtree(tmp_path / "dst")
    assert stop_at > 8
    assert hashes(tmp_path / "dst") == wanted
    with pytest.raises(ConfigError, match="exists and is not an empty folder"), begin(tmp_path / "dst"):
        pass
    assert not (tmp_path / "dst.partial").exists()


def test_finished_shards_become_unloadable_first(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed with everything in place is taken up again: config.json goes before a shard does."""
    write_some(tmp_path / "dst", 8)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "dst") as out:
        sync = output.sync_path
        monkeypatch.setattr(
            output, "sync_path", lambda p: interrupt() if (p / "config.json").exists() else sync(p)
        )
        out.finish(CONFIG, texts, {})
    assert check_checkpoint(out.work / "checkpoint")  # whole, but for the name
    monkeypatch.setattr(output, "sync_path", sync)
    monkeypatch.setattr(shards.ShardFile, "open", interrupt)
    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "dst"):
        pass
    assert not (out.work / "checkpoint" / "config.json").exists()


@pytest.mark.parametrize(
    "name", ["../../x", "a\nb", "/etc/passwd", "", "\0", "ü\u2028", "a" * 5000, '"}', "."]
)
def test_hostile_names_are_only_names(name: str, texts: Path, tmp_path: Path) -> None:
    units = [
        Unit(name, (TensorPlan(name or "empty", "F16", (3,)),)),
        Unit("b", (TensorPlan("b", "U8", (0,)),)),
    ]
    for _ in range(2):
        with begin(tmp_path / "dst", units=units) as out:
            if name not in out:
                out.write(name, {name or "empty": np.ones(3, np.float16)})
            out.write("b", {"b": b""})
    with begin(tmp_path / "dst", units=units) as out:
        assert out.read(name)[name or "empty"].tolist() == [1, 1, 1]
        out.finish(CONFIG, texts, {})
    with safe_open(tmp_path / "dst" / "model.safetensors", framework="np") as shard:
        assert shard.get_tensor(name or "empty").tolist() == [1, 1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "texts"]


def test_plans_and_writes_that_cannot_be(tmp_path: Path) -> None:
    for tensors in (("a", "a"), ("__metadata__",)):
        with pytest.raises(CheckpointError, match="its name is taken"):
            begin(tmp_path, units=[Unit("u", tuple(TensorPlan(n, "U8", (1,)) for n in tensors))])
    with begin(tmp_path / "dst") as out:
        with pytest.raises(ValueError, match="planned 240"):
            out.write("model.layers.0", {**content(UNITS[0]), "model.layers.0.scales": bytes(3)})
        with pytest.raises(ValueError, match="planned others"):
            out.write("model.layers.0", {})
        with pytest.raises(ValueError, match="8 units are not written"):
            out.finish(CONFIG, tmp_path, {})


@pytest.mark.fault
def test_killed_twenty_times(tmp_path: Path) -> None:
    make_texts(tmp_path / "texts")
    began = time.monotonic()
    convert(tmp_path / "wanted", tmp_path / "texts")
    run_s, wanted = time.monotonic() - began, hashes(tmp_path / "wanted")
    assert (
        len(wanted) > 5 and sum(p.stat().st_size for p in (tmp_path / "wanted").iterdir()) > 4 * SHARD_BYTES
    )
    rng, kills, name = random.Random(1), 0, 0
    command = [sys.executable, "-m", "tests.quant.output_jobs", str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as jobs:
        assert jobs.stdin and jobs.stdout
        is_complete = False
        while kills < 20 or not is_complete:
            jobs.stdin.write(f"{name}\n")
            pid = int(jobs.stdout.readline())
            if kills < 20:
                time.sleep(rng.uniform(0, run_s / 4))
                os.kill(pid, signal.SIGKILL)
            code = int(jobs.stdout.readline())
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            if is_complete := (tmp_path / str(name)).exists():  # as a whole, or not at all
                assert hashes(tmp_path / str(name)) == wanted
                name += 1
        jobs.stdin.close()
