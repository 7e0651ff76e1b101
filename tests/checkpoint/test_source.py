"""Where a checkpoint may be, and that it is the same one from everywhere."""

import datetime
import hashlib
import ipaddress
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from expertd.checkpoint import ranges
from expertd.checkpoint import source as source_module
from expertd.checkpoint.inspect import check_checkpoint
from expertd.checkpoint.locate import find_checkpoint
from expertd.checkpoint.manifest import QUANTIZATION_MANIFEST, make_manifest
from expertd.checkpoint.ranges import Limits, check_url
from expertd.checkpoint.remote import RemoteSource
from expertd.checkpoint.source import LocalSource, download_url, open_source
from expertd.cli.options import find_model
from expertd.errors import CheckpointError
from tests.checkpoint.fake_hub import COMMIT, Hub, fake_hub
from tests.checkpoint.range_server import Site, serve
from tests.tiny import make_tiny

QUICK = Limits(connect_s=5, silence_s=1.0, try_s=5, num_tries=2, pause_s=0.01)
SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3_moe")


@pytest.fixture
def site(local: Path) -> Iterator[Site]:
    with serve(Site().take(local)) as site:
        yield site


def assert_same_arrays(folder: Path, local: Path) -> None:
    here, there = mx.load(str(folder / SHARD)), mx.load(str(local / SHARD))
    assert isinstance(here, dict) and isinstance(there, dict) and here.keys() == there.keys()
    assert all(mx.array_equal(here[name], there[name]) for name in here)


def test_a_folder_is_its_own_source(local: Path, tmp_path: Path) -> None:
    for name in (str(local), local.as_uri(), f"file://localhost{local}"):
        source = open_source(name, tmp_path / "cache")
        assert isinstance(source, LocalSource) and not source.is_remote and source.name == name
        assert source.folder == local.resolve()
        assert [sorted(entries) for entries in source.shards.values()] == [
            sorted(mx.load(str(local / SHARD)))
        ]
        source.fetch(["anything"])
        source.release(["anything"])
        source.close()
    assert not (tmp_path / "cache").exists()


def test_demo_is_a_source(tmp_path: Path) -> None:
    try:
        demo = find_checkpoint("demo")
    except CheckpointError:
        pytest.skip("this installation has no demo model")
    assert open_source("demo", tmp_path).folder == demo


def test_identity_follows_the_content(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "m", "qwen3_moe")
    first = LocalSource("m", folder).identity
    assert LocalSource("m", folder).identity == first
    for name in ("config.json", SHARD):
        os.utime(folder / name, ns=(1, 1))
        assert LocalSource("m", folder).identity != first
        first = LocalSource("m", folder).identity


def test_a_url_gives_the_same_arrays(site: Site, local: Path, tmp_path: Path) -> None:
    source = open_source(site.url.rstrip("/"), tmp_path, limits=QUICK)
    assert isinstance(source, RemoteSource)
    with source:
        assert source.is_remote
        assert source.shards == LocalSource("", local).shards
        found = check_checkpoint(source.folder)
        assert (found.family, found.total_bytes) == (
            check_checkpoint(local).family,
            check_checkpoint(local).total_bytes,
        )
        lazy = mx.load(str(source.folder / SHARD))
        source.fetch(lazy)
        assert_same_arrays(source.folder, local)
    assert not any("token" in text.lower() for text in os.listdir(tmp_path))


# A client that hangs up while the test's server takes the call makes Python's ssl leak the server's socket.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_https_wants_a_certificate_that_is_trusted(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "here")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now - day, now + day, [
            x509.Extension(address.oid, False, address),
        ],
    ).sign(key, hashes.SHA256())  # fmt: skip
    pem = certificate.public_bytes(Encoding.PEM)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "both.pem").write_bytes(pem + secret)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "both.pem")
    one = Limits(num_connections=1, num_tries=2, pause_s=0.01)
    with serve(Site().take(local), server) as site:
        with pytest.raises(CheckpointError, match="CERTIFICATE_VERIFY_FAILED"):
            open_source(site.url, tmp_path, limits=one)
        trusting = ssl.create_default_context(cadata=pem.decode())
        monkeypatch.setattr(ranges, "_tls", lambda: trusting)
        source = open_source(site.url, tmp_path, limits=one)
        source.fetch(source.shards[SHARD])
        assert_same_arrays(source.folder, local)
        # An answer in plain http would undo it.
        site.fault = lambda name, n: "redirect"
        site.elsewhere = "http://127.0.0.1/"
        source.close()
        with pytest.raises(CheckpointError, match="redirected to http"):
            open_source(site.url, tmp_path, limits=one)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.com/model", "plain http"),
        ("http://10.0.0.1/model", "plain http"),
        ("http://127.0.0.1.evil.com/model", "plain http"),
        ("https://user:secret@example.com/model", "password"),
        ("https://example.com/model?token=secret", "password"),
        ("https://example.com/model#x", "fragment"),
        ("ftp://example.com/model", "not a URL to read from"),
        ("https:///model", "not a URL"),
        ("https://[::1/model", "not a URL"),
        ("https://example.com/m/config.json", "names a file"),
        ("file://elsewhere/model", "not a folder on this machine"),
        ("file:relative", "not a folder on this machine"),
        ("file:///no/such/folder", "no such folder"),
    ],
)
def test_urls_that_are_refused(url: str, words: str, tmp_path: Path) -> None:
    for go in (
        lambda: open_source(url, tmp_path, limits=QUICK),
        lambda: find_checkpoint(url, tmp_path),
    ):
        with pytest.raises(CheckpointError, match=words) as raised:
            go()
        assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


