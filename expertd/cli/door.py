"""Options that say who may use the HTTP server: for `expertd serve` and `expertd join`."""

import ipaddress
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from expertd.config import DoorConfig

F = TypeVar("F", bound=Callable[..., Any])
_FILE = click.Path(dir_okay=False, path_type=Path)


def door_options(command: F) -> F:
    """Add the options that make a DoorConfig."""
    options = (
        click.option(
            "--api-keys",
            type=_FILE,
            metavar="FILE",
            help="Answer only who has a key of it (`expertd key`), or of EXPERTD_API_KEYS.",
        ),
        click.option("--tls-cert", type=_FILE, metavar="FILE", help="Speak HTTPS: the certificate, PEM."),
        click.option("--tls-key", type=_FILE, metavar="FILE", help="Its key, PEM."),
        click.option(
            "--cors-origin",
            multiple=True,
            metavar="ORIGIN",
            help="Let pages of it ask, such as https://a.example; may be given again.",
        ),
        click.option("--log-json", is_flag=True, help="Log each request as JSON, without its text."),
        click.option("--log-prompts", is_flag=True, help="With its text."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def door_config(
    api_keys: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    cors_origin: tuple[str, ...],
    log_json: bool,
    log_prompts: bool,
) -> DoorConfig:
    """The options as a DoorConfig. Raises ConfigError for a file or a variable that has no keys in it."""
    from expertd.server.keys import keys_in, read_keys

    keys = read_keys(api_keys) if api_keys else ()
    return DoorConfig(
        keys=(*keys, *keys_in(os.environ.get("EXPERTD_API_KEYS", ""))),
        tls_cert=str(tls_cert or ""),
        tls_key=str(tls_key or ""),
        cors_origins=cors_origin,
        log_json=log_json,
        log_prompts=log_prompts,
    )


def warn_if_public(host: str, door: DoorConfig) -> None:
    """Say it if whoever reaches the address can use the model, or read the keys on their way."""
    try:
        private = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        private = False
    if private:
        return
    if not door.keys:
        message = "whoever reaches it can use the model; there are no keys. Make one with `expertd key`"
        print(f"expertd: --host {host}: {message}", file=sys.stderr)
    elif not door.tls_cert:
        message = "keys and prompts cross the network as they are. Add --tls-cert and --tls-key, or a proxy"
        print(f"expertd: --host {host}: {message}", file=sys.stderr)
