"""A checkpoint at full precision to one with few bits per expert weight, by plain rounding (mx.quantize).

Theory of operation. mlx-lm's model class, built but never computed, says which modules there are; its
`sanitize` turns the file's names into the model's. All arrays stay lazy until each is rounded, written and
dropped, so the peak is about one stacked expert tensor, whatever the size of the model. Experts get the
fewest bits because they are most of the weights and each token reads few of them; routers keep 16 bits
because one wrong choice of expert costs more than all their bytes.
"""

import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from expertd.checkpoint.config import Config, write_config
from expertd.checkpoint.inspect import CheckpointInfo, check_checkpoint
from expertd.checkpoint.locate import WANTED_FILES
from expertd.checkpoint.source import LocalSource
from expertd.errors import ConfigError
from expertd.model.classes import Weights, build_model, is_switch
from expertd.quant.survey import survey
from expertd.quant.weights import SourceWeights
from expertd.quant.writer import Group, Progress, write_shards

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
ROUTERS = {"gate", "router"}
# Describe the source's weights, not those that we write.
NOT_COPIED = ("config.json", "model.safetensors.index.json", "hf_quant_config.json")


@dataclass(frozen=True)
class Recipe:
    """Which module gets how many bits, by module path. `indivisible` could not be cut into whole groups."""

    bits: dict[str, int]
    group_size: int
    indivisible: tuple[str, ...] = ()

    def settings(self, default_bits: int) -> Config:
        """The `quantization` entry of config.json: explicit for every module, as older releases of mlx-lm
        need."""
        base = {"group_size": self.group_size, "mode": "affine"}
        return {**base, "bits": default_bits, **{path: {**base, "bits": b} for path, b in self.bits.items()}}


@dataclass(frozen=True)
class Quantized:
    """What `quantize_checkpoint` wrote; `indivisible` are the modules left as they were, for want of whole
    groups."""

    folder: Path
    num_parameters: int
    num_bytes: int
    indivisible: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_parameters


def quantize_checkpoint(
    src: Path,
    dst: Path,
    experts_bits: int = 2,
    trunk_bits: int = 4,
    group_size: int = 64,
    progress: Progress | None = None,
) -> Quantized:
    """Write checkpoint `src` to the new folder `dst`, experts at `experts_bits`, the rest at `trunk_bits`.

    Routers, norms and biases keep their dtype, as does any tensor whose rows are no multiple of
    `group_size`. `progress(done_bytes, total_bytes, name)` counts written bytes. `dst` appears only when it
    is complete. Raises ConfigError for settings that cannot be and for a `dst` that is not empty,
    CheckpointError for a `src` that is damaged, unknown or quantized already.
    """
    check_settings(experts_bits, trunk_bits, group_size)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConfigError(f"{dst}: exists and is not an empty folder. Choose another, or delete it first.")
    info = check_checkpoint(src)
    model = build_model(info.config)
    weights = load_weights(model, info)
    recipe = make_recipe(model, experts_bits, trunk_bits, group_size)
    num_parameters = sum(array.size for array in weights.values())
    groups = deque(quantized_groups(weights, recipe))
    check_space(dst, sum(group.num_bytes for group in groups))
    with new_folder(dst) as folder:
        num_bytes = write_shards(folder, groups, num_parameters, progress)
        settings = recipe.settings(trunk_bits)
        write_config(folder, {**info.config, "quantization": settings, "quantization_config": settings})
        copy_texts(src, folder)
    return Quantized(dst, num_parameters, num_bytes, recipe.indivisible)


def check_settings(experts_bits: int, trunk_bits: int, group_size: int) -> None:
    """Raises ConfigError for bits or a group size that MLX has no kernels for."""
    for what, found, wanted in (
        ("expert bits", experts_bits, BITS),
        ("trunk bits", trunk_bits, BITS),
        ("group size", group_size, GROUP_SIZES),
    ):
        if found not in wanted:
            raise ConfigError(
                f"{what} {found}: MLX knows {', '.join(map(str, wanted))}. Choose one of these."
            )


def load_weights(model: Module, info: CheckpointInfo) -> Weights:
    """Every parameter of `model` by name, not computed yet but known to be finite. Raises CheckpointError."""
    source = LocalSource(str(info.folder), info.folder)
    survey(SourceWeights(model, source, info.config), ())
    return SourceWeights(model, source, info.config).take_lazy()


def make_recipe(model: Module, experts_bits: int, trunk_bits: int, group_size: int) -> Recipe:
    """Bits for every module that MLX can quantize, but for routers and single-output gates."""
    bits: dict[str, int] = {}
    indivisible: list[str] = []
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized") or is_router(path, module):
            continue
        if module.weight.shape[-1] % group_size:
            indivisible.append(path)
        else:
            bits[path] = experts_bits if is_switch(module) else trunk_bits
    return Recipe(dict(sorted(bits.items())), group_size, tuple(sorted(indivisible)))


def is_router(path: str, module: Module) -> bool:
    """Whether `module` scores experts, or is the one-output gate of a shared expert."""
    return not is_switch(module) and (bool(ROUTERS & set(path.split("."))) or module.weight.shape[-2] == 1)


def quantized_groups(weights: Weights, recipe: Recipe) -> Iterator[Group]:
    """What to write, tensor by tensor; empties `weights`."""
    for name in list(weights):
        array = weights.pop(name)
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in recipe.bits:
            yield Group(name, {name: array})
            continue
        packed, scales, biases = mx.quantize(array, recipe.group_size, recipe.bits[path])
        yield Group(name, {name: packed, f"{path}.scales": scales, f"{path}.biases": biases})


def check_space(dst: Path, num_bytes: int) -> None:
    """Raises ConfigError when the disk of `dst` has no room for `num_bytes`."""
    parent = next(folder for folder in dst.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < num_bytes:
        raise ConfigError(
            f"{dst}: needs {num_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB. Choose another disk."
        )


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A folder beside `dst` that takes its name when the block ends well, and vanishes when it does not."""
    workplace: Path | None = None
    try:
        dst.absolute().parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(mkdtemp(prefix=f".{dst.name}.", suffix=".partial", dir=dst.absolute().parent))
        folder = workplace / dst.name  # one deeper, as mkdtemp's own folder is closed to other users
        folder.mkdir()
        yield folder
        folder.replace(dst)
    except OSError as error:
        raise ConfigError(f"{dst}: cannot be written ({error.strerror or error}). Choose another.") from error
    finally:
        if workplace:
            shutil.rmtree(workplace, ignore_errors=True)


def copy_texts(src: Path, dst: Path) -> None:
    """Copy tokenizer, chat template and generation settings, never code or weights."""
    patterns: tuple[Any, ...] = tuple(p for p in WANTED_FILES if not p.endswith(".safetensors"))
    for path in sorted({path for pattern in patterns for path in src.glob(pattern)}):
        if path.name not in NOT_COPIED and path.is_file():
            shutil.copyfile(path, dst / path.name)
