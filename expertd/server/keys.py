"""API keys: made here, kept as digests, compared in constant time.

A key is 32 random bytes, so its SHA-256 is as hard to turn back as the key is to guess: a slow hash such as scrypt
guards passwords that people choose, and would cost every request 50 ms of a core. Short keys are refused.
"""

import hashlib
import hmac
import secrets
from pathlib import Path

from expertd.errors import ConfigError

PREFIX = "sha256:"
# 16 random letters and digits have 95 bits.
MIN_LENGTH = 16

# (name, digest as hex)
Key = tuple[str, str]


def new_key() -> str:
    return f"xd-{secrets.token_urlsafe(32)}"


def digest_of(key: str) -> str:
    """The SHA-256 of a key, as hex."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file: a line each, `sha256:DIGEST NAME`; # begins a comment. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--api-keys {path}: cannot be read: {e}. Make one with `expertd key`.") from e
    lines = [(i, line.partition("#")[0].split()) for i, line in enumerate(text.splitlines(), 1)]
    found = tuple(_parse_line(path, i, words) for i, words in lines if words)
    if not found:
        raise ConfigError(f"--api-keys {path}: it has no key. Add the line that `expertd key` prints.")
    return found


def _parse_line(path: Path, number: int, words: list[str]) -> Key:
    digest = words[0].removeprefix(PREFIX).lower()
    if not words[0].startswith(PREFIX) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        # Not shown: it may be a key.
        raise ConfigError(
            f"--api-keys {path}: line {number} is no {PREFIX}DIGEST. Keys are not written there: "
            "use the line that `expertd key` prints."
        )
    return " ".join(words[1:]) or f"line {number}", digest


def keys_in(text: str) -> tuple[Key, ...]:
    """The keys in EXPERTD_API_KEYS, themselves, with commas between them. Raises ConfigError."""
    keys = [key.strip() for key in text.split(",") if key.strip()]
    for i, key in enumerate(keys, 1):
        if len(key) < MIN_LENGTH:
            raise ConfigError(
                f"EXPERTD_API_KEYS: key {i} has {len(key)} characters, wanted {MIN_LENGTH} or more. "
                "Make one with `expertd key`."
            )
    return tuple((f"key {i}", digest_of(key)) for i, key in enumerate(keys, 1))


def find_key(keys: tuple[Key, ...], presented: str) -> str | None:
    """The name of the key that was presented, None if it is none of them; every one is compared, and whole."""
    digest, found = digest_of(presented), None
    for name, known in keys:
        if hmac.compare_digest(digest, known):
            found = name
    return found
