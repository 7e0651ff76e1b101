"""How far 2-bit experts drive the demo model from its full-precision self: ours beside others'.

    python -m expertd.bench.quality [--json FILE] [--seeds 1 2 3] [--rows NAME ...] [--llama-cpp] [--plot FILE]

Method. The reference is the demo's bfloat16 weights computed in float32. Every candidate has the same trunk, at
16 bits, so that only experts differ, and reads the same 120 windows of 192 tokens of the held-out text; the figure
is the mean KL divergence from the reference in nats per token. Calibrated candidates are made once per seed,
which chooses their 128 windows of 512 tokens from the calibration sample (training text); rivals get the same
windows. A row of the table is the mean over seeds, with the lowest and highest; ratios are to plain rounding at the
same group size. Rows are kept in the JSON file as they come, and one that is there already is not made again.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from expertd.bench import rivals
from expertd.bench.ggml import BITS as GGML_BITS
from expertd.bench.ggml import Ggml
from expertd.checkpoint.locate import find_checkpoint
from expertd.engine.text import Tokenizer
from expertd.errors import ConfigError, ExpertdError
from expertd.quant.evaluate import LocalReader, ReferenceRun, cut_windows, evaluate
from expertd.quant.metrics import Array
from expertd.quant.settings import Settings
from expertd.quant.windows import default_text, read_text, read_windows
from expertd.topology.machine import describe_machine, summarize

CALIBRATION = (128, 512)  # windows, tokens of each: the quantizer's default
SAME_TYPE = ("gate_proj", "up_proj", "down_proj")
LLAMA_CPP = {
    "Q2_K": dict.fromkeys(SAME_TYPE, "q2_K"),
    "IQ2_XXS/Q2_K": {"gate_proj": "iq2_xxs", "up_proj": "iq2_xxs", "down_proj": "q2_K"},
    "IQ2_XXS": dict.fromkeys(SAME_TYPE, "iq2_xxs"),
    "IQ2_XS": dict.fromkeys(SAME_TYPE, "iq2_xs"),
    "IQ2_S": dict.fromkeys(SAME_TYPE, "iq2_s"),
}


@dataclass(frozen=True)
class Row:
    """A way to make a checkpoint. `make(folder, seed)`; `is_seeded` when its result depends on the seed."""

    name: str
    expert_bits: float
    make: Callable[[Path, int], None]
    is_seeded: bool = False


@dataclass(frozen=True)
class Goal:
    """`name`'s mean KL is to be at most `limit` (wanted: `wanted`) times that of `rival`."""

    name: str
    rival: str
    limit: float
    wanted: float | None = None


def _goals(group: int) -> tuple[Goal, ...]:
    return (
        Goal(f"fast g{group}", f"plain g{group}", 0.70),
        Goal(f"normal g{group}", f"plain g{group}", 0.35, 0.30),
        Goal(f"best g{group}", f"plain g{group}", 0.25, 0.20),
        Goal(f"normal g{group}", f"gptq g{group}", 0.55),
    )


GOALS = (
    *_goals(64),
    *_goals(128),
    Goal("normal g64", "Q2_K", 0.75),
    Goal("normal g128", "IQ2_XXS/Q2_K", 0.75),
)


def main() -> None:
    arguments = _parser().parse_args()
    try:
        bench = Bench(arguments.json)
        bench.run(list(_chosen(bench.rows(arguments.llama_cpp), arguments.rows)), arguments.seeds)
        table = summarise(bench.results)
        _print(table)
        if arguments.plot:
            plot(table, arguments.plot)
    except ExpertdError as e:
        sys.stderr.write(f"bench quality: {e}\n")
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m expertd.bench.quality", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="keep the results here, and take those that are here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the calibration windows")
    parser.add_argument(
        "--rows", nargs="+", help="only rows whose names begin so, such as plain or 'normal g64'"
    )
    parser.add_argument(
        "--llama-cpp", action="store_true", help="llama.cpp's formats too: downloads and compiles its source"
    )
    parser.add_argument(
        "--plot", type=Path, help="a picture, size against KL (.png or .svg; needs matplotlib)"
    )
    return parser


def _chosen(rows: Sequence[Row], wanted: list[str] | None) -> Iterator[Row]:
    for row in rows:
        if not wanted or any(row.name.startswith(name) for name in wanted):
            yield row


