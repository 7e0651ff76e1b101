"""Take out of a report what says who and where: for text that is shown to strangers.

Each address, identity and name becomes a word such as <address 1>, the same one everywhere, so that a reader still
sees which port is joined to which.
"""

import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_TOKEN = re.compile(r"[0-9A-Fa-f:.]*[0-9A-Fa-f:][0-9A-Fa-f:.]*(?:-[0-9A-Fa-f]+){0,4}")
_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_MAC = re.compile(r"[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}")
NAMES = ("name", "peer_name", "host_id")  # keys of a Host and of its ports


def redact(value: dict[str, Any], secrets: Iterable[str] = ()) -> dict[str, Any]:
    """Give a copy of a doctor's report (report_json) without addresses, identities and names of hosts.

    `secrets` are more words to take out. Addresses of the loopback stay: they say nothing.
    """
    host = value.get("host") or {}
    names = {host.get("name"), host.get("host_id"), os.uname().nodename, *secrets}
    names |= {port.get("peer_name") for port in host.get("thunderbolt", ())}
    return dict(_Redactor(sorted({n for n in names if n}, key=len, reverse=True)).value(value))


class _Redactor:
    def __init__(self, names: list[str]) -> None:
        self._names, self._seen = names, dict[str, str]()

    def value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.value(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(v) for v in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> str:
        text = text.replace(str(Path.home()), "~")
        for name in self._names:
            # A whole word: a host called "mini" must not change "minimal".
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", lambda m: self._word("host", m[0]), text)
        return _TOKEN.sub(lambda m: self._token(m[0]), text)

    def _token(self, token: str) -> str:
        bare = token.rstrip(".:")
        kind = (
            "identity"
            if _UUID.fullmatch(bare)
            else "address"
            if _MAC.fullmatch(bare) or _is_address(bare)
            else ""
        )
        return self._word(kind, bare) + token[len(bare) :] if kind else token

    def _word(self, kind: str, text: str) -> str:
        number = 1 + sum(word.startswith(f"<{kind} ") for word in self._seen.values())
        return self._seen.setdefault(text.lower(), f"<{kind} {number}>")


def _is_address(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False