def test_urls_are_brought_into_one_form() -> None:
    assert check_url(" https://Example.com/a b/m ") == "https://example.com/a%20b/m/"
    assert check_url("http://[::1]:8000/m/") == "http://[::1]:8000/m/"
    assert check_url("http://localhost") == "http://localhost/"


# A hub id. huggingface_hub reads its environment when it is imported, hence a process of its own.
ASK = """
import json, sys
from pathlib import Path
from expertd.checkpoint.source import open_source
from expertd.checkpoint.locate import find_checkpoint
from expertd.errors import CheckpointError
answers = []
for name in sys.argv[2:]:
    try:
        if name.startswith("download "):
            answers.append(str(find_checkpoint(name.split()[1])))
            continue
        source = open_source(name, Path(sys.argv[1]))
        source.fetch(["model.norm.weight"])
        answers.append([source.is_remote, str(source.folder), source.identity])
        source.close()
    except CheckpointError as error:
        answers.append("error: " + str(error))
print(json.dumps(answers))
"""


def ask(endpoint: str, home: Path, *names: str) -> list[str]:
    environment = {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*",
        "HF_TOKEN": "hf_secret",
    }  # fmt: skip
    command = [sys.executable, "-c", ASK, str(home / "cache"), *names]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_a_hub_id_is_read_by_range_unless_it_is_here(local: Path, tmp_path: Path) -> None:
    with fake_hub({"org/good": local}) as hub:
        (remote, at_commit, missing, wrong) = ask(
            hub, tmp_path, "org/good", f"org/good@{COMMIT}", "org/missing", "org/good@../x"
        )
        assert remote[0] and at_commit[0] and remote[2] == at_commit[2]
        shards = [(span, token) for name, span, token in Hub.ranges if name == SHARD]
        assert shards[0] == ("bytes=0-131071", "Bearer hf_secret") and all(span for span, _ in shards)
        assert "no such folder or public hub repository" in missing
        assert "not a hub id" in wrong
        names = {path.name for path in Path(remote[1]).iterdir()}
        assert {"config.json", SHARD, "tokenizer.json", "chat_template.jinja"} <= names
        # Downloaded for serving once, it is not read from the hub again.
        _, here = ask(hub, tmp_path, "download org/good", "org/good")
        assert not here[0] and here[1].endswith(COMMIT)


# Serving what is behind a URL.


def test_find_model_downloads_a_url_once(
    site: Site, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = find_model(site.url)
    assert found.folder.parent == tmp_path / "expertd" / "checkpoints-from-urls"
    assert_same_arrays(found.folder, local)
    assert {p.name for p in found.folder.iterdir()} == {p.name for p in local.iterdir()}
    assert not list(found.folder.parent.glob("*.part"))
    site.requests.clear()
    assert find_model(site.url).folder == found.folder
    assert [span for name, span in site.requests if name == SHARD] == ["bytes=0-131071"]


def test_a_download_goes_on(site: Site, local: Path, tmp_path: Path) -> None:
    site.files[SHARD] += bytes(20 << 20)  # trailing bytes, for several parts
    site.fault = lambda name, n: "503" if name == SHARD and n > 3 else ""
    with pytest.raises(CheckpointError, match=r"answered 503.*what came is kept"):
        download_url(site.url, tmp_path, limits=Limits(num_connections=1, num_tries=2, pause_s=0.01))
    site.fault = lambda name, n: ""
    before = site.num_bytes()
    said: list[tuple[str, int, int]] = []
    folder = download_url(site.url, tmp_path, lambda *report: said.append(report), QUICK)
    assert (folder / SHARD).read_bytes() == site.files[SHARD]
    assert site.num_bytes() - before < len(site.files[SHARD]) - (7 << 20)
    assert said[-1] == ("downloading", len(site.files[SHARD]), len(site.files[SHARD]))
    assert said[0][1] >= 8 << 20


def test_an_old_download_is_used_when_nobody_answers(site: Site, local: Path, tmp_path: Path) -> None:
    folder = download_url(site.url, tmp_path, limits=QUICK)
    site.fault = lambda name, n: "503"
    assert download_url(site.url, tmp_path, limits=QUICK) == folder
    site.fault = lambda name, n: ""
    site.etag = '"newer"'
    assert download_url(site.url, tmp_path, limits=QUICK) != folder
    site.files.clear()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        download_url(site.url, tmp_path, limits=QUICK)


def test_a_download_is_compared_with_its_manifest(site: Site, local: Path, tmp_path: Path) -> None:
    site.files["notes.txt"] = notes = b"listed, therefore fetched"
    listed = [vars(file) for file in make_manifest(local, tmp_path / "hashes").files]
    listed.append({"name": "notes.txt", "size": len(notes), "sha256": hashlib.sha256(notes).hexdigest()})
    site.files[QUANTIZATION_MANIFEST] = json.dumps({"files": listed}).encode()
    for name in (SHARD, "notes.txt"):
        good = site.files[name]
        site.files[name] = good[:-1] + bytes([good[-1] ^ 1])
        with pytest.raises(CheckpointError, match=rf"{name} is not what its manifest promises \(1 of"):
            download_url(site.url, tmp_path, limits=QUICK)
        assert not list((tmp_path / "checkpoints-from-urls").glob("*-*"))
        site.files[name] = good
    folder = download_url(site.url, tmp_path, limits=QUICK)
    assert_same_arrays(folder, local)
    assert (folder / "notes.txt").read_bytes() == notes


def test_one_download_at_a_time(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(source: RemoteSource, report: source_module.Report) -> None:
        with pytest.raises(CheckpointError, match="in use by another expertd"):
            download_url(site.url, tmp_path, limits=QUICK)

    monkeypatch.setattr(source_module, "_verify", again)
    download_url(site.url, tmp_path, limits=QUICK)
