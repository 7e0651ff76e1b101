"""Our kernels on this processor beside MLX's own and beside the roof: `expertd bench kernels`.

Method. One process per number of threads, pinned to as many cores. It measures the roof (roofline.py), then each
matrix of the models in each format with 1, 4, 8 and 512 rows, then the roof again. Ours are called as C, MLX's as a
graph of one operation, on the same weights. They take turns in nine rounds, the order reversed every other one, so
that noise and drift hit both; medians are given. With one row, reading takes its turn as well: a share of the
read bandwidth is that of the best reading loop in the same round, and the rounds' median. Weights take at least 256 MiB
or 8 times the last cache, in copies that the calls go through, so that each reads its own from memory. `native` rounds
activations to 8 bits, `native-16` to 16. `error` is that of a few outputs beside float64, and a result of ours that is
wrong has no speed.

A point's roof is what the slower of two would take: reading its weights once at the best rate read from memory, and
its operations at the best rate in registers (of 8-bit integers for quantized weights, of floats for others). GB/s are
of weights; activations and results are left out. What MLX would need too long for is left out, and said.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertd.bench.kernels_side import Job
from expertd.bench.roofline import BUFFER_BYTES
from expertd.bench.shapes import SHAPES, find_shape
from expertd.errors import ClusterError, ConfigError
from expertd.topology.machine import describe_machine, huge_pages, own_cores, summarize, usable_cores

QUICK_SHAPES, QUICK_ROWS = ("qwen3-30b-a3b",), [1, 512]
WAYS = ("native", "native-16", "mlx")
# Decoding at these bits is to reach this share of the read bandwidth (issue 5).
GOAL, GOAL_FORMATS, GOAL_ROWS = 0.70, ("2 bits", "4 bits"), 1


def run(
    json_file: Path | None,
    plot_file: Path | None = None,
    quick: bool = False,
    threads: Sequence[int] = (),
    shapes: Sequence[str] = (),
) -> None:
    """Measure, print a table, write JSON and draw if asked.

    `threads` empty is 1 and 2, as far as there are cores; `shapes` empty is all. Raises ConfigError for what cannot be,
    ClusterError when a measurement fails.
    """
    if plot_file:
        check_picture(plot_file)
    report = measure([_job(n, quick, shapes) for n in check_threads(threads)])
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(format_report(report))
    if plot_file:
        draw(report, plot_file)


def check_threads(threads: Sequence[int]) -> list[int]:
    """The numbers of threads to measure. Raises ConfigError for more than there are cores."""
    cores = describe_machine()["cores"]
    for number in threads:
        if not 1 <= number <= cores:
            raise ConfigError(f"--threads {number}: wanted 1 to {cores}, the cores of this machine.")
    return list(threads) or [n for n in (1, 2) if n <= cores]


def _job(num_threads: int, quick: bool, shapes: Sequence[str]) -> Job:
    chosen: list[str | dict[str, Any]] = [find_shape(name).name for name in shapes]
    chosen = chosen or list(QUICK_SHAPES if quick else SHAPES)
    ours_s, mlx_s = (0.05, 0.1) if quick else (0.2, 0.4)
    return Job(
        num_threads=num_threads,
        cores=own_cores(num_threads),
        shapes=chosen,
        is_quick=quick,
        rows=QUICK_ROWS if quick else None,
        ours_s=ours_s,
        mlx_s=mlx_s,
        weight_bytes=0,
        roof_bytes=BUFFER_BYTES,
        roof_repeats=3 if quick else 10,
    )


def measure(jobs: list[Job]) -> dict[str, Any]:
    """One run per job, each in a process that has ended when this returns or raises."""
    runs = [_measure_one(job) for job in jobs]
    for found in runs:
        _compare(found)
    missing = {name: why for found in runs for name, why in found.pop("missing").items()}
    return {"machine": describe_machine(), "missing": missing, "runs": runs}


def _measure_one(job: Job) -> dict[str, Any]:
    command = [sys.executable, "-m", "expertd.bench.kernels_side", json.dumps(asdict(job))]
    environment = {**os.environ, **huge_pages(os.environ)}  # as a rank has it
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment
    )
    if done.returncode:
        raise ClusterError(f"{job.num_threads} threads: the measuring process ended with {done.returncode}.")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# The report.


def _compare(found: dict[str, Any]) -> None:
    """Add to each way how it stands to the roof and to MLX's."""
    roof = found["roof"]
    for row in found["rows"]:
        peak = roof["int8_gop_per_s" if row["format"].endswith("bits") else "float_gflop_per_s"]
        shortest_us = max(row["bytes"] / roof["read_gb_per_s"], row["operations"] / peak) / 1e3
        for way in row["ways"].values():
            way["of_roof"] = round(shortest_us / way["p50_us"], 4)
            if "mlx" in row["ways"]:
                way["of_mlx"] = round(row["ways"]["mlx"]["p50_us"] / way["p50_us"], 2)


