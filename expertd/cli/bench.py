"""`expertd bench`: how fast a checkpoint is here, every split beside one rank."""

import importlib
from pathlib import Path

import click

from expertd.cli.options import find_model, parse_ranks, parse_splits
from expertd.config import GroupConfig
from expertd.errors import ConfigError


@click.command(
    "bench", epilog="Example: expertd bench decode demo --ranks 2 --split experts,tokens --repeats 5"
)
@click.argument("kind", type=click.Choice(["decode", "prefill"]))
@click.argument("model")
@click.option("--ranks", default="2", show_default=True, metavar="N,...", help="How many ranks.")
@click.option(
    "--split", default="experts,tokens", show_default=True, metavar="NAME,...", help="Which splits."
)
@click.option("--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens per run.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Figures go there."
)
def bench_command(
    kind: str, model: str, ranks: str, split: str, tokens: int, repeats: int, json_file: Path | None
) -> None:
    """Measure tokens per second of MODEL: `decode` one stream, or `prefill` one prompt."""
    counts, splits = parse_ranks(ranks), parse_splits(split)
    for count in counts:
        GroupConfig("", num_ranks=count)
    if json_file and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: no folder {json_file.absolute().parent}. Create it first.")
    checkpoint = find_model(model).folder
    throughput = importlib.import_module("expertd.bench.throughput")
    throughput.run(kind, checkpoint, counts, splits, tokens, repeats, json_file)
