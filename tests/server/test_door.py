"""Who may come in, what is written down of it, and over which kind of connection."""

import json
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from expertd.cli import cli
from expertd.cli.door import door_config, warn_if_public
from expertd.cluster.supervisor import Cluster
from expertd.config import DoorConfig, ServerConfig
from expertd.errors import ConfigError
from expertd.server import keys
from expertd.server.serve import take_port
from tests.server.test_app import CHAT, TEXT, with_app
from tests.server.test_serve import with_server

KEYS = tuple((name, keys.digest_of(name * 4)) for name in ("alice-", "bob-"))
LOCKED = DoorConfig(keys=KEYS)


def test_only_who_has_a_key_comes_in(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        for headers in ({"authorization": f"Bearer {'alice-' * 4}"}, {"x-api-key": "bob-" * 4}):
            assert (await client.post("/v1/completions", json=TEXT, headers=headers)).status_code == 200
            assert (await client.get("/health", headers=headers)).json()["ranks"] == 1
        wrong = [
            {},
            {"authorization": "Bearer "},
            {"authorization": f"Basic {'bob-' * 4}"},
            {"x-api-key": "bob-" * 3},
        ]
        for headers in [*wrong, {"authorization": f"Bearer {KEYS[0][1]}"}, {"x-api-key": "\u00e4".encode()}]:
            for method, path in (("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/nope")):
                response = await client.request(method, path, headers=headers)  # type: ignore[arg-type]
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
            refused = await client.post("/v1/messages", headers=headers)  # type: ignore[arg-type]
            assert refused.json()["error"]["type"] == "authentication_error"
            assert (await client.get("/health", headers=headers)).json() == {"status": "ok"}  # type: ignore[arg-type]

    with_app(tmp_path, test, door=LOCKED)


def test_the_official_clients_send_their_keys(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        for key in ("alice-" * 4, "no"):
            async with (
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as first,
                anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as second,
            ):
                asked = {"model": "demo", "messages": CHAT["messages"], "max_tokens": 1}
                if key != "no":
                    assert (await first.chat.completions.create(**asked)).choices  # type: ignore[call-overload]
                    assert (await second.messages.create(**asked)).content  # type: ignore[call-overload]
                    continue
                with pytest.raises(openai.AuthenticationError):
                    await first.chat.completions.create(**asked)  # type: ignore[call-overload]
                with pytest.raises(anthropic.AuthenticationError):
                    await second.messages.create(**asked)  # type: ignore[call-overload]

    with_server(tmp_path, test, door=LOCKED)


@pytest.mark.parametrize("prompts", [False, True])
def test_the_log_has_a_line_for_each_request(
    prompts: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test(client: httpx.AsyncClient, cluster: Cluster) -> None:
        headers = {"x-api-key": "bob-" * 4, "x-request-id": "mine-1"}
        response = await client.post("/v1/completions", json=TEXT, headers=headers)
        assert response.headers["x-request-id"] == "mine-1"
        refused = await client.post("/v1/completions", json=TEXT, headers={"x-request-id": "a b"})
        assert refused.headers["x-request-id"].startswith("req_")

    with_app(tmp_path, test, door=DoorConfig(keys=KEYS, log_json=True, log_prompts=prompts))
    first, second = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (first["request_id"], first["key"], first["status"]) == ("mine-1", "bob-", 200)
    assert (first["method"], first["path"], second["status"], second["key"]) == (
        "POST",
        "/v1/completions",
        401,
        None,
    )
    assert ("one two three" in str(first)) == prompts
    assert "bob-bob-" not in str(first)


def test_pages_of_other_origins_may_ask_only_if_told(tmp_path: Path) -> None:
    origin = {"origin": "https://a.example"}
    preflight = {**origin, "access-control-request-method": "POST"}

    async def closed(client: httpx.AsyncClient, cluster: Cluster) -> None:
        response = await client.get("/v1/models", headers=origin)
        assert not [name for name in response.headers if name.startswith("access-control-")]
        assert (await client.options("/v1/models", headers=preflight)).status_code == 405

    async def opened(client: httpx.AsyncClient, cluster: Cluster) -> None:
        assert (await client.options("/v1/models", headers=preflight)).status_code == 200
        response = await client.get("/v1/models", headers={**origin, "x-api-key": "bob-" * 4})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        other = await client.options("/v1/models", headers={**preflight, "origin": "https://b.example"})
        assert other.status_code == 400

    with_app(tmp_path, closed)
    with_app(tmp_path, opened, door=DoorConfig(keys=KEYS, cors_origins=("https://a.example",)))


def certificate(folder: Path) -> tuple[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    files[1].write_bytes(secret)
    return str(files[0]), str(files[1])


def test_https(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)

    async def test(url: str) -> None:
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=cert)
        async with httpx.AsyncClient(
            verify=context, base_url=url.replace("127.0.0.1", "localhost")
        ) as client:
            asked = {**TEXT, "stream": True}
            assert (await client.post("/v1/completions", json=asked)).text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.HTTPError):
            async with httpx.AsyncClient() as client:
                await client.get(url.replace("https", "http") + "/health")

    with_server(tmp_path, test, door=DoorConfig(tls_cert=cert, tls_key=key))


def test_wrong_certificates_are_one_line(tmp_path: Path) -> None:
    cert, _ = certificate(tmp_path)
    for tls_key in (cert, str(tmp_path / "none")):
        with pytest.raises(ConfigError, match=r"^--tls-cert .* not a PEM certificate and its key"):
            take_port(ServerConfig(port=0, door=DoorConfig(tls_cert=cert, tls_key=tls_key)))
    with pytest.raises(ConfigError, match="need each other"):
        DoorConfig(tls_cert=cert)
    with pytest.raises(ConfigError, match="needs --log-json"):
        DoorConfig(log_prompts=True)


def test_a_key_is_made_kept_as_a_digest_and_known_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = CliRunner().invoke(cli, ["key", "my laptop"]).output.splitlines()
    key, line = (text.partition(": ")[2] for text in printed)
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{line}\nsha256:{'0' * 64}\n")
    monkeypatch.setenv("EXPERTD_API_KEYS", "a-key-of-some-length, another-key-of-it")
    door = door_config(file, None, None, (), False, False)
    assert [name for name, _ in door.keys] == ["my laptop", "line 4", "key 1", "key 2"]
    assert keys.find_key(door.keys, key) == "my laptop"
    assert keys.find_key(door.keys, "another-key-of-it") == "key 2"
    assert keys.find_key(door.keys, key + "x") is None
    assert key not in str(door)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("xd-a-key-itself\n", r"line 1 is no sha256:DIGEST"),
        ("sha256:12\n", r"line 1 is no sha256:DIGEST"),
        ("# nothing\n", "it has no key"),
    ],
)
def test_wrong_key_files_are_one_line_without_the_key(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        keys.read_keys(file)
    assert "xd-a-key" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        keys.read_keys(tmp_path / "none")
    with pytest.raises(ConfigError, match="key 2 has 5 characters"):
        keys.keys_in("a-key-of-some-length,short")


def test_an_open_address_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for host, door, words in (
        ("127.0.0.1", DoorConfig(), ""),
        ("0.0.0.0", DoorConfig(), "there are no keys"),
        ("0.0.0.0", LOCKED, "cross the network as they are"),
        ("::", DoorConfig(keys=KEYS, tls_cert="c", tls_key="k"), ""),
    ):
        warn_if_public(host, door)
        err = capsys.readouterr().err
        assert words in err and bool(err) == bool(words)
