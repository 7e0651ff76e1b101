"""Options that several commands share, and the way from MODEL to a checked checkpoint."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from expertd.config import (
    ACTIVATION_BITS,
    KERNELS,
    KV_BITS,
    LINKS,
    MAX_RANKS,
    PREFIX_DISK_BYTES,
    SPLITS,
    GroupConfig,
    HostsConfig,
    parse_size,
)
from expertd.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from expertd.checkpoint.inspect import CheckpointInfo

F = TypeVar("F", bound=Callable[..., Any])


def group_options(command: F) -> F:
    """Add the options that make a GroupConfig: --ranks, --split, --shares, --pin, --link, --ignore-memory, and
    kernel_options."""
    options = (
        click.option("--ranks", default=1, show_default=True, help=f"Processes, 1 to {MAX_RANKS}."),
        click.option(
            "--split",
            type=click.Choice(SPLITS),
            default="auto",
            show_default=True,
            help="Who computes what.",
        ),
        click.option("--shares", metavar="A,B", help="Each rank's share, such as 2,1 [default: equal]."),
        click.option("--pin", is_flag=True, help="Give each rank one processor of its own (Linux)."),
        click.option(
            "--link",
            type=click.Choice(LINKS),
            default="auto",
            show_default=True,
            help="How ranks swap rows; mlx: MLX's own engine, for comparison.",
        ),
        ignore_memory_option,
    )
    command = kernel_options(command)
    for option in reversed(options):
        command = option(command)
    return command


def ignore_memory_option(command: F) -> F:
    return click.option(
        "--ignore-memory", is_flag=True, help="Load even what does not seem to fit in memory."
    )(command)


def drain_option(command: F) -> F:
    return click.option(
        "--drain-timeout",
        "drain_timeout_s",
        type=click.FloatRange(min=0),
        default=30.0,
        show_default=True,
        help="Seconds that SIGTERM leaves to requests that run.",
    )(command)


def kernel_options(command: F) -> F:
    """Add the options that choose what computes on a CPU: --kernels, --activation-bits."""
    return kernels_option("Who computes on a CPU; auto: native.")(activation_bits_option(command))


def activation_bits_option(command: F) -> F:
    return click.option(
        "--activation-bits",
        type=click.Choice(["8", "16"]),
        default=str(ACTIVATION_BITS),
        show_default=True,
        callback=lambda context, parameter, value: int(value),
        help="How finely native kernels round activations.",
    )(command)


def kernels_option(text: str) -> Callable[[F], F]:
    return click.option("--kernels", type=click.Choice(KERNELS), default="auto", show_default=True, help=text)


def draft_model_option(command: F) -> F:
    return click.option(
        "--draft-model",
        metavar="MODEL",
        default="",
        help="A small model with the same tokenizer: guesses for a single stream, where that is faster.",
    )(command)


def kv_bits_option(command: F) -> F:
    return click.option(
        "--kv-bits",
        type=click.Choice([str(bits) for bits in KV_BITS if bits]),
        callback=lambda context, parameter, value: int(value or 0),
        help="Keep keys and values at so many bits: longer texts in the same memory [default: as computed].",
    )(command)


def kv_cache_option(command: F) -> F:
    return click.option(
        "--kv-cache",
        "kv_cache_bytes",
        metavar="SIZE",
        callback=lambda context, parameter, value: value and parse_size(value),
        help="Memory of each rank for keys and values, such as 8GB: requests beyond it wait [default: what is free].",
    )(command)


def prefix_cache_options(command: F) -> F:
    """Add the options that say what becomes of finished requests' caches."""
    options = (
        click.option(
            "--prefix-cache",
            "prefix_cache_bytes",
            metavar="SIZE",
            callback=lambda context, parameter, value: value and (0 if value == "0" else parse_size(value)),
            help="Memory for prompts' beginnings that came before, such as 2GB; 0: none [default: a tenth of it].",
        ),
        click.option(
            "--prefix-cache-dir",
            type=click.Path(file_okay=False, resolve_path=True),
            callback=lambda context, parameter, value: (
                value or ""
            ),  # a default of "" would be resolved, to here
            help="Keep them in files there as well, across restarts.",
        ),
        click.option(
            "--prefix-cache-disk",
            "prefix_disk_bytes",
            metavar="SIZE",
            default=str(PREFIX_DISK_BYTES),
            callback=lambda context, parameter, value: parse_size(value),
            help="Most disk for these files [default: 20GB].",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def hosts_options(command: F) -> F:
    """Add the options that make a HostsConfig."""
    port = click.IntRange(0, 65535)
    folder = click.Path(file_okay=False, path_type=Path)
    options = (
        click.option(
            "--control-host", default="", help="Address on which paired hosts may call [default: any]."
        ),
        click.option("--control-port", type=port, default=7420, show_default=True, help="Its port."),
        click.option("--store", type=folder, help="Where copied checkpoints are kept."),
        # For tests and for drivers in unusual places.
        click.option("--verbs-library", default="", hidden=True),
        click.option("--lint-verbs", is_flag=True, hidden=True),
        click.option("--silence", type=click.FloatRange(0.2, 60), default=0.8, hidden=True),
        click.option("--setup-time", type=click.FloatRange(1, 600), default=20.0, hidden=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


def hosts_config(
    control_host: str,
    control_port: int,
    store: Path | None,
    verbs_library: str,
    lint_verbs: bool,
    silence: float,
    setup_time: float,
) -> HostsConfig:
    """The settings of hosts_options, in this user's folders."""
    cache = cache_folder()
    return HostsConfig(
        folder=config_folder(),
        cache=cache,
        store=store or cache / "checkpoints",
        control_host=control_host,
        control_port=control_port,
        silence_s=silence,
        setup_s=setup_time,
        verbs_library=verbs_library,
        lint=lint_verbs,
    )


def config_folder() -> Path:
    """Where this user's identity and paired hosts are kept: $XDG_CONFIG_HOME/expertd, or ~/.config/expertd."""
    return _user_folder("XDG_CONFIG_HOME", ".config")


def cache_folder() -> Path:
    """Where what can be made again is kept for this user: $XDG_CACHE_HOME/expertd, or ~/.cache/expertd."""
    return _user_folder("XDG_CACHE_HOME", ".cache")


def _user_folder(variable: str, default: str) -> Path:
    base = os.environ.get(variable, "")
    return (Path(base) if os.path.isabs(base) else Path.home() / default) / "expertd"


def find_model(name: str) -> "CheckpointInfo":
    """Find and check the checkpoint that MODEL names. Raises CheckpointError before anything is started."""
    from expertd.checkpoint.inspect import check_checkpoint
    from expertd.checkpoint.locate import find_checkpoint
    from expertd.checkpoint.manifest import check_sizes
    from expertd.cli.output import Progress

    with Progress() as bar:
        info = check_checkpoint(find_checkpoint(name, cache_folder(), bar))
    check_sizes(info.folder)
    return info


def find_draft(name: str) -> str:
    """The folder of the checked draft model that --draft-model names; "" for none. Raises CheckpointError."""
    from expertd.checkpoint.inspect import check_draft
    from expertd.checkpoint.locate import find_checkpoint
    from expertd.cli.output import Progress

    if not name:
        return ""
    try:
        with Progress() as bar:
            return str(check_draft(find_checkpoint(name, cache_folder(), bar)).folder)
    except CheckpointError as e:
        raise CheckpointError(f"--draft-model: {e}") from e


def make_group(
    checkpoint: Path, ranks: int, split: str, shares: str | None, pin: bool, **more: Any
) -> GroupConfig:
    """Check the flags. Raises ConfigError that names the flag."""
    group = GroupConfig(str(checkpoint), ranks, split, parse_shares(shares), **more)
    return GroupConfig(**{**vars(group), "cpus": allowed_cpus(ranks)}) if pin else group


def warn_of_link(group: GroupConfig) -> None:
    """Say so when --link means nothing to the ranks that are started here."""
    if group.num_ranks > 1 and group.link in ("tcp", "verbs"):
        said = f"--link {group.link}: ranks of one host use shared memory; it counts for hosts that join"
        print("expertd:", said, file=sys.stderr)


def parse_shares(text: str | None) -> tuple[float, ...]:
    """Read "2,1". Raises ConfigError."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as e:
        raise ConfigError(f"--shares {text}: wanted numbers with commas between, such as 2,1.") from e


def parse_ranks(text: str) -> list[int]:
    """Read "1,2". Raises ConfigError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as e:
        raise ConfigError(f"--ranks {text}: wanted whole numbers with commas between, such as 1,2.") from e


def parse_splits(text: str) -> list[str]:
    """Read "experts,tokens". Raises ConfigError that names the unknown split."""
    splits = text.split(",")
    for split in splits:
        if split not in SPLITS:
            raise ConfigError(f"--split {split}: unknown split. Choose from {', '.join(SPLITS)}.")
    return splits


def allowed_cpus(num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Give rank r the r-th processor that this process may use. Raises ConfigError when there are too few."""
    if sys.platform == "darwin":
        raise ConfigError("--pin: macOS has no pinning of processes. Leave --pin out.")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < num_ranks:
        raise ConfigError(f"--pin: {num_ranks} ranks but {len(cpus)} processors. Leave --pin out.")
    return tuple((cpu,) for cpu in cpus[:num_ranks])
