"""What the installed mlx-lm can load, found by reading its source: importing it would import MLX."""

import ast
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from expertd.errors import CheckpointError

MODULE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Family:
    """One model class of mlx-lm: its module's name, and the config keys that it takes and must have."""

    name: str
    accepted: frozenset[str]
    required: frozenset[str]


def find_family(model_type: str, architectures: tuple[str, ...] = ()) -> Family:
    """The mlx-lm family that serves `model_type`. Raises CheckpointError if there is none."""
    by_type, by_architecture = _remappings()
    name = next(
        (by_architecture[model_type, a] for a in architectures if (model_type, a) in by_architecture),
        by_type.get(model_type, model_type),
    )
    family = _read_family(name)
    if family is None:
        raise CheckpointError(
            f"config.json: model_type {model_type[:80]!r} is unknown to the installed mlx-lm. "
            "Choose a checkpoint of a family that mlx-lm serves (qwen3_moe, gpt_oss, deepseek_v3 ...)."
        )
    return family


@cache
def _read_family(name: str) -> Family | None:
    path = _mlx_lm_folder() / "models" / f"{name}.py"
    if not MODULE_NAME.fullmatch(name) or not path.is_file():
        return None
    classes = {node.name: node for node in _parse(path).body if isinstance(node, ast.ClassDef)}
    if "Model" not in classes or "ModelArgs" not in classes:
        return None
    fields = [
        (node.target.id, node.value is None)
        for node in classes["ModelArgs"].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    accepted = frozenset(name for name, _ in fields)
    return Family(name, accepted, frozenset(name for name, is_required in fields if is_required))


@cache
def _remappings() -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """mlx-lm's tables of other names for its families: by model type, and by model type and architecture."""
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in _parse(_mlx_lm_folder() / "utils.py").body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Dict)
        if node.targets[0].id in ("MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING")
    }
    return tables.get("MODEL_REMAPPING", {}), tables.get("MODEL_ARCHITECTURE_REMAPPING", {})


def _mlx_lm_folder() -> Path:
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "mlx-lm is not installed, which loads every model. Install it: pip install mlx-lm."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