class Bench:
    """The demo, its reference run and the rows measured so far (`results`, by row name and seed)."""

    def __init__(self, kept_at: Path | None) -> None:
        self._kept_at = kept_at
        self.original = rivals.Original(find_checkpoint("demo"))
        folder, config = self.original.info.folder, self.original.info.config
        self._tokenizer = Tokenizer(folder, config)
        self.windows = cut_windows((folder / "valid.txt").read_text(encoding="utf-8"), self._tokenizer)
        self.results: dict[str, Any] = self._read_kept()

    def rows(self, with_llama_cpp: bool) -> list[Row]:
        rows = [self._plain(2, 64), self._plain(2, 128), self._plain(3, 64), self._plain(4, 64)]
        rows += [self._gptq(group) for group in (64, 128)]
        rows += [self._ours(effort, group) for effort in ("fast", "normal", "best") for group in (64, 128)]
        if with_llama_cpp:
            ggml = Ggml(Path("build/llama-cpp"))
            rows += [self._llama_cpp(ggml, name) for name in LLAMA_CPP]
        return rows

    def run(self, rows: list[Row], seeds: list[int]) -> None:
        jobs = [(row, seed) for row in rows for seed in (seeds if row.is_seeded else [0])]
        missing = [(row, seed) for row, seed in jobs if _key(row, seed) not in self.results["rows"]]
        if not missing:
            return
        reader = LocalReader(self.original.info.folder, wide=True)
        with ReferenceRun(reader, self.windows) as reference:
            for row, seed in missing:
                self.results["rows"][_key(row, seed)] = self._measure(row, seed, reference)
                self._keep()

    def calibration(self, seed: int) -> Array:
        return read_windows(read_text(default_text()), self._tokenizer, *CALIBRATION, seed)

    def _measure(self, row: Row, seed: int, reference: ReferenceRun) -> dict[str, Any]:
        sys.stderr.write(f"{_key(row, seed)} ...\n")
        with tempfile.TemporaryDirectory() as scratch:
            folder, start_s = Path(scratch) / "made", time.monotonic()
            row.make(folder, seed)
            make_s = time.monotonic() - start_s
            quality = evaluate(folder, self.windows, reference, wide=True)
        return {
            "name": row.name,
            "seed": seed,
            "expert_bits": row.expert_bits,
            "make_s": round(make_s, 1),
            "evaluate_s": round(quality.seconds, 1),
            "perplexity": quality.perplexity,
            **asdict(quality.divergence),  # type: ignore[arg-type]
            "relative_error": [layer.relative_error for layer in quality.layers],
            "router_agreement": [layer.router_agreement for layer in quality.layers],
        }

    def _plain(self, bits: int, group: int) -> Row:
        name = f"plain g{group}" if bits == 2 else f"plain {bits}-bit g{group}"
        return Row(
            name, bits + 32 / group, lambda folder, _: rivals.plain(self.original, folder, bits, group)
        )

    def _ours(self, effort: Literal["fast", "normal", "best"], group: int) -> Row:
        def make(folder: Path, seed: int) -> None:
            windows, tokens = CALIBRATION
            settings = Settings(
                effort,
                group_size=group,
                trunk=(16,),
                seed=seed,
                num_windows=windows,
                window_tokens=tokens,
            )
            rivals.ours(self.original, folder, settings)

        return Row(f"{effort} g{group}", 2 + 32 / group, make, is_seeded=effort != "fast")

    def _gptq(self, group: int) -> Row:
        def make(folder: Path, seed: int) -> None:
            rivals.gptq(self.original, folder, 2, group, self.calibration(seed))

        return Row(f"gptq g{group}", 2 + 32 / group, make, is_seeded=True)

    def _llama_cpp(self, ggml: Ggml, name: str) -> Row:
        types = LLAMA_CPP[name]

        def make(folder: Path, seed: int) -> None:
            rivals.llama_cpp(self.original, folder, ggml, types, self.calibration(seed))

        return Row(name, sum(GGML_BITS[kind] for kind in types.values()) / len(types), make, is_seeded=True)

    def _protocol(self) -> dict[str, Any]:
        """What results must share to be compared."""
        return {
            "windows": list(self.windows.shape),
            "calibration": list(CALIBRATION),
            "mlx": describe_machine()["mlx"],
        }

    def _read_kept(self) -> dict[str, Any]:
        fresh = {"machine": describe_machine(), "protocol": self._protocol(), "rows": {}}
        if self._kept_at is None or not self._kept_at.exists():
            return fresh
        try:
            kept: dict[str, Any] = json.loads(self._kept_at.read_text(encoding="utf-8"))
            is_same = kept["protocol"] == fresh["protocol"] and isinstance(kept["rows"], dict)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"--json {self._kept_at}: holds no results of this bench. Delete it or name another file."
            ) from error
        if not is_same:
            raise ConfigError(
                f"--json {self._kept_at}: its results were measured otherwise ({kept['protocol']}, "
                f"now {fresh['protocol']}). Delete it or name another file."
            )
        return kept

    def _keep(self) -> None:
        if self._kept_at:
            part = self._kept_at.with_suffix(".partial")
            part.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
            part.replace(self._kept_at)


