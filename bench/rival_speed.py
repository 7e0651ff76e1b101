"""Decode and prefill beside llama.cpp, on one thread each and the same core: `python -m expertd.bench.rival_speed`.

Method. Two files of the same shape with random weights: ours in MLX's affine format, llama.cpp's as GGUF, in the
formats of its own that are nearest in bits: Q2_K (2.625 bits) beside 2 bits in groups of 64 (2.5), Q4_K beside 4 bits
(both 4.5), Q8_0 beside 8 bits (both 8.5). Each is loaded once, in a process of its own that is pinned to the same
core and sleeps while the other computes. Requests alternate in rounds, the order reversed every other one; each
serves one unmeasured before. Ours are the speeds that rank 0 reports for real requests, with sampling and what it
sends to the supervisor; llama.cpp's are taken around llama_decode and the choice of the likeliest token, without a
tokenizer, a server or a sampler. Weights are random, so each token goes to experts of its own, as it should.

llama.cpp comes from PyPI's llama-cpp-python, whose source is compiled for this processor into build/rivals, which
takes several minutes on every core.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from expertd.bench import throughput
from expertd.bench.random_checkpoint import (
    DEFAULT_LAYERS,
    DEFAULT_VOCABULARY,
    Bits,
    describe,
    make_random_checkpoint,
)
from expertd.bench.random_gguf import FORMATS, bytes_per_token, make_random_gguf
from expertd.bench.shapes import Shape, find_shape
from expertd.cli.signals import run_until_signal
from expertd.cluster.supervisor import Cluster
from expertd.config import ACTIVATION_BITS, GroupConfig
from expertd.errors import ClusterError, ConfigError, ExpertdError
from expertd.topology.machine import describe_machine, own_cores, summarize

FOLDER = Path("build/rivals")
REQUIREMENTS = ("llama-cpp-python",)
SIDE = Path(__file__).with_name("llama_side.py")
RIVAL = "llama.cpp"
INSTALL_TIMEOUT_S, LOAD_TIMEOUT_S, ANSWER_TIMEOUT_S = 7200.0, 300.0, 600.0
DECODE_GOAL, PREFILL_GOAL = 1.5, 1.0  # ours to llama.cpp's, at least


def main() -> None:
    arguments = _parser().parse_args()
    try:
        report = measure(
            find_shape(arguments.shape),
            arguments.layers,
            arguments.vocabulary,
            Bits(outer=arguments.outer_bits),
            {"decode": arguments.tokens, "prefill": arguments.prompt},
            arguments.repeats,
            arguments.kernels.split(","),
            arguments.activation_bits,
            interpreter(FOLDER),
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        sys.stdout.write(format_report(report))
    except ExpertdError as e:
        sys.stderr.write(f"bench rival_speed: {e}\n")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expertd.bench.rival_speed", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--shape", default="qwen3-30b-a3b", help="one of Qwen3's")
    parser.add_argument("--layers", type=int, default=DEFAULT_LAYERS)
    parser.add_argument("--vocabulary", type=int, default=DEFAULT_VOCABULARY)
    parser.add_argument("--outer-bits", type=int, default=8, help="of embedding and head: 2, 4 or 8")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a decode request")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill request")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--kernels", default="auto", help="of ours: native, mlx, or both with a comma between"
    )
    parser.add_argument(
        "--activation-bits", type=int, default=ACTIVATION_BITS, help="of ours, native: 8 or 16"
    )
    parser.add_argument("--json", type=Path, help="figures go there")
    return parser


# llama.cpp: its interpreter, its process.


def interpreter(folder: Path) -> Path:
    """The Python of a virtual environment in `folder` that has llama-cpp-python, made if it is not there.

    Raises ConfigError with pip's last words when that cannot be done.
    """
    python = folder / "venv" / "bin" / "python"
    if not has_llama_cpp(folder):
        sys.stderr.write(f"compiling llama-cpp-python into {folder}, which takes several minutes ...\n")
        folder.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(folder / "venv")])
        options = {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF")}
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-binary", REQUIREMENTS[0], *REQUIREMENTS]
        _run(pip, options)
    return python


def has_llama_cpp(folder: Path) -> bool:
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        return False
    # As llama_side.py would, for a build can fail to load where it was not made.
    return subprocess.run([str(python), "-c", "import llama_cpp"], capture_output=True).returncode == 0


def _run(command: list[str], more: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            env={**os.environ, **(more or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ConfigError(f"llama-cpp-python: {command[0]}: {e}. Leave this comparison out.") from e
    if done.returncode:
        last = " / ".join(done.stderr.strip().splitlines()[-3:])[:400]
        raise ConfigError(f"llama-cpp-python cannot be installed: {last}. Leave this comparison out.")


class _Rival:
    """A process of llama_side.py."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.about: dict[str, Any] = {}

    @classmethod
    @asynccontextmanager
    async def open(
        cls, python: Path, model: Path, cores: list[int], vocabulary: int
    ) -> AsyncIterator["_Rival"]:
        words = [str(SIDE), str(model), "1", ",".join(map(str, cores)), str(vocabulary)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            str(python), *words, stdin=pipe, stdout=pipe, process_group=0
        )
        try:
            rival = cls(process)
            rival.about = await rival._answer(LOAD_TIMEOUT_S)
            yield rival
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def speed(self, kind: str, tokens: int) -> float:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"kind": kind, "tokens": tokens}).encode() + b"\n")
        return float((await self._answer(ANSWER_TIMEOUT_S))["tokens_per_s"])

    async def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
        except TimeoutError as e:
            raise ClusterError(f"{RIVAL}: no answer within {timeout_s:g} s. Ask for fewer tokens.") from e
        if not line:
            raise ClusterError(f"{RIVAL}: its process ended with {await self._process.wait()}, see above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


# Measuring.


def measure(
    shape: Shape,
    num_layers: int,
    vocabulary: int,
    bits: Bits,
    tokens: dict[str, int],
    repeats: int,
    kernels: list[str],
    activation_bits: int,
    python: Path,
) -> dict[str, Any]:
    """Both kinds of request to ours (once per kernels) and to llama.cpp, all loaded; the report.

    Raises ConfigError for what cannot be, ClusterError when a process fails; all have then ended.
    """
    with tempfile.TemporaryDirectory(prefix="expertd-bench-") as scratch:
        ours, theirs = Path(scratch) / "checkpoint", Path(scratch) / "model.gguf"
        make_random_gguf(theirs, shape, num_layers, vocabulary, bits)
        make_random_checkpoint(ours, shape, num_layers, vocabulary, bits)
        read = {
            "expertd": _bytes_per_token(shape, num_layers, vocabulary, bits),
            RIVAL: bytes_per_token(shape, num_layers, vocabulary, bits),
        }
        asked = {kind: throughput.make_request(kind, ours, count) for kind, count in tokens.items()}
        speeds, about = run_until_signal(
            _measure(ours, theirs, vocabulary, asked, repeats, kernels, activation_bits, python)
        )
    return {
        "machine": describe_machine(),
        "model": describe(shape, num_layers, vocabulary, bits),
        "formats": {part: FORMATS[n].name for part, n in vars(bits).items()},
        RIVAL: about,
        "cores": own_cores(1),
        "tokens": {kind: count for kind, (_, count) in asked.items()},
        "mb_per_token": {name: round(size / 1e6, 1) for name, size in read.items()},
        "rows": _rows(speeds, read),
    }


def _bytes_per_token(shape: Shape, num_layers: int, vocabulary: int, bits: Bits) -> int:
    """What ours reads of the weights to decode one token: codes, scales and biases, and the router's bfloat16."""

    def affine(size: int, b: int) -> int:
        return size * b // 8 + size // 64 * 4

    attention = sum(affine(out * width, bits.trunk) for out, width in shape.attention.values())
    experts = 3 * shape.top_k * affine(shape.hidden * shape.intermediate, bits.experts)
    router = 2 * shape.hidden * shape.num_experts
    return num_layers * (attention + experts + router) + affine(vocabulary * shape.hidden, bits.outer)


async def _measure(
    ours: Path,
    theirs: Path,
    vocabulary: int,
    asked: dict[str, tuple[dict[str, Any], int]],
    repeats: int,
    kernels: list[str],
    activation_bits: int,
    python: Path,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Tokens per second by kind and name, and what llama.cpp says of itself."""
    cores = own_cores(1)
    async with AsyncExitStack() as stack:
        groups = [GroupConfig(str(ours), kernels=name, activation_bits=activation_bits) for name in kernels]
        named = zip(_names(kernels), groups, strict=True)
        clusters = {
            name: await stack.enter_async_context(Cluster.open(throughput.with_ranks(group, 1, "auto")))
            for name, group in named
        }
        rival = await stack.enter_async_context(_Rival.open(python, theirs, cores, vocabulary))
        speeds: dict[str, dict[str, list[float]]] = {}
        for kind, (request, count) in asked.items():
            found: dict[str, list[float]] = {name: [] for name in (*clusters, RIVAL)}
            for number in range(repeats + 1):
                for name in list(found) if number % 2 else list(reversed(found)):
                    if name == RIVAL:
                        speed = await rival.speed(kind, count)
                    else:
                        speed = await throughput.measure_speed(kind, clusters[name], request)
                    if number:  # the first round warms up
                        found[name].append(speed)
            speeds[kind] = found
        return speeds, rival.about


def _names(kernels: list[str]) -> list[str]:
    return ["expertd"] if len(kernels) == 1 else [f"expertd, {name}" for name in kernels]


# The report.


def _rows(speeds: dict[str, dict[str, list[float]]], read: dict[str, int]) -> list[dict[str, Any]]:
    rows = []
    for kind, found in speeds.items():
        rival = statistics.median(found[RIVAL])
        for name, taken in found.items():
            middle = statistics.median(taken)
            row = {
                "kind": kind,
                "name": name,
                "tokens_per_s": round(middle, 2),
                "min": round(min(taken), 2),
                "max": round(max(taken), 2),
                "repeats": len(taken),
                "ratio_to_llama_cpp": round(middle / rival, 3),
            }
            if kind == "decode":
                row["gb_per_s"] = round(middle * read[name.partition(",")[0]] / 1e9, 2)
            rows.append(row)
    return rows


def format_report(report: dict[str, Any]) -> str:
    """The table, for people."""
    formats = ", ".join(f"{part} {name}" for part, name in report["formats"].items())
    read = ", ".join(f"{name} {size:.1f} MB" for name, size in report["mb_per_token"].items())
    lines = [
        summarize(report["machine"]),
        report["model"],
        f"{RIVAL} (llama-cpp-python {report[RIVAL]['version']}): {formats}. Read per token: {read}.",
        f"{'':8} {'tokens':>6}  {'':<16} {'tokens/s':>9}  {'min..max':>17}  {'of llama.cpp':>12}  {'GB/s':>6}",
    ]
    for row in report["rows"]:
        spread = f"{row['min']:.1f}..{row['max']:.1f}"
        speed = f"{row.get('gb_per_s', ''):>6}"
        lines.append(
            f"{row['kind']:8} {report['tokens'][row['kind']]:>6}  {row['name']:<16} {row['tokens_per_s']:>9.1f}  "
            f"{spread:>17}  {row['ratio_to_llama_cpp']:>11.2f}x  {speed}"
        )
    where = (
        f"the same core, {report['cores'][0]}" if report["cores"] else "no core: this system has no pinning"
    )
    lines.append(
        f"One thread each, pinned to {where}. Wanted: decode {DECODE_GOAL}x, prefill {PREFILL_GOAL}x."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
