"""`expertd quantize`: a checkpoint with fewer bits."""

import importlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expertd.cli.options import find_model
from expertd.errors import ConfigError

if TYPE_CHECKING:
    pass

BITS = click.Choice(["2", "3", "4", "5", "6", "8"])


@click.command(
    "quantize", epilog="Example: expertd quantize Qwen/Qwen3-30B-A3B ./qwen3-2bit --experts-bits 2"
)
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--experts-bits", type=BITS, default="2", show_default=True, help="Bits per expert weight.")
@click.option("--trunk-bits", type=BITS, default="4", show_default=True, help="Bits of the other weights.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="64", show_default=True)
def quantize_command(src: str, dst: Path, experts_bits: str, trunk_bits: str, group_size: str) -> None:
    """Quantize checkpoint SRC into the new folder DST.

    SRC is `demo`, a folder or a hub id. Routers and norms keep their precision.
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConfigError(f"{dst}: exists and is not an empty folder. Choose another DST.")
    before = find_model(src)
    convert = importlib.import_module("expertd.quant.convert")
    with _Progress() as progress:
        convert.quantize_checkpoint(
            before.folder, dst, int(experts_bits), int(trunk_bits), int(group_size), progress.show
        )
    after = find_model(str(dst.absolute()))
    ratio = before.total_bytes / max(1, after.total_bytes)
    click.echo(
        f"{in_words(before.total_bytes)} -> {in_words(after.total_bytes)} ({ratio:.1f} times smaller)\n"
        f"next: expertd run {shlex.quote(str(dst))} 'Once upon a time'"
    )


class _Progress:
    """A progress bar in bytes of the source checkpoint; silent unless standard error is a terminal."""

    def __enter__(self) -> "_Progress":
        from tqdm import tqdm

        self._bar: tqdm[Any] = tqdm(unit="B", unit_scale=True, disable=None)
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def show(self, done_bytes: int, total_bytes: int, name: str) -> None:
        """Show that `done_bytes` of `total_bytes` are done, the last of them of tensor `name`."""
        self._bar.total = total_bytes
        self._bar.set_description(name[-40:], refresh=False)
        self._bar.update(done_bytes - self._bar.n)


def in_words(num_bytes: int) -> str:
    """A size for people: "16.2 GB"."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
