"""How near two ranks come to what dividing the experts could give at best: `python -m expertd.bench.bound`.

    python -m expertd.bench.bound CHECKPOINT [--kernels mlx] [--tokens 32] [--repeats 5] [--json FILE]

Method. Groups decode the same number of tokens, in turns: one rank on one core (T1 a token), one whose experts give
zeros at once (T0), and two ranks on a core each that divide the experts (T2). E = T1 - T0 is what experts cost, so
T1 - E/2 is what two ranks would take if dividing were free. T1 and T0 are taken twice: alone, the other core idle, and
beside another such rank that does the same on the other core. The second pays for what cores of one host share (clock,
cache, memory) and two machines would not, as the two ranks pay for it. Where they share what bounds them, which is the
memory for `--kernels native`, E/2 cannot be had from the first.

Also shown: how long rank 0 waited inside exchanges for the other. With an even top-k the halves are equal, so that is
what the speeds of the cores differed meanwhile, and the exchange itself.
"""

import argparse
import asyncio
import json
import statistics
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertd.bench.throughput import make_request, measure_speed, with_ranks
from expertd.checkpoint.locate import find_checkpoint
from expertd.cli.signals import run_until_signal
from expertd.cluster.supervisor import Cluster
from expertd.config import KERNELS, GroupConfig
from expertd.errors import ConfigError, ExpertdError
from expertd.topology.machine import describe_machine, own_cores, summarize

LIMIT = 1.05
WITHOUT_EXPERTS = "expertd.bench.no_experts"


def main() -> None:
    arguments = _parser().parse_args()
    try:
        folder = find_checkpoint(arguments.checkpoint)
        group = GroupConfig(str(folder), kernels=arguments.kernels)
        request, tokens = make_request("decode", folder, arguments.tokens)
        report = run_until_signal(_measure(group, request, arguments.repeats))
        report |= {"model": arguments.checkpoint, "tokens": tokens, "kernels": arguments.kernels}
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _print(report)
    except ExpertdError as e:
        sys.stderr.write(f"bench bound: {e}\n")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expertd.bench.bound", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--kernels", choices=KERNELS, default="mlx")
    parser.add_argument("--tokens", type=int, default=32, help="of a request")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--json", type=Path, help="figures go there")
    return parser


async def _measure(group: GroupConfig, request: dict[str, Any], repeats: int) -> dict[str, Any]:
    if len(cores := own_cores(2)) < 2:
        raise ConfigError("bench bound: wanted two cores of its own, on a system that can pin processes.")
    first, second = (replace(with_ranks(group, 1, "solo"), cpus=((core,),)) for core in cores)
    async with AsyncExitStack() as stack:

        async def opened(group: GroupConfig, module: str | None = None) -> Cluster:
            return await stack.enter_async_context(Cluster.open(group, module))

        full = [await opened(first), await opened(second)]
        empty = [await opened(first, WITHOUT_EXPERTS), await opened(second, WITHOUT_EXPERTS)]
        together = await opened(with_ranks(group, 2, "experts"))
        turns = {
            "one_rank": full[:1],
            "without_experts": empty[:1],
            "one_rank_beside": full,
            "without_experts_beside": empty,
            "two_ranks": [together],
        }
        taken, waited_ms = await _take_turns(turns, together, request, repeats)
    ms = {name: statistics.median(of_one) for name, of_one in taken.items()}
    alone, beside = (_bound(ms, suffix) for suffix in ("", "_beside"))
    return {
        "machine": describe_machine(),
        "ms_per_token": ms,
        "spread": {name: [min(of_one), max(of_one)] for name, of_one in taken.items()},
        "waited_ms": waited_ms,
        "bound_ms": {"alone": alone, "beside": beside},
        "ratio": {"alone": ms["two_ranks"] / alone, "beside": ms["two_ranks"] / beside},
        "met": ms["two_ranks"] <= LIMIT * beside,
    }


def _bound(ms: dict[str, float], suffix: str) -> float:
    return (ms[f"one_rank{suffix}"] + ms[f"without_experts{suffix}"]) / 2  # T1 - (T1 - T0) / 2


async def _take_turns(
    turns: dict[str, list[Cluster]], together: Cluster, request: dict[str, Any], repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Milliseconds per token by turn, and those that rank 0 of `together` waited per token.

    The clusters of a turn decode at the same time. The first round warms up; the order changes from round to round.
    """
    taken: dict[str, list[float]] = {name: [] for name in turns}
    waited = 0.0
    for number in range(repeats + 1):
        for name in list(turns) if number % 2 else list(reversed(turns)):
            clusters = turns[name]
            speeds = await asyncio.gather(*(measure_speed("decode", c, request) for c in clusters))
            if number:
                taken[name] += [1e3 / speed for speed in speeds]
        if not number:
            waited = together.record.waited_s
    waited = together.record.waited_s - waited
    return taken, 1e3 * waited / (repeats * request["max_tokens"])


def _print(report: dict[str, Any]) -> None:
    found, bounds, ratios = report["ms_per_token"], report["bound_ms"], report["ratio"]
    low, high = report["spread"]["two_ranks"]
    say = sys.stdout.write
    say(f"{summarize(report['machine'])}\n{report['model']}, kernels {report['kernels']}; ms a token\n")
    for name, suffix in (("alone", ""), ("beside", "_beside")):
        say(
            f"one rank {name:<7} {found[f'one_rank{suffix}']:.2f}, without experts "
            f"{found[f'without_experts{suffix}']:.2f}: two ranks could take {bounds[name]:.2f}\n"
        )
    say(
        f"two ranks take {found['two_ranks']:.2f} ({low:.2f} to {high:.2f}), in which rank 0 waited "
        f"{report['waited_ms']:.2f}: {ratios['alone']:.3f} of what alone allows, {ratios['beside']:.3f} of beside; "
        f"wanted at most {LIMIT}\n"
    )


if __name__ == "__main__":
    main()
