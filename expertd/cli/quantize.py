"""`expertd quantize`: a checkpoint with fewer bits."""

import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from expertd.cli.options import cache_folder, find_model
from expertd.config import parse_size
from expertd.errors import ConfigError

EFFORTS = ("plain", "fast", "normal", "best")
BITS = click.Choice(["2", "3", "4", "5", "6", "8"])
TEXT_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EPILOG = """\b
What the efforts do to the experts, and what they cost:
  plain   rounds, as mlx_lm.convert does, in as much time.
  fast    chooses scales by least squares, with a gain per row; no text.
  normal  chooses codes by the inputs each expert really sees, layer by layer.
  best    also trains scales and biases against the full model, which must
          fit into memory.

Interrupted, it leaves DST.partial; the same command goes on there.
Example: expertd quantize Qwen/Qwen3-30B-A3B ./qwen3-2bit --fit 32GB"""


@click.command("quantize", epilog=EPILOG)
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--effort", type=click.Choice(EFFORTS), default="normal", show_default=True, help="See below.")
@click.option("--experts-bits", type=BITS, default="2", show_default=True, help="Bits per expert weight.")
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Expert weights per scale.",
)
@click.option(
    "--trunk",
    default="4,16",
    show_default=True,
    help="Bits for all other weights: EWQ chooses from these for each layer.",
)
@click.option(
    "--ewq",
    type=click.Choice(["normalized", "paper"]),
    default="normalized",
    show_default=True,
    help="How entropies of layers are compared: by like matrices, or as published.",
)
@click.option(
    "--ewq-x", default=1.0, show_default=True, help="Low bits from so many deviations below the mean."
)
@click.option("--target-bytes", metavar="SIZE", help="Size of the result, such as 9.5GB.")
@click.option("--fit", metavar="SIZE", help="Memory of the machine that shall run it, such as 128GB.")
@click.option("--calibrate", type=TEXT_FILE, metavar="FILE", help="Text to calibrate on [default: stories].")
@click.option("--windows", default=128, show_default=True, help="Calibration windows of 512 tokens.")
@click.option("--seed", default=0, show_default=True, help="Chooses the windows.")
@click.option("--threads", default=0, help="Processor cores to use [default: all]; changes no byte.")
@click.option("--cache-bytes", metavar="SIZE", help="Most disk for bytes of a remote SRC [default: 50GB].")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and stop.")
def quantize_command(src: str, dst: Path, dry_run: bool, cache_bytes: str | None, **options: Any) -> None:
    """Quantize checkpoint SRC into the new folder DST.

    SRC is `demo`, a folder, a hub id, or the https:// or file:// URL of a folder; of remote ones, only the
    bytes that are needed are fetched. DST is plain MLX format, with a report.html that says what was decided.
    """
    from expertd.cli.output import Progress

    settings = _settings(**options)
    convert = importlib.import_module("expertd.quant.convert")
    budget = importlib.import_module("expertd.quant.budget")
    cache = cache_folder()
    limit = parse_size(cache_bytes) if cache_bytes else None
    importlib.import_module("expertd.quant.heap").keep_freed_memory()
    with Progress() as progress:
        if dry_run:
            click.echo(convert.describe(src, settings, progress, cache, limit))
            return
        done = convert.quantize_checkpoint(src, dst, settings, progress, cache, limit)
    for warning in done.warnings:
        print(f"expertd: {warning}", file=sys.stderr)
    after = find_model(str(dst.absolute()))
    ratio = done.source_bytes / max(1, after.total_bytes)
    click.echo(
        f"{budget.size_in_words(done.source_bytes)} -> {budget.size_in_words(after.total_bytes)} "
        f"({ratio:.1f} times smaller, {done.bits_per_weight:.2f} bits per weight)\n"
        f"report: {dst / 'report.html'}\n"
        f"next: expertd run {shlex.quote(str(dst))} 'Once upon a time'"
    )


def _settings(
    trunk: str, target_bytes: str | None, fit: str | None, experts_bits: str, group_size: str, windows: int,
    **options: Any,
) -> Any:  # fmt: skip
    """The flags as Settings, which checks them. Raises ConfigError."""
    module = importlib.import_module("expertd.quant.settings")
    if options["calibrate"] and options["effort"] in ("plain", "fast"):
        raise ConfigError(
            f"--calibrate: --effort {options['effort']} uses no text. Leave one of them out, or use --effort normal."
        )
    return module.Settings(
        trunk=module.parse_menu(trunk),
        target_bytes=parse_size(target_bytes) if target_bytes else None,
        fit_bytes=parse_size(fit) if fit else None,
        experts_bits=int(experts_bits),
        group_size=int(group_size),
        num_windows=windows,
        **options,
    )
