"""`expertd quality`: how much a checkpoint with fewer bits has lost."""

import importlib
import json
import signal
import sys
from pathlib import Path
from typing import NoReturn

import click

from expertd.cli.options import find_model
from expertd.config import MAX_RANKS, SPLITS
from expertd.errors import ConfigError

NEW_FILE = click.Path(dir_okay=False, path_type=Path)
EPILOG = """\b
What to look at, first things first:
  mean KL         how far the next-token distributions are from those of the
                  reference, in nats per token: 0 is no difference at all.
  p95, p99 KL     the same for the worst twentieth and hundredth of tokens.
  same top token  how often both would say the same, without sampling.
  perplexity      of the text: it hides small losses, so compare ratios.
  relative error  of each layer's output; errors of earlier layers are in it.
  same experts    tokens that the layer's router sends where the reference's
                  does.

More ranks or another split change no digit.

Example: expertd quality ./demo-2bit --reference demo --windows 16"""


@click.command("quality", epilog=EPILOG)
@click.argument("checkpoints", metavar="A...", nargs=-1, required=True)
@click.option("--reference", metavar="B", help="The checkpoint that A was quantized from.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Text to measure on, unseen by all of them [default: stories].",
)
@click.option(
    "--windows",
    "num_windows",
    type=click.IntRange(min=1),
    default=120,
    show_default=True,
    help="Windows of 192 tokens, evenly spread over the text.",
)
@click.option("--json", "json_file", type=NEW_FILE, metavar="FILE", help="All figures go there.")
@click.option("--plot", type=NEW_FILE, metavar="FILE", help="A picture, .svg or .png, goes there.")
@click.option(
    "--ranks",
    type=click.IntRange(1, MAX_RANKS),
    default=1,
    show_default=True,
    help="Processes that read together; each loads all of A.",
)
@click.option(
    "--split", type=click.Choice(SPLITS), default="auto", show_default=True, help="Who computes what."
)
@click.option("--report", is_flag=True, help="Put the figures into A's report.html.")
def quality_command(
    checkpoints: tuple[str, ...],
    reference: str | None,
    text: Path | None,
    num_windows: int,
    json_file: Path | None,
    plot: Path | None,
    ranks: int,
    split: str,
    report: bool,
) -> None:
    """Measure checkpoints A... on a text, beside reference B.

    Prints size, bits per weight and perplexity, and with --reference what was lost, for the whole model and for
    each layer. A and B are folders, `demo` or hub ids.
    """
    from expertd.cli.output import Progress

    quality = importlib.import_module("expertd.quant.quality")
    picture = importlib.import_module("expertd.quant.picture")
    if json_file and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: no folder {json_file.absolute().parent}. Create it first.")
    if plot:
        picture.check_picture(plot)
    infos = [find_model(name) for name in checkpoints]
    for info in infos if report else []:
        quality.check_report(info)
    beside = find_model(reference) if reference else None
    asked = quality.Asked(infos, beside, text, num_windows, ranks, split)
    for warning in quality.warnings_of(asked):
        print(f"expertd: {warning}", file=sys.stderr)
    signal.signal(signal.SIGTERM, _terminated)
    with Progress("window") as progress:
        compared = quality.compare(asked, progress)
    click.echo(quality.describe(compared))
    if json_file:
        _write(json_file, json.dumps(compared.to_json(), indent=2) + "\n")
    if plot:
        picture.draw(compared, plot)
    for info, found in zip(infos, compared.qualities, strict=True) if report else ():
        click.echo(f"report: {quality.update_report(info.folder, compared, found)}")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--json {file}: {e.strerror or e}. Check its folder and disk.") from e


def _terminated(*_: object) -> NoReturn:
    """SIGTERM ends it as Ctrl-C does: ranks and files of a temporary folder are gone then."""
    from expertd.cli.signals import TERMINATED

    sys.exit(TERMINATED)
