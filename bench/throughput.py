"""Decode and prefill speed of every split, always beside one rank of the same machine.

Method. One rank alone (`solo`) stays loaded all the time; each split on each number of ranks is loaded beside
it in turn. Requests to the two alternate in rounds, the order reversed every other round, so that noise and
drift hit both; an idle group sleeps. Each rank is pinned to a core of its own, as one machine of the
group would be, solo to the first of them. Speeds are those that rank 0 reports for real requests,
greedy, with the end token ignored; each group serves one request unmeasured before. `ratio_to_solo` is the median of
the rounds' ratios, because a shared machine's clock may halve from one round to another; the row of solo pools all.

Several kernels ("native", "mlx") are measured alike: each has a solo of its own, beside which its splits are
measured, and the solos take turns with each other, too. `ratio_to_first` compares with the first one's solo.
"""

import asyncio
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertd.checkpoint.inspect import check_checkpoint
from expertd.cli.signals import run_until_signal
from expertd.cluster.supervisor import Cluster
from expertd.config import ACTIVATION_BITS, GroupConfig
from expertd.engine.messages import Done, Submit
from expertd.engine.text import Tokenizer
from expertd.errors import ClusterError, ConfigError
from expertd.topology.machine import describe_machine, own_cores, summarize

KINDS = ("decode", "prefill")
REQUEST_TIMEOUT_S = 600.0
DECODE_PROMPT = "Once upon a time"
SENTENCE = "The little bird saw a red ball in the tall grass and sang to the kind old dog. "

_request_ids = (f"bench-{n}" for n in itertools.count())


def run(
    kind: str,
    checkpoint: Path,
    ranks: list[int],
    splits: list[str],
    tokens: int,
    repeats: int,
    json_file: Path | None,
    kernels: Sequence[str] = ("auto",),
    activation_bits: int = ACTIVATION_BITS,
    name: str = "",
) -> None:
    """Measure tokens per second of `kind` ("decode" or "prefill"), print a table, write JSON if asked.

    `tokens` are new tokens per request for decode, prompt tokens for prefill. `kernels` and `activation_bits` are as
    GroupConfig has them, one row for each of the first; `name` is what the report calls the checkpoint, if not its
    folder. Raises ConfigError for what this checkpoint cannot do, ClusterError when a group fails; every process has
    then ended.
    """
    _check(kind, ranks, tokens, repeats)
    wanted = [(n, split) for n in ranks if n > 1 for split in splits if split != "solo"]
    request, tokens = make_request(kind, checkpoint, tokens)
    groups = [GroupConfig(str(checkpoint), kernels=k, activation_bits=activation_bits) for k in kernels]
    rows = run_until_signal(_measure(kind, groups, wanted, request, repeats))
    report = {
        "machine": describe_machine(),
        "model": name or str(checkpoint),
        "kind": kind,
        "tokens": tokens,
        "rows": rows,
    }
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    _print(report)


def _check(kind: str, ranks: list[int], tokens: int, repeats: int) -> None:
    if kind not in KINDS:
        raise ConfigError(f"{kind}: wanted one of {', '.join(KINDS)}.")
    if repeats < 1 or tokens < 2 or min(ranks, default=1) < 1:
        raise ConfigError(
            f"{tokens} tokens, {repeats} repeats: wanted at least 2 tokens (decode counts those after the "
            "first), 1 repeat and 1 rank."
        )


async def _measure(
    kind: str,
    groups: list[GroupConfig],
    wanted: list[tuple[int, str]],
    request: dict[str, Any],
    repeats: int,
) -> list[dict[str, Any]]:
    """The rows: each group's solo, then its splits. The groups differ in their kernels."""
    async with AsyncExitStack() as stack:
        solos = [await stack.enter_async_context(Cluster.open(with_ranks(g, 1, "auto"))) for g in groups]
        for _, split in wanted:
            _check_split(split, solos[0].ready.splits)
        by_themselves: list[list[float]] = [[]]
        if len(groups) > 1 or not wanted:
            by_themselves = await alternate(kind, solos, request, repeats)
        rows = []
        for group, solo, speeds in zip(groups, solos, by_themselves, strict=True):
            beside, splits = await _measure_splits(kind, group, wanted, solo, request, repeats)
            rows += [_row(kind, "solo", 1, solo, speeds + beside, speeds + beside), *splits]
            if len(groups) > 1:
                rows[-len(splits) - 1]["ratio_to_first"] = paired_ratio(speeds, by_themselves[0])
        return rows


async def _measure_splits(
    kind: str,
    group: GroupConfig,
    wanted: list[tuple[int, str]],
    solo: Cluster,
    request: dict[str, Any],
    repeats: int,
) -> tuple[list[float], list[dict[str, Any]]]:
    """The solo's speeds beside all splits, and the row of each split."""
    beside: list[float] = []
    rows = []
    for num_ranks, split in wanted:
        async with Cluster.open(with_ranks(group, num_ranks, split)) as cluster:
            alone, together = await alternate(kind, [solo, cluster], request, repeats)
        beside += alone
        rows.append(_row(kind, split, num_ranks, cluster, together, alone))
    return beside, rows


def with_ranks(group: GroupConfig, num_ranks: int, split: str) -> GroupConfig:
    """The same group with so many ranks, each pinned to a core of its own; every request reads its whole prompt."""
    cpus = tuple((core,) for core in own_cores(num_ranks))
    return replace(group, num_ranks=num_ranks, split=split, cpus=cpus, prefix_cache_bytes=0)


