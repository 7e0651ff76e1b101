"""Who this machine is, and which machines it knows: a key with its certificate, and the paired hosts.

Both files lie in one folder that the caller names. Nothing here is a certificate authority: a host is trusted because
its certificate, byte for byte, was stored by a pairing. So names, dates and signers in a certificate mean nothing.
"""

import contextlib
import datetime
import fcntl
import hashlib
import hmac
import os
import re
import shlex
import socket
import ssl
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from expertd.errors import ConfigError

IDENTITY_FILE = "identity.pem"
PEERS_FILE = "peers.json"
HOST_ID_DIGITS = 16
MAX_NAME_LENGTH = 48
# Far longer than any change of these files takes; only a process that was stopped in the middle is slower.
LOCK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Identity:
    """This machine: `path` holds the private key and the certificate, `certificate` is the latter's DER."""

    name: str
    certificate: bytes
    path: Path

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.certificate)

    @property
    def host_id(self) -> str:
        return self.fingerprint[:HOST_ID_DIGITS]


@dataclass(frozen=True)
class Peer:
    """A paired host. `certificate` is PEM, `address` where it was last reached, `paired` the day (YYYY-MM-DD)."""

    host_id: str
    name: str
    fingerprint: str
    certificate: str
    address: str
    paired: str


@dataclass(frozen=True)
class _PeersFile:
    version: int = 1
    peers: list[Peer] = field(default_factory=list)


def fingerprint_of(certificate: bytes) -> str:
    """Give the SHA-256 of a certificate's DER as 64 hex digits."""
    return hashlib.sha256(certificate).hexdigest()


def clean_name(text: str) -> str:
    """Make a host's name fit for a terminal, a shell and a file: a stranger may have chosen it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text.removesuffix(".local")).strip("-.")
    return name[:MAX_NAME_LENGTH] or "host"


def load_identity(folder: Path, name: str = "") -> Identity:
    """Give this machine's identity, made on first use. `name` is the hostname if it is empty.

    Raises ConfigError when the file is damaged or others may read it.
    """
    path = folder / IDENTITY_FILE
    if not os.path.exists(path):
        with _locked(folder):
            if not os.path.exists(path):
                _write_private(path, _make_identity())
    try:
        pem = _read_private(path)
        certificate = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
        # The password is there so that OpenSSL never asks for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path, password=b"")
    except (ValueError, ssl.SSLError):
        raise ConfigError(
            f"{path}: not a key with its certificate. Remove it (rm {shlex.quote(str(path))}) and pair every host again."
        ) from None
    return Identity(clean_name(name or socket.gethostname()), certificate, path)


def _make_identity() -> bytes:
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "expertd")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # The pin is the trust: a machine whose clock was reset must not lose its peers. The end is
        # RFC 5280's "no well-defined expiration date" (4.1.2.5).
        .not_valid_before(datetime.datetime(2000, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
        # Not an authority: a paired host cannot vouch for a third one.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    certificate = builder.sign(key, None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(
        Encoding.PEM
    )


def make_peer(name: str, certificate: bytes, address: str) -> Peer:
    """Give the entry of a host that was paired today. Raises ValueError if `certificate` is no X.509 DER."""
    pem = x509.load_der_x509_certificate(certificate).public_bytes(Encoding.PEM).decode()
    fingerprint = fingerprint_of(certificate)
    today = datetime.date.today().isoformat()
    return Peer(fingerprint[:HOST_ID_DIGITS], clean_name(name), fingerprint, pem, address, today)


class PeerStore:
    """The paired hosts, on disk. Another process may change the file at any time; every call sees that."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / PEERS_FILE
        self._seen: tuple[int, ...] = ()
        self._peers: list[Peer] = []

    def peers(self) -> list[Peer]:
        """Give all paired hosts, by name. Raises ConfigError for a file that is not ours or that others may read."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return []
        except OSError as e:
            raise ConfigError(f"{self._path}: {e.strerror}.") from e
        # Every change is a new file, so the inode tells apart even two changes within one tick of the clock.
        seen = (status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode)
        if seen != self._seen:
            self._peers, self._seen = _parse_peers(self._path), seen
        return list(self._peers)

    def match(self, certificate: bytes) -> Peer | None:
        """Give the paired host with exactly this certificate (DER)."""
        found = fingerprint_of(certificate)
        return next((p for p in self.peers() if hmac.compare_digest(p.fingerprint, found)), None)

    def find(self, name: str) -> Peer:
        """Give the host with this name or id. Raises ConfigError that lists the known ones."""
        peers = self.peers()
        for peer in peers:
            if name in (peer.name, peer.host_id):
                return peer
        known = ", ".join(p.name for p in peers) or "none"
        raise ConfigError(
            f"{name}: no paired host has this name or id (paired: {known}). Run `expertd hosts`."
        )

    def add(self, peer: Peer) -> Peer:
        """Store a host, in place of an earlier entry with its id; another host's name gets a number added."""
        with _locked(self._folder):
            others = [p for p in self.peers() if p.host_id != peer.host_id]
            peer = replace(peer, name=_free_name(peer.name, {p.name for p in others}))
            self._write([*others, peer])
        return peer

    def remove(self, name: str) -> Peer:
        """Forget the host with this name or id and give it back. Raises ConfigError if there is none."""
        with _locked(self._folder):
            peer = self.find(name)
            self._write([p for p in self.peers() if p.host_id != peer.host_id])
        return peer

    def note_address(self, host_id: str, address: str) -> None:
        """Remember where a paired host was reached."""
        with _locked(self._folder):
            peers = self.peers()
            changed = [replace(p, address=address) if p.host_id == host_id else p for p in peers]
            if changed != peers:
                self._write(changed)

    def _write(self, peers: list[Peer]) -> None:
        file = _PeersFile(peers=sorted(peers, key=lambda p: (p.name, p.host_id)))
        _write_private(self._path, msgspec.json.format(msgspec.json.encode(file)) + b"\n")


