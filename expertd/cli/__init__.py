"""The `expertd` command. Only click is imported here; each command imports the rest when it runs."""

import os
import sys
import traceback
from typing import NoReturn

import click

import expertd
from expertd.cli.bench import bench_command
from expertd.cli.doctor import doctor_command
from expertd.cli.hosts import hosts_command
from expertd.cli.join import join_command
from expertd.cli.key import key_command
from expertd.cli.pair import pair_command
from expertd.cli.quality import quality_command
from expertd.cli.quantize import quantize_command
from expertd.cli.run import run_command
from expertd.cli.serve import serve_command
from expertd.cli.topology import topology_command
from expertd.errors import ExpertdError

INTERRUPTED = 130


@click.group(
    epilog="Start with: expertd run demo 'Once upon a time'",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(expertd.__version__, prog_name="expertd", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve one mixture-of-experts language model from one to four ranks."""


for _command in (
    run_command,
    serve_command,
    join_command,
    pair_command,
    hosts_command,
    key_command,
    topology_command,
    doctor_command,
    quantize_command,
    quality_command,
    bench_command,
):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line and exit: 0, 1 (we failed), 2 (the user's input is wrong), 130 (Ctrl-C)."""
    try:
        result = cli.main(prog_name="expertd", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except ExpertdError as e:
        _fail(str(e), e.exit_code)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except click.UsageError as e:
        command = e.ctx.command_path if e.ctx else "expertd"
        _fail(f"{e.format_message()} Run `{command} --help`.", e.exit_code)
    except click.ClickException as e:
        _fail(e.format_message(), e.exit_code)
    except Exception as e:
        if os.environ.get("EXPERTD_DEBUG") == "1":
            traceback.print_exc()
        bug = "this is a bug of expertd; run with EXPERTD_DEBUG=1 for the traceback"
        _fail(f"{type(e).__name__}: {e}; {bug}", 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    print("expertd:", " ".join(message.split()), file=sys.stderr)
    sys.exit(exit_code)
