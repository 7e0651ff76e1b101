"""The page at `/`: markup, style and scripts of the folder beside this file, joined to one document.

Nothing is fetched from anywhere but the API that serves it, and the browser is told so: the policy names the hashes of
our own style and script, and refuses all else.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).with_name("page")
SCRIPTS = ("draw.js", "chat.js", "main.js")


@cache
def document() -> tuple[bytes, str]:
    """The page, and its content security policy."""
    style = (FOLDER / "style.css").read_text()
    script = "\n".join((FOLDER / name).read_text() for name in SCRIPTS)
    markup = (FOLDER / "page.html").read_text()
    page = markup.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page.encode(), "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page_response() -> Response:
    page, policy = document()
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return Response(page, media_type="text/html", headers=headers)
