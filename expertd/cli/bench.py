"""`expertd bench`: how fast a checkpoint is here, every split beside one rank, and how fast the links are."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from expertd.cli.options import activation_bits_option, find_model, parse_ranks, parse_splits
from expertd.config import KERNELS, GroupConfig
from expertd.errors import ConfigError

_JSON = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Figures go there."
)


@click.group(
    "bench", epilog="Example: expertd bench decode demo --ranks 2 --split experts,tokens --repeats 5"
)
def bench_command() -> None:
    """Measure: `decode` and `prefill` a model, the `link` between ranks, or the `kernels` of this processor."""


def _throughput(kind: str, text: str) -> None:
    @bench_command.command(kind, help=text, epilog=f"Example: expertd bench {kind} demo --ranks 1,2")
    @click.argument("model", required=False)
    @click.option("--shape", metavar="NAME", help="Random weights instead of MODEL, such as qwen3-30b-a3b.")
    @click.option("--layers", type=click.IntRange(min=1), help="Of --shape [default: 4].")
    @click.option("--vocabulary", type=click.IntRange(min=1), help="Of --shape [default: 32768].")
    @click.option(
        "--outer-bits",
        type=click.IntRange(2, 8),
        help="Of --shape: bits of embedding and head, 2, 4 or 8 [default: 8].",
    )
    @click.option("--ranks", default="2", show_default=True, metavar="N,...", help="How many ranks.")
    @click.option(
        "--split", default="experts,tokens", show_default=True, metavar="NAME,...", help="Which splits."
    )
    @click.option(
        "--kernels", default="auto", show_default=True, metavar="NAME,...", help="Whose: native, mlx or both."
    )
    @click.option(
        "--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens per run."
    )
    @click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each.")
    @activation_bits_option
    @_JSON
    def command(
        model: str | None,
        ranks: str,
        split: str,
        kernels: str,
        tokens: int,
        repeats: int,
        json_file: Path | None,
        activation_bits: int,
        **sizes: Any,
    ) -> None:
        counts, splits, names = parse_ranks(ranks), parse_splits(split), _parse_kernels(kernels)
        for count in counts:
            GroupConfig("", num_ranks=count)
        _check_json(json_file)
        throughput = importlib.import_module("expertd.bench.throughput")
        with _checkpoint(model, **sizes) as (folder, name):
            settings = {"kernels": names, "activation_bits": activation_bits, "name": name}
            throughput.run(kind, folder, counts, splits, tokens, repeats, json_file, **settings)


@contextmanager
def _checkpoint(model: str | None, shape: str | None, **sizes: int | None) -> Iterator[tuple[Path, str]]:
    """The folder of MODEL, or one of --shape that is there meanwhile; and what to call it, "" for its path.

    Raises ConfigError.
    """
    if (model is None) == (shape is None):
        found = "neither is given" if model is None else f"found both {model!r} and --shape {shape}"
        raise ConfigError(f"MODEL, --shape: {found}. Give one: demo, or --shape qwen3-30b-a3b.")
    if model is not None:
        for name in (name for name, size in sizes.items() if size is not None):
            raise ConfigError(f"--{name.replace('_', '-')}: belongs to --shape; MODEL has its own.")
        yield find_model(model).folder, ""
        return
    maker = importlib.import_module("expertd.bench.random_checkpoint")
    with maker.temporary_checkpoint(shape, **sizes) as found_here:
        yield found_here


def _parse_kernels(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in KERNELS:
            raise ConfigError(f"--kernels {name}: unknown. Choose from {', '.join(KERNELS)}.")
    if len(set(names)) < len(names):
        raise ConfigError(f"--kernels {text}: names one twice.")
    return names


_throughput("decode", "Measure tokens per second of one stream of MODEL, each split beside one rank.")
_throughput("prefill", "Measure tokens per second of one prompt to MODEL, each split beside one rank.")


@bench_command.command("link", epilog="Example: expertd bench link --json link.json")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=10, show_default=True, help="Rounds of blocks."
)
@click.option("--quick", is_flag=True, help="4 and 16 KiB only, in a few seconds.")
@click.option("--verbs-library", default="", hidden=True)  # as of `serve`
@_JSON
def link_command(repeats: int, quick: bool, verbs_library: str, json_file: Path | None) -> None:
    """Measure latency and bandwidth of every link of this machine, each beside its floor."""
    _check_json(json_file)
    importlib.import_module("expertd.bench.link").run(repeats, json_file, quick, verbs_library)


@bench_command.command("kernels", epilog="Example: expertd bench kernels --quick")
@click.option("--threads", metavar="N,...", help="How many threads [default: 1,2].")
@click.option("--shape", metavar="NAME,...", help="Which models' matrices [default: all four].")
@click.option("--quick", is_flag=True, help="One model, few formats and rows, in half a minute.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A roofline chart goes there, .svg or .png.",
)
@_JSON
def kernels_command(
    threads: str | None, shape: str | None, quick: bool, plot: Path | None, json_file: Path | None
) -> None:
    """Measure our products on this processor beside MLX's and what it can do at most."""
    _check_json(json_file)
    kernels = importlib.import_module("expertd.bench.kernels")
    shapes = shape.split(",") if shape else ()
    kernels.run(json_file, plot, quick, _parse_threads(threads), shapes)


def _parse_threads(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as e:
        raise ConfigError(f"--threads {text}: wanted whole numbers with commas between, such as 1,2.") from e


def _check_json(file: Path | None) -> None:
    if file and not file.absolute().parent.is_dir():
        raise ConfigError(f"--json {file}: no folder {file.absolute().parent}. Create it first.")
