"""How near two ranks come to what dividing the experts could give at best: `python -m expertd.bench.bound`.

    python -m expertd.bench.bound CHECKPOINT [--kernels mlx] [--tokens 32] [--repeats 5] [--json FILE]

Method. Three groups decode the same number of tokens, in turns: one rank on one core (T1 a token), one whose experts
give zeros at once (T0), and two ranks on a core each that divide the experts (T2). E = T1 - T0 is what experts cost,
so T1 - E/2 is what two ranks would take if dividing were free. Where ranks of one host share what bounds them, which
is the memory for `--kernels native`, E/2 cannot be had: two machines would not share it, so measure that with
`--kernels mlx` or with a checkpoint inside the cache.
"""

import argparse
import json
import statistics
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from expertd.bench.throughput import alternate, make_request, with_ranks
from expertd.checkpoint.locate import find_checkpoint
from expertd.cli.signals import run_until_signal
from expertd.cluster.supervisor import Cluster
from expertd.config import KERNELS, GroupConfig
from expertd.errors import ExpertdError
from expertd.topology.machine import describe_machine, summarize

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
    alone, together = with_ranks(group, 1, "solo"), with_ranks(group, 2, "experts")
    async with AsyncExitStack() as stack:
        clusters = [
            await stack.enter_async_context(Cluster.open(alone)),
            await stack.enter_async_context(Cluster.open(alone, WITHOUT_EXPERTS)),
            await stack.enter_async_context(Cluster.open(together)),
        ]
        speeds = await alternate("decode", clusters, request, repeats)
    t1, t0, t2 = (1e3 / statistics.median(of_one) for of_one in speeds)
    best = t1 - (t1 - t0) / 2
    return {
        "machine": describe_machine(),
        "ms_per_token": {"one_rank": t1, "without_experts": t0, "two_ranks": t2},
        "spread": {"one_rank": _spread(speeds[0]), "two_ranks": _spread(speeds[2])},
        "bound_ms": best,
        "ratio": t2 / best,
        "met": t2 <= LIMIT * best,
    }


def _spread(speeds: list[float]) -> list[float]:
    return [1e3 / max(speeds), 1e3 / min(speeds)]


def _print(report: dict[str, Any]) -> None:
    found, (low, high) = report["ms_per_token"], report["spread"]["two_ranks"]
    say = sys.stdout.write
    say(f"{summarize(report['machine'])}\n{report['model']}, kernels {report['kernels']}\n")
    say(
        f"one rank {found['one_rank']:.2f} ms a token, without experts {found['without_experts']:.2f}: "
        f"two ranks could take {report['bound_ms']:.2f}\n"
        f"two ranks take {found['two_ranks']:.2f} ({low:.2f} to {high:.2f}), {report['ratio']:.3f} of that; "
        f"wanted at most {LIMIT}\n"
    )


if __name__ == "__main__":
    main()