def goal_of(found: dict[str, Any]) -> dict[str, Any] | None:
    """How decoding stands to its goal; None without figures of ours."""
    shares = [
        row["ways"]["native"]["of_bandwidth"]
        for row in found["rows"]
        if row["format"] in GOAL_FORMATS and row["rows"] == GOAL_ROWS and "native" in row["ways"]
    ]
    if not shares:
        return None
    met = sum(share >= GOAL for share in shares)
    return {"points": len(shares), "met": met, "lowest": min(shares), "median": statistics.median(shares)}


def format_report(report: dict[str, Any]) -> str:
    """The tables, for people."""
    lines = [summarize(report["machine"])]
    for found in report["runs"]:
        lines += ["", _roof_line(found), *_table(found)]
        if goal := goal_of(found):
            lines.append(
                f"native, {' and '.join(GOAL_FORMATS)}, {GOAL_ROWS} row: {goal['lowest']:.0%} of the read bandwidth at "
                f"least, {goal['median']:.0%} in the middle; goal {GOAL:.0%}: met at {goal['met']} of {goal['points']}"
            )
    lines += [f"{name}: not measured: {why}" for name, why in report["missing"].items()]
    if not usable_cores():
        lines.append("Not pinned: this system has no pinning.")
    return "\n".join(lines) + "\n"


def _roof_line(found: dict[str, Any]) -> str:
    roof = found["roof"]

    def best(unit: str) -> str:
        loops = roof["loops"][unit]
        return f"{roof[unit]:.1f} ({max(loops, key=lambda name: loops[name])})"

    return (
        f"{_threads(found)}: reads {best('read_gb_per_s')} GB/s, {roof['huge_pages_gb_per_s']:.1f} in huge pages; "
        f"{best('int8_gop_per_s')} Gop/s of 8 bits, {best('float_gflop_per_s')} GFLOP/s of floats"
    )


def _threads(found: dict[str, Any]) -> str:
    return f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"


def _table(found: dict[str, Any]) -> list[str]:
    names = [name for name in WAYS if any(name in row["ways"] for row in found["rows"])]
    titles = "".join(f" | {name:^22}" for name in names)
    units = "".join(f" | {'GB/s':>6} {'GFLOP/s':>7} {'roof':>7}" for _ in names)
    lines = [f"{'':54}{titles}", f"{'matrix':<32} {'format':<8} {'rows':>4} {'of MLX':>7}{units}"]
    model = None
    for row in found["rows"]:
        if row["models"] != model:
            model = row["models"]
            lines.append(", ".join(model))
        lines.append(_line(row, names))
    return lines


def _line(row: dict[str, Any], names: list[str]) -> str:
    size = f"{row['matrix']} {row['num_out']}x{row['width']}"
    ratio = row["ways"].get("native", {}).get("of_mlx")
    text = f"  {size:<30} {row['format']:<8} {row['rows']:>4} {f'{ratio:.1f}x' if ratio else '-':>7}"
    for name in names:
        way = row["ways"].get(name)
        if way:
            text += f" | {way['gb_per_s']:6.2f} {way['gflop_per_s']:7.1f} {way['of_roof']:7.1%}"
        else:
            text += f" | {'-':^22}"
    reasons = "; ".join(f"{name} {why}" for name, why in row["skipped"].items())
    return f"{text}  {reasons}".rstrip()


# The picture.

SUFFIXES = (".svg", ".png")
COLOURS = {"native": "tab:blue", "native-16": "tab:cyan", "mlx": "tab:orange"}
MARKERS = {"2 bits": "o", "4 bits": "s", "8 bits": "^", "bfloat16": "x", "float32": "+"}


def check_picture(path: Path) -> None:
    """Raises ConfigError when no picture can be drawn into `path`."""
    from expertd.quant.picture import check_picture

    check_picture(path)


def draw(report: dict[str, Any], path: Path) -> None:
    """A roofline chart per number of threads: operations per byte of weights against operations per second."""
    from matplotlib.figure import Figure

    runs = report["runs"]
    figure: Any = Figure(figsize=(7 * len(runs), 5), layout="constrained")
    for axes, found in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        _draw_roof(axes, found)
        for name in WAYS:
            for form, marker in MARKERS.items():
                rows = [r for r in found["rows"] if r["format"] == form and name in r["ways"]]
                x, y = [r["intensity"] for r in rows], [r["ways"][name]["gflop_per_s"] for r in rows]
                label = f"{name}, {form}" if rows else None
                axes.plot(x, y, marker, color=COLOURS[name], label=label, markersize=4, alpha=0.7)
        axes.set(xscale="log", yscale="log", title=_threads(found))
        axes.set(xlabel="operations per byte of weights", ylabel="operations per second, 10⁹")
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=150)


def _draw_roof(axes: Any, found: dict[str, Any]) -> None:
    intensities = [row["intensity"] for row in found["rows"]]
    low, high = min(intensities) / 2, max(intensities) * 2
    points = [low * (high / low) ** (i / 200) for i in range(201)]
    for unit, style in (("int8_gop_per_s", "-"), ("float_gflop_per_s", "--")):
        roof = [min(found["roof"][unit], found["roof"]["read_gb_per_s"] * x) for x in points]
        label = "roof, 8-bit integers" if style == "-" else "roof, floats"
        axes.plot(points, roof, style, color="black", linewidth=1, label=label)