def _check_split(split: str, supported: list[str]) -> None:
    if split not in ("auto", *supported):
        raise ConfigError(
            f"--split {split}: this model's family supports {', '.join(supported)}. "
            "Choose one of these or `auto`."
        )


async def alternate(
    kind: str, clusters: list[Cluster], request: dict[str, Any], repeats: int
) -> list[list[float]]:
    """Tokens per second of each repeat, by cluster; the order of the clusters changes from round to round."""
    for cluster in clusters:
        await _ask(cluster, request)
    speeds: list[list[float]] = [[] for _ in clusters]
    for repeat in range(repeats):
        turn = list(zip(clusters, speeds, strict=True))
        for cluster, taken in turn if repeat % 2 == 0 else reversed(turn):
            taken.append(await measure_speed(kind, cluster, request))
    return speeds


async def measure_speed(kind: str, cluster: Cluster, request: dict[str, Any]) -> float:
    done = await _ask(cluster, request)
    if done.completion_tokens != request["max_tokens"]:
        raise ClusterError(
            f"{done.ranks} ranks gave {done.completion_tokens} tokens, wanted {request['max_tokens']}. "
            "This is a bug of expertd."
        )
    return done.decode_tokens_per_s if kind == "decode" else done.prefill_tokens_per_s


async def _ask(cluster: Cluster, request: dict[str, Any]) -> Done:
    submit = Submit(next(_request_ids), ignore_end=True, **request)
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S), aclosing(cluster.generate(submit)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return event
    except TimeoutError as e:
        raise ClusterError(f"no answer within {REQUEST_TIMEOUT_S:g} s. Ask for fewer tokens.") from e
    raise ClusterError("an answer has no end. This is a bug of expertd.")


# The request: the same for every group.


def make_request(kind: str, checkpoint: Path, tokens: int) -> tuple[dict[str, Any], int]:
    """Build a request of `tokens` tokens, and give how many it really has.

    Raises ConfigError when the context does not hold them.
    """
    info = check_checkpoint(checkpoint)
    tokenizer = Tokenizer(info.folder, info.config)
    others = len(tokenizer.encode(DECODE_PROMPT)) if kind == "decode" else 1
    if tokens + others > info.context_length:
        raise ConfigError(
            f"{tokens} tokens: with {others} more they exceed this model's context of "
            f"{info.context_length}. Ask for fewer."
        )
    if kind == "decode":
        return {"prompt": DECODE_PROMPT, "max_tokens": tokens}, tokens
    prompt = _fit_prompt(tokenizer, tokens)
    return {"prompt": prompt, "max_tokens": 1}, len(tokenizer.encode(prompt))


def _fit_prompt(tokenizer: Tokenizer, tokens: int) -> str:
    """A text of `tokens` tokens, or as few below as whole words allow."""
    words = list(itertools.islice(itertools.cycle(SENTENCE.split()), tokens))
    low, high = 0, len(words)  # no word has less than one token
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(tokenizer.encode(" ".join(words[:middle]))) <= tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    if not low:
        raise ConfigError(f"{tokens} tokens: not one word of the built-in text fits. Ask for more.")
    return " ".join(words[:low])


# The report.


def _row(
    kind: str, split: str, num_ranks: int, cluster: Cluster, speeds: list[float], alone: list[float]
) -> dict[str, Any]:
    return {
        "split": split,
        "ranks": num_ranks,
        "kernels": cluster.ready.kernels,
        "activation_bits": cluster.ready.activation_bits,
        "isa": cluster.ready.isa,
        f"{kind}_tokens_per_s": round(statistics.median(speeds), 2),
        "min": round(min(speeds), 2),
        "max": round(max(speeds), 2),
        "repeats": len(speeds),
        "ratio_to_solo": paired_ratio(speeds, alone),
        "pinned": bool(own_cores(num_ranks)),
    }


def paired_ratio(speeds: list[float], others: list[float]) -> float:
    """Of two that took turns: the median of what each round gives."""
    return round(statistics.median(a / b for a, b in zip(speeds, others, strict=True)), 4)


def _print(report: dict[str, Any]) -> None:
    kind, rows = report["kind"], report["rows"]
    say = sys.stdout.write
    say(f"{summarize(report['machine'])}\n{report['model']}, {report['tokens']} tokens per request\n")
    say(f"{'split':<10} {'ranks':>5}  {'kernels':<9}  {kind + ' tokens/s':>17}  ")
    say(f"{'min..max':>17}  {'of solo':>7}\n")
    for row in rows:
        spread = f"{row['min']:.1f}..{row['max']:.1f}"
        say(f"{row['split']:<10} {row['ranks']:>5}  {_kernels_of(row):<9}  ")
        say(f"{row[f'{kind}_tokens_per_s']:>17.1f}  {spread:>17}  {row['ratio_to_solo']:>6.2f}x")
        if row is not rows[0] and "ratio_to_first" in row:
            say(f"  {row['ratio_to_first']:.3g}x of solo by {_kernels_of(rows[0])}")
        say("\n")
    loose = sorted({row["ranks"] for row in rows if not row["pinned"]})
    if loose:
        say(f"Not pinned to cores (fewer cores than ranks, or a system without pinning): ranks {loose}.\n")


def _kernels_of(row: dict[str, Any]) -> str:
    """Such as "native/8": by kernels that round activations to 8 bits."""
    return f"{row['kernels']}/{row['activation_bits']}" if row["activation_bits"] else str(row["kernels"])
