"""The config file: every flag of every command has its key there. A flag wins over its variable, that over the file.

    [serve]
    model = "demo"
    ranks = 2
    split = "auto"

A table is a command, a key one of its flags without the dashes, or its argument. What the file says is checked as if it
were typed, when any command starts: a mistake in it should not wait for the night in which the service restarts.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any

import click

from expertd.errors import ConfigError


def read_settings(path: Path, group: click.Group, wanted: bool) -> dict[str, Any]:
    """The file as click's default_map. Raises ConfigError; a file that is not there is empty, unless it is `wanted`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not wanted:
            return {}
        raise ConfigError(f"--config {path}: no such file. Make it, or leave --config out.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}. Mend it or move it away.") from e
    return _group_defaults(path, values, group, "")


def _group_defaults(path: Path, values: dict[str, Any], group: click.Group, within: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, table in values.items():
        command = group.commands.get(name)
        if command is None or not isinstance(table, dict):
            known = [f"[{within}{n}]" for n in group.commands]
            raise _unknown(path, f"[{within}{name}]" if isinstance(table, dict) else name, "command", known)
        if isinstance(command, click.Group):
            found[name] = _group_defaults(path, table, command, f"{name}.")
        else:
            found[name] = _defaults(path, table, command, f"[{within}{name}]")
    return found


def _defaults(path: Path, table: dict[str, Any], command: click.Command, where: str) -> dict[str, Any]:
    parameters = keys_of(command)
    found = {}
    for key, value in table.items():
        if key not in parameters:
            raise _unknown(path, f"{where} {key}", "flag", list(parameters), key)
        parameter = parameters[key]
        assert parameter.name
        found[parameter.name] = value
        try:
            parameter.type_cast_value(click.Context(command), value)
        except (click.BadParameter, TypeError) as e:
            reason = e.message if isinstance(e, click.BadParameter) else str(e)
            raise ConfigError(f"{path}: {where} {key} = {value!r}: {reason}") from e
    return found


def keys_of(command: click.Command) -> dict[str, click.Parameter]:
    """A command's parameters by their keys: --max-streams is max-streams, MODEL is model."""
    found = {}
    for parameter in command.params:
        if parameter.name:
            longest = max(parameter.opts, key=len)
            found[longest.removeprefix("--").lower()] = parameter
    return found


def _unknown(path: Path, what: str, kind: str, known: list[str], key: str = "") -> ConfigError:
    near = difflib.get_close_matches(key or what, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
    return ConfigError(f"{path}: {what}: no such {kind}. {hint}")
