"""`expertd bench`: how fast a checkpoint is here, every split beside one rank, and how fast the links are."""

import importlib
from pathlib import Path
from typing import Any

import click

from expertd.cli.options import find_model, kernel_options, parse_ranks, parse_splits
from expertd.config import GroupConfig
from expertd.errors import ConfigError

_JSON = click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Figures go there."
)


@click.group(
    "bench", epilog="Example: expertd bench decode demo --ranks 2 --split experts,tokens --repeats 5"
)
def bench_command() -> None:
    """Measure: `decode` and `prefill` a model, or the `link` between ranks."""


def _throughput(kind: str, text: str) -> None:
    @bench_command.command(kind, help=text, epilog=f"Example: expertd bench {kind} demo --ranks 1,2")
    @click.argument("model")
    @click.option("--ranks", default="2", show_default=True, metavar="N,...", help="How many ranks.")
    @click.option(
        "--split", default="experts,tokens", show_default=True, metavar="NAME,...", help="Which splits."
    )
    @click.option(
        "--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens per run."
    )
    @click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each.")
    @kernel_options
    @_JSON
    def command(
        model: str,
        ranks: str,
        split: str,
        tokens: int,
        repeats: int,
        json_file: Path | None,
        **kernels: Any,
    ) -> None:
        counts, splits = parse_ranks(ranks), parse_splits(split)
        for count in counts:
            GroupConfig("", num_ranks=count)
        _check_json(json_file)
        checkpoint = find_model(model).folder
        throughput = importlib.import_module("expertd.bench.throughput")
        throughput.run(kind, checkpoint, counts, splits, tokens, repeats, json_file, **kernels)


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


def _check_json(file: Path | None) -> None:
    if file and not file.absolute().parent.is_dir():
        raise ConfigError(f"--json {file}: no folder {file.absolute().parent}. Create it first.")
