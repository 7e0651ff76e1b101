"""The picture of `expertd quality`: bits per layer, error per layer, and size against divergence.

matplotlib, the extra `plot`, is imported only when a picture is wanted; no window, no global state. The same figures
give the same SVG.
"""

import importlib.util
from pathlib import Path
from typing import Any

from expertd.errors import ConfigError
from expertd.quant.quality import Compared

SUFFIXES = (".svg", ".png")


def check_picture(path: Path) -> None:
    """Raises ConfigError when no picture can be drawn into `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: wanted a name that ends in {' or '.join(SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: no folder {path.absolute().parent}. Create it first.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: matplotlib is not installed. Run `pip install 'expertd[plot]'`.")


def draw(compared: Compared, path: Path) -> None:
    """Draw into `path`, an SVG or a PNG by its suffix. Raises ConfigError."""
    check_picture(path)
    import matplotlib
    from matplotlib.figure import Figure

    has_errors = compared.qualities[0].divergence is not None
    several = has_errors and len(compared.qualities) > 1
    # By default an SVG has a random salt in its ids, and the date.
    with matplotlib.rc_context({"svg.hashsalt": "expertd", "font.size": 9}):
        figure: Any = Figure(figsize=(4.6 * (1 + has_errors + several), 3.6), layout="constrained")
        axes = figure.subplots(1, 1 + has_errors + several, squeeze=False)[0]
        _draw_bits(axes[0], compared)
        if has_errors:
            _draw_errors(axes[1], compared)
        if several:
            _draw_sizes(axes[2], compared)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as e:
            raise ConfigError(f"--plot {path}: {e.strerror or e}. Check its folder.") from e


def _draw_bits(axes: Any, compared: Compared) -> None:
    width = 0.8 / len(compared.qualities)
    for place, (label, quality) in enumerate(zip(compared.labels, compared.qualities, strict=True)):
        x = [layer.index - 0.4 + (place + 0.5) * width for layer in quality.layers]
        axes.bar(x, [layer.bits_per_weight for layer in quality.layers], width, label=label)
    axes.set(xlabel="layer", ylabel="bits per weight", title="bits")
    _finish(axes)


def _draw_errors(axes: Any, compared: Compared) -> None:
    for label, quality in zip(compared.labels, compared.qualities, strict=True):
        found = [(layer.index, layer.relative_error) for layer in quality.layers]
        axes.plot(*zip(*found, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="layer", ylabel="relative error of its output", title="error", ylim=(0, None))
    _finish(axes)


def _draw_sizes(axes: Any, compared: Compared) -> None:
    for label, quality in zip(compared.labels, compared.qualities, strict=True):
        assert quality.divergence
        kl, error = quality.divergence.mean_kl, quality.divergence.kl_error
        axes.errorbar(quality.num_bytes / 1e6, kl, yerr=error, fmt="o", capsize=2, label=label)
    axes.set(xlabel="size (MB)", ylabel="mean KL (nats per token)", title="size against divergence")
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.xaxis.get_major_locator().set_params(integer=axes.get_xlabel() == "layer")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
