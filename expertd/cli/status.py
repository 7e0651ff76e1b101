"""`expertd status`: a running server on one screen: ranks, link, split, streams, and what happened last."""

import json
import sys
import time
from typing import Any

import click

from expertd.cli.client import Client, client_options
from expertd.cli.hosts import table

WATCH_S = 1.0
BARS = "▁▂▃▄▅▆▇█"
NUM_BARS = 60
NUM_EVENTS = 5
COLORS = {
    "ok": "green",
    "running": "green",
    "loading": "yellow",
    "joining": "yellow",
    "failed": "red",
    "dead": "red",
}


@click.command("status", epilog="Example: expertd status --watch")
@client_options
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; with --watch, one per line.")
def status_command(server: str, api_key: str, watch: bool, as_json: bool) -> None:
    """Show a running server on one screen: ranks, link, split, streams, events.

    Exit code 1 means that nothing answers. The page at the server's address shows the same, and more.
    """
    client = Client(server, api_key)
    if not watch:
        status = client.status()
        click.echo(json.dumps(status, indent=2) if as_json else screen(status, server))
        return
    try:
        if sys.stdout.isatty() and not as_json:
            print("\x1b[2J", end="")
        while True:
            _show(client.status(), server, as_json)
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        click.echo()


def _show(status: dict[str, Any], server: str, as_json: bool) -> None:
    """One round of --watch: in place on a terminal, a line elsewhere."""
    if as_json:
        click.echo(json.dumps(status))
    elif sys.stdout.isatty():
        text = screen(status, server)
        if click.get_current_context().color is False:
            text = click.unstyle(text)
        # Home, each line over the old one and its rest cleared, then what is below: nothing flickers.
        print("\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[K\n\x1b[J", end="")
    else:
        click.echo(line(status))
    sys.stdout.flush()


def line(status: dict[str, Any]) -> str:
    """A server in one line, for logs and pipes."""
    engine, speed = status["engine"] or {}, status["speed"]
    parts = [
        time.strftime("%H:%M:%S", time.localtime(status["at"])),
        status["status"],
        f"{speed['generated_per_s']:g} tokens/s",
        f"{speed['read_per_s']:g} read/s",
    ]
    if engine:
        parts.append(f"{engine['running']} running, {engine['waiting']} waiting")
        parts.append(f"split {engine['splits']['decode'] or '-'}")
    return "  ".join(parts)


# The screen: values in, text out.


def screen(status: dict[str, Any], server: str) -> str:
    parts = (
        _head(status, server),
        _figures(status),
        _ranks(status),
        _hosts(status["hosts"]),
        _planner(status["group"]),
        _events(status["events"]),
    )
    return "\n\n".join(filter(None, parts))


def _head(status: dict[str, Any], server: str) -> str:
    words = {
        "ok": "serving",
        "loading": f"loading the model, {100 * status['loaded']:.0f} %",
        "failed": f"stopped: {status['reason']}",
    }
    state = click.style(words[status["status"]], COLORS[status["status"]])
    model = click.style(status["model"] or "no model", bold=True)
    return f"{model} at {server}: {state}, up {span(status['uptime_s'])}, expertd {status['version']}"


def _figures(status: dict[str, Any]) -> str:
    speed, engine = status["speed"], status["engine"]
    now = f"{speed['generated_per_s']:g} tokens/s generated, {speed['read_per_s']:g} read"
    rows = [("speed", f"{now}  {sparkline([p['generated_per_s'] for p in status['history']])}".rstrip())]
    if engine:
        rows += _engine(engine)
    return "\n".join(f"{click.style(name.ljust(9), dim=True)} {text}" for name, text in rows)


def _engine(engine: dict[str, Any]) -> list[tuple[str, str]]:
    splits = ", ".join(f"{kind} {split}" for kind, split in engine["splits"].items() if split)
    waits = engine["exchange"]
    return [
        ("streams", f"{engine['running']} running, {engine['waiting']} waiting{_reading(engine['reading'])}"),
        ("caches", f"{engine['kv_tokens']:,} tokens, {size(engine['kv_bytes'])}"),
        ("split", splits or "no step yet"),
        ("exchange", f"waits {wait(waits['p50_us'])}, p99 {wait(waits['p99_us'])}; {waits['num']:,} so far"),
    ]


def _reading(reading: list[dict[str, int]]) -> str:
    return "".join(f"; reading {r['num_read']:,} of {r['num_tokens']:,} tokens" for r in reading)


def _ranks(status: dict[str, Any]) -> str:
    group = status["group"]
    if not group:
        return ""
    rows = [
        (str(r["id"]), r["state"], "leads" if r["rank"] == 0 else "", str(r["pid"]), size(r["memory_bytes"]))
        for r in group["ranks"]
    ]
    text = table(("RANK", "STATE", "", "PROCESS", "MEMORY"), rows)
    for state, color in COLORS.items():
        text = text.replace(f"  {state} ", f"  {click.style(state, color)} ")
    return f"epoch {group['epoch']}{': ' + group['reason'] if group['reason'] else ''}\n{text}"


def _hosts(hosts: dict[str, Any] | None) -> str:
    if not hosts:
        return ""
    rows = [
        (h["name"], h["state"], wait((h.get("route") or {}).get("p50_us")), h.get("reason") or "")
        for h in hosts["hosts"]
    ]
    head = f"link {hosts['link']}, {hosts['role']}"
    return f"{head}\n{table(('HOST', 'STATE', 'ROUTE', ''), rows)}" if rows else head


def _planner(group: dict[str, Any] | None) -> str:
    planner = (group or {}).get("planner") or {}
    rows = [
        (
            work,
            choice["split"],
            ", ".join(f"{s} {ms:.3g} ms" for s, ms in choice["costs_ms"].items()),
            choice["reason"],
        )
        for work, choice in planner.items()
    ]
    return table(("WORK", "SPLIT", "A STEP TAKES", "BECAUSE"), rows) if rows else ""


def _events(events: list[dict[str, Any]]) -> str:
    shown = [e for e in events if e["kind"] != "plan"][-NUM_EVENTS:]
    return "\n".join(f"{time.strftime('%H:%M:%S', time.localtime(e['at']))}  {e['text']}" for e in shown)


# Numbers for people.


def sparkline(values: list[float]) -> str:
    """The last minute as eight heights of bars, against its own highest."""
    values = values[-NUM_BARS:]
    top = max(values, default=0.0)
    return "".join(BARS[min(7, int(8 * v / top))] for v in values) if top else ""


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def wait(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.3g} us" if us < 1000 else f"{us / 1000:.3g} ms"


def span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} s"