def _key(row: Row, seed: int) -> str:
    return f"{row.name} seed {seed}" if row.is_seeded else row.name


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """One line per row name, means over seeds, in ascending order of KL; the goals whose two rows are there."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in results["rows"].values():
        by_name.setdefault(result["name"], []).append(result)
    lines = {name: _line(name, found) for name, found in by_name.items()}
    for line in lines.values():
        plain = lines.get(f"plain g{'128' if line['expert_bits'] == 2.25 else '64'}")
        line["of_plain"] = line["mean_kl"] / plain["mean_kl"] if plain else None
    goals = [
        {**asdict(goal), "found": lines[goal.name]["mean_kl"] / lines[goal.rival]["mean_kl"]}
        for goal in GOALS
        if goal.name in lines and goal.rival in lines
    ]
    ordered = sorted(lines.values(), key=lambda line: -float(line["mean_kl"]))
    return {"machine": results["machine"], "lines": ordered, "goals": goals}


def _line(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    line: dict[str, Any] = {"name": name, "expert_bits": found[0]["expert_bits"], "num_seeds": len(found)}
    for figure in ("mean_kl", "p95_kl", "p99_kl", "top1_agreement", "ppl_ratio", "ppl_ratio_error", "make_s"):
        line[figure] = sum(result[figure] for result in found) / len(found)
    all_kl = [result["mean_kl"] for result in found]
    return {**line, "lowest_kl": min(all_kl), "highest_kl": max(all_kl)}


def _print(table: dict[str, Any]) -> None:
    print(summarize(table["machine"]))
    print(
        "\n| experts | bits/weight | mean KL | lowest-highest | of plain | p99 KL | top-1 | PPL ratio | made in, s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for line in table["lines"]:
        spread = f"{line['lowest_kl']:.4f}-{line['highest_kl']:.4f}" if line["num_seeds"] > 1 else ""
        of_plain = f"{line['of_plain']:.2f}" if line["of_plain"] else ""
        print(
            f"| {line['name']} | {line['expert_bits']:.4g} | {line['mean_kl']:.4f} | {spread} | {of_plain} | "
            f"{line['p99_kl']:.3f} | {line['top1_agreement']:.3f} | "
            f"{line['ppl_ratio']:.4f} ± {line['ppl_ratio_error']:.4f} | {line['make_s']:.0f} |"
        )
    for goal in table["goals"]:
        wanted = f", wanted {goal['wanted']:.2f}" if goal["wanted"] else ""
        verdict = "met" if goal["found"] <= goal["limit"] else "MISSED"
        print(
            f"{goal['name']} / {goal['rival']}: {goal['found']:.3f}, at most {goal['limit']:.2f}{wanted}: {verdict}"
        )


def plot(table: dict[str, Any], path: Path) -> None:
    """Size against KL, one point per row. Raises ConfigError without matplotlib."""
    try:
        from matplotlib import figure
    except ImportError as error:
        raise ConfigError("--plot: needs matplotlib. Run `pip install 'expertd[plot]'`.") from error
    picture = figure.Figure(figsize=(8, 5), layout="constrained")
    axes = picture.subplots()
    for line in table["lines"]:
        axes.plot(line["expert_bits"], line["mean_kl"], "o")
        axes.annotate(
            line["name"],
            (line["expert_bits"], line["mean_kl"]),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(
        xlabel="bits per expert weight", ylabel="mean KL to full precision, nats per token", yscale="log"
    )
    picture.savefig(path)


if __name__ == "__main__":
    main()
