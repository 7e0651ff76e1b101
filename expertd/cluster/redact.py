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

_HEX = "[0-9A-Fa-f]"
_IDENTITY = re.compile(rf"{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}")
_MAC = re.compile(rf"{_HEX}{{2}}(?::{_HEX}{{2}}){{5}}")
_IPV4 = r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\d)"
_IPV6 = rf"{_HEX}{{0,4}}:{_HEX}{{0,4}}:[0-9A-Fa-f:.]*"
_TOKEN = re.compile(rf"{_IDENTITY.pattern}|\b{_MAC.pattern}\b|{_IPV6}|{_IPV4}")


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
        if _IDENTITY.fullmatch(token):
            return self._word("identity", token)
        bare = token if _is_address(token) else token.rstrip(".:")  # a sentence may go on after it
        if not (_MAC.fullmatch(bare) or _is_address(bare)):
            return token
        return self._word("address", bare) + token[len(bare) :]

    def _word(self, kind: str, text: str) -> str:
        number = 1 + sum(word.startswith(f"<{kind} ") for word in self._seen.values())
        return self._seen.setdefault(text.lower(), f"<{kind} {number}>")


def _is_address(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False
