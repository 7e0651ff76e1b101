"""This machine's key, and the list of paired hosts: what is on disk, who may read it, what damage does."""

import json
import re
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.cluster import identity
from expertd.cluster.identity import Identity, Peer, PeerStore, clean_name, load_identity, make_peer
from expertd.errors import ConfigError


def make_host(folder: Path, name: str) -> tuple[Identity, Peer]:
    """A machine, and its entry in another one's list."""
    own = load_identity(folder / name, name)
    return own, make_peer(own.name, own.certificate, "10.0.0.9")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_identity_is_made_once_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "config" / "expertd"
    first = load_identity(folder, "studio")
    again = load_identity(folder, "studio")
    assert first == again and first.host_id == first.fingerprint[:16]
    assert re.fullmatch("[0-9a-f]{64}", first.fingerprint)
    assert mode_of(folder) == 0o700 and mode_of(first.path) == 0o600
    assert load_identity(tmp_path / "other", "studio").host_id != first.host_id


def test_identity_made_by_two_at_once_is_one(tmp_path: Path) -> None:
    found: list[Identity] = []
    threads = [threading.Thread(target=lambda: found.append(load_identity(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 4 and len({i.fingerprint for i in found}) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = load_identity(tmp_path).path
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:o}, wanted 600.*chmod 600"):
        load_identity(tmp_path)


def test_damaged_key_says_what_to_do(tmp_path: Path) -> None:
    path = load_identity(tmp_path).path
    whole = path.read_bytes()
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2], whole[120:]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"not a key with its certificate\. Remove it \(rm "):
            load_identity(tmp_path)


def test_key_and_certificate_of_two_machines_are_refused(tmp_path: Path) -> None:
    mine, other = load_identity(tmp_path / "a").path, load_identity(tmp_path / "b").path
    border = b"-----BEGIN CERTIFICATE"
    mine.write_bytes(mine.read_bytes().split(border)[0] + border + other.read_bytes().split(border)[1])
    with pytest.raises(ConfigError, match="not a key with its certificate"):
        load_identity(tmp_path / "a")


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot keep this machine's identity there"):
        load_identity(tmp_path / "file" / "expertd")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Anna's-Mac-Studio.local", "Anna-s-Mac-Studio"),
        ("\x1b[31mred\x07", "31mred"),
        ("a b\nc", "a-b-c"),
        ("", "host"),
        ("…", "host"),
        ("x" * 200, "x" * 48),
    ],
)
def test_names_are_fit_for_a_terminal(text: str, name: str) -> None:
    assert clean_name(text) == name


def test_peers_are_added_listed_and_removed(tmp_path: Path) -> None:
    store, reader = PeerStore(tmp_path / "me"), PeerStore(tmp_path / "me")
    assert store.peers() == []
    (_, b), (_, a) = make_host(tmp_path, "b"), make_host(tmp_path, "a")
    assert store.add(b) == b and store.add(a) == a
    assert store.peers() == reader.peers() == [a, b]
    assert mode_of(tmp_path / "me" / "peers.json") == 0o600
    assert store.find("a") == store.find(a.host_id) == a
    assert reader.remove("a") == a and store.peers() == [b]
    store.note_address(b.host_id, "10.0.0.10")
    assert reader.peers() == [replace(b, address="10.0.0.10")]
    with pytest.raises(ConfigError, match=r"a: no paired host has this name or id \(paired: b\)"):
        store.remove("a")


def test_second_host_of_a_name_gets_a_number_and_the_first_keeps_its_own(tmp_path: Path) -> None:
    store = PeerStore(tmp_path / "me")
    peers = [make_host(tmp_path / str(n), "studio")[1] for n in range(3)]
    assert [store.add(p).name for p in peers] == ["studio", "studio-2", "studio-3"]
    assert store.add(replace(peers[0], address="10.0.0.11")).name == "studio"  # paired again
    assert len(store.peers()) == 3


def test_match_wants_the_very_certificate(tmp_path: Path) -> None:
    store = PeerStore(tmp_path / "me")
    (a, entry), (b, _) = make_host(tmp_path, "a"), make_host(tmp_path, "b")
    store.add(entry)
    assert store.match(a.certificate) == entry
    assert store.match(b.certificate) is None and store.match(b"") is None


def test_damaged_list_says_what_to_do(tmp_path: Path) -> None:
    store = PeerStore(tmp_path)
    a, b = (make_host(tmp_path, name)[1] for name in "ab")
    store.add(a)
    path = tmp_path / "peers.json"
    good = json.loads(path.read_bytes())
    swapped = {**good["peers"][0], "certificate": b.certificate}
    for bad in (b"", b"[]", b'{"peers": 3}', b'{"version": 2}', {"peers": [swapped]}, {"peers": [{}]}):
        path.write_bytes(bad if isinstance(bad, bytes) else json.dumps(bad).encode())
        with pytest.raises(ConfigError, match=r"not a list of paired hosts: .* Remove it \(rm "):
            PeerStore(tmp_path).peers()


def test_list_that_others_may_write_is_refused(tmp_path: Path) -> None:
    store = PeerStore(tmp_path)
    store.add(make_host(tmp_path, "a")[1])
    (tmp_path / "peers.json").chmod(0o666)
    with pytest.raises(ConfigError, match="mode 666, wanted 600"):
        store.peers()


def test_lock_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "LOCK_TIMEOUT_S", 0.1)
    with identity._locked(tmp_path), pytest.raises(ConfigError, match=r"has it locked for 0\.1 s"):
        PeerStore(tmp_path).remove("a")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PeerStore(tmp_path)
    a, b = (make_host(tmp_path, name)[1] for name in "ab")
    store.add(a)
    before = sorted(p.name for p in tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr(identity.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk")))
        store.add(b)
    assert store.peers() == [a] and sorted(p.name for p in tmp_path.iterdir()) == before
