"""The `expertd` command. Only click is imported here; each command imports the rest when it runs."""

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import click

import expertd
from expertd.cli.bench import bench_command
from expertd.cli.chat import chat_command
from expertd.cli.completion import completion_command
from expertd.cli.doctor import doctor_command
from expertd.cli.hosts import hosts_command
from expertd.cli.join import join_command
from expertd.cli.key import key_command
from expertd.cli.options import config_folder
from expertd.cli.pair import pair_command
from expertd.cli.quality import quality_command
from expertd.cli.quantize import quantize_command
from expertd.cli.run import run_command
from expertd.cli.serve import serve_command
from expertd.cli.service import service_command
from expertd.cli.settings import read_settings
from expertd.cli.status import status_command
from expertd.cli.topology import topology_command
from expertd.errors import ExpertdError

INTERRUPTED = 130


SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Serve": (serve_command, join_command, pair_command, hosts_command, key_command, service_command),
    "Use": (run_command, chat_command, status_command),
    "Make a checkpoint smaller": (quantize_command, quality_command),
    "Look into it": (doctor_command, topology_command, bench_command, completion_command),
}


class _Sections(click.Group):
    """A group whose help lists its commands by what they are for."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(c.name or "", c.get_short_help_str(limit=90)) for c in commands])


@click.group(
    cls=_Sections,
    epilog="Start with: expertd run demo 'Once upon a time'. Every flag has a variable (EXPERTD_SERVE_PORT is that of "
    "`serve --port`) and a key in the config file (`port` under `[serve]`); a flag wins over both.",
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "EXPERTD"},
)
@click.version_option(expertd.__version__, prog_name="expertd", message="%(prog)s %(version)s")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Flags' values, in TOML [default: ~/.config/expertd/config.toml].",
)
@click.pass_context
def cli(context: click.Context, config: Path | None) -> None:
    """Serve one mixture-of-experts language model from one to four ranks."""
    if os.environ.get("NO_COLOR"):  # https://no-color.org
        context.color = False
    assert isinstance(context.command, click.Group)
    context.default_map = read_settings(
        config or config_folder() / "config.toml", context.command, wanted=config is not None
    )


for _command in (command for commands in SECTIONS.values() for command in commands):
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