def _free_name(name: str, taken: set[str]) -> str:
    names = (name if n == 1 else f"{name}-{n}" for n in range(1, len(taken) + 2))
    return next(n for n in names if n not in taken)


def _parse_peers(path: Path) -> list[Peer]:
    try:
        file = msgspec.json.decode(_read_private(path), type=_PeersFile)
        if file.version != 1:
            raise ValueError(f"version {file.version}, this expertd knows 1")
        for peer in file.peers:
            fingerprint = fingerprint_of(ssl.PEM_cert_to_DER_cert(peer.certificate))
            if (peer.fingerprint, peer.host_id) != (fingerprint, fingerprint[:HOST_ID_DIGITS]):
                raise ValueError(f"fingerprint of {clean_name(peer.name)} is not its certificate's")
        return file.peers
    except ValueError as e:
        remedy = f"Remove it (rm {shlex.quote(str(path))}) and pair every host again."
        raise ConfigError(f"{path}: not a list of paired hosts: {e}. {remedy}") from None


def _read_private(path: Path) -> bytes:
    """Read a file that only its owner may touch: who can write it decides who is trusted."""
    try:
        mode, data = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}.") from e
    if mode & 0o077:
        raise ConfigError(
            f"{path}: other users may read or change it (mode {mode:03o}, wanted 600). If none did: "
            f"chmod 600 {shlex.quote(str(path))}. If unsure, remove it and pair every host again."
        )
    return data


def _write_private(path: Path, data: bytes) -> None:
    """Put a file there, whole or not at all, with mode 600."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:  # mkstemp has made it with mode 600
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing the folder's files meanwhile; makes the folder if there is none."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise ConfigError(f"{folder}: cannot keep this machine's identity there: {e.strerror}.") from e
    try:
        _take(fd, folder)
        yield
    finally:
        os.close(fd)


def _take(fd: int, folder: Path) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{folder}: another expertd has it locked for {LOCK_TIMEOUT_S:g} s."
                ) from None
            time.sleep(0.02)
