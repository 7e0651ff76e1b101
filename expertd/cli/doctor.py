"""`expertd doctor`: what works on this machine, what does not, and what to do about it."""

import json
import sys
import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from expertd.cluster.doctor import Report, Rung

WEDGE = (
    "expertd: --fast-synch sets MLX_METAL_FAST_SYNCH=1, which can leave the GPU busy until the machine is restarted. "
    "Starting in {:g} s; Ctrl-C stops it."
)
WEDGE_PAUSE_S = 3.0


@click.command("doctor", epilog="Example: expertd doctor --peer studio.local")
@click.option("--peer", metavar="HOST", default="", help="Also try to reach this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for a report of a bug.")
@click.option("--addresses", is_flag=True, help="Keep addresses, names and identities in the JSON.")
@click.option(
    "--fast-synch",
    is_flag=True,
    help="Also measure MLX's fast fence, which can wedge a Mac's GPU until a restart.",
)
def doctor_command(peer: str, as_json: bool, addresses: bool, fast_synch: bool) -> int:
    """Test this machine, from its parts to its fastest link, in less than a minute.

    Every line says what was found; an arrow says what to do next. Exit code 1 means that expertd cannot run here.
    """
    from expertd.cluster import doctor, redact

    if fast_synch and sys.platform == "darwin":
        click.echo(WEDGE.format(WEDGE_PAUSE_S), err=True)
        time.sleep(WEDGE_PAUSE_S)
    report = doctor.climb(doctor.Tools(), peer, fast_synch, None if as_json else _show)
    if as_json:
        value = doctor.report_json(report)
        click.echo(json.dumps(value if addresses else redact.redact(value, [peer]), indent=2))
    else:
        click.echo(summary(report))
    return report.exit_code


def _show(rung: "Rung") -> None:
    click.echo(line(rung))


def line(rung: "Rung") -> str:
    """One rung as text, with its advice on a line of its own."""
    text = f"{rung.state:8}  {rung.name:21}  {rung.found}"
    return f"{text}\n{'':33}-> {rung.next}" if rung.next else text


def summary(report: "Report") -> str:
    failed = [rung.name for rung in report.rungs if rung.state == "failed"]
    warned = [rung.name for rung in report.rungs if rung.state == "warning"]
    if failed:
        return f"\nexpertd cannot run here: {', '.join(failed)}."
    return f"\nexpertd can run here. Look at: {', '.join(warned)}." if warned else "\nexpertd can run here."
