"""The parameters of a model out of a checkpoint's files, one at a time, in the model's names and layout.

Theory of operation. MLX's arrays are lazy: `mx.load` reads headers only, and everything that `widen` and the
family's `sanitize` do to the arrays only grows a graph. So all parameters of a model of any size can be had at
once, as promises; their names, shapes and dtypes are known, and a checkpoint that does not fit the model is
refused before a byte of it is read. `take` computes them one after the other and forgets each, so that the peak
is about the largest tensor and what it is made of.

Which source tensors a parameter needs is read off its graph: MLX can print it, and its leaves are the `Load`s of
the files. So nothing here knows what a family's `sanitize` does.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from expertd.checkpoint.config import Config
from expertd.checkpoint.source import Source
from expertd.errors import CheckpointError
from expertd.model.classes import Weights, is_switch
from expertd.quant.finite import Span, check_finite
from expertd.quant.formats import find_stored, float_formats, refuse_quantized, widen, widen_sanitized

LOAD = re.compile(r'\{ (\d+) \[label ="Load"')
EXPERT = re.compile(r"(.+\.experts\.)\d+(\..+)")
LOADED = re.compile(r'(\d+) -> "S:(\d+)"')
MAX_NAMED = 1000  # MLX's bindings take no more than 1024 keyword arguments


class SourceWeights:
    """The parameters of `model` from `source`, not computed until they are taken.

    `names` are in the model's own order, so that those of a layer stand together; `expert_names` are those of
    the routed experts, `num_parameters` counts single numbers, widened. Raises CheckpointError, which
    names the tensor, for a format that cannot be widened and for tensors that are not just the model's. Costs
    the headers' reading only.
    """

    def __init__(self, model: Module, source: Source, config: Config) -> None:
        entries = {name: entry for shard in source.shards.values() for name, entry in shard.items()}
        refuse_quantized(source.folder, config, entries)
        stored = find_stored(source.folder, entries)
        loaded = load(source)
        parameters = dict(tree_flatten(model.parameters()))
        arrays = widen(source.folder, loaded, stored, config)
        check_alike(source.folder, arrays)
        arrays = arrange(model, source.folder, arrays)
        arrays = widen_sanitized(source.folder, arrays, parameters)
        check_fit(source.folder, arrays, parameters)
        self.source = source
        self.names = tuple(parameters)
        self.expert_names = frozenset(_expert_names(model))
        self.num_parameters = sum(array.size for array in arrays.values())
        self._shapes = {name: array.shape for name, array in arrays.items()}
        self._dtypes = {name: array.dtype for name, array in arrays.items()}
        self._arrays = arrays
        self._needs = find_needs(source, arrays, loaded)
        self._uses = Counter(tensor for needs in self._needs.values() for tensor in needs)
        self._formats = float_formats(entries, stored.values())
        self._files = {name: file for file, shard in source.shards.items() for name in shard}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> mx.Dtype:
        return self._dtypes[name]

    def needs(self, name: str) -> tuple[str, ...]:
        """The source tensors that parameter `name` is made of, sorted."""
        return self._needs[name]

    def spans(self, tensors: Iterable[str]) -> list[Span]:
        """Where the values of these source tensors lie, in the order of the files."""
        found = [
            Span(
                self.source.folder / self._files[name],
                name,
                self._formats[name],
                self.source.shards[self._files[name]][name],
            )
            for name in tensors
        ]
        return sorted(found, key=lambda span: (span.path, span.entry.begin))

    def take(self, names: Sequence[str]) -> Weights:
        """The parameters `names`, computed one after the other. Each can be taken once; drop what you got.

        Raises CheckpointError for values of a remote source that are not finite (those of a local one are
        checked by `survey`), and for what `source.fetch` raises.
        """
        wanted = sorted({tensor for name in names for tensor in self._needs[name]})
        self.source.fetch(wanted)
        if self.source.is_remote:
            check_finite(self.spans(wanted))
        return {name: self._compute(name) for name in names}

    def begin(self, name: str) -> None:
        """Have parameter `name` of a local source computed meanwhile: it is the next to be taken."""
        if not self.source.is_remote:
            mx.async_eval(self._arrays[name])  # type: ignore[no-untyped-call]

    def _compute(self, name: str) -> mx.array:
        array = self._arrays.pop(name)
        mx.eval(array)
        mx.clear_cache()
        self._uses.subtract(self._needs[name])
        self.source.release([tensor for tensor in self._needs[name] if not self._uses[tensor]])
        return array


def load(source: Source) -> Weights:
    """All tensors of the source, lazy; reads the files' headers. Raises CheckpointError."""
    weights: Weights = {}
    for file in sorted(source.shards):
        try:
            weights.update(mx.load(str(source.folder / file)))  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{source.folder / file}: MLX cannot read it ({str(error)[:120]}). Download it again."
            ) from error
    return weights


def arrange(model: Module, folder: Path, weights: Weights) -> Weights:
    """`weights` by the model's names and in its layout, still lazy; empties `weights`.

    Raises CheckpointError when the family's `sanitize` cannot do it.
    """
    try:
        return dict(model.sanitize(weights)) if hasattr(model, "sanitize") else weights
    except Exception as error:  # mlx-lm assumes complete checkpoints: a missing tensor is a KeyError here
        raise CheckpointError(
            f"{folder}: mlx-lm cannot arrange the weights ({type(error).__name__}: {str(error)[:120]}). "
            "Download the checkpoint again."
        ) from error


def check_alike(folder: Path, weights: Weights) -> None:
    """Raises CheckpointError for the expert whose tensor has not the shape of the others', which are stacked."""
    groups: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
    for name in sorted(weights):
        if match := EXPERT.fullmatch(name):
            groups.setdefault(match.groups(), {})[name] = weights[name].shape
    for shapes in groups.values():
        wanted = Counter(shapes.values()).most_common(1)[0][0]
        if odd := next((name for name, shape in shapes.items() if shape != wanted), None):
            raise CheckpointError(
                f"{folder}: tensor {odd!r} has shape {list(shapes[odd])}, wanted {list(wanted)} as for the other "
                "experts. Download the checkpoint again."
            )


def check_fit(folder: Path, weights: Weights, parameters: Weights) -> None:
    """Raises CheckpointError unless `weights` are just the model's parameters, shapes too, all floats."""
    for name in sorted(parameters.keys() - weights.keys()):
        raise CheckpointError(f"{folder}: lacks tensor {name!r} of the model. Download the checkpoint again.")
    for name in sorted(weights.keys() - parameters.keys()):
        raise CheckpointError(
            f"{folder}: tensor {name!r} is none of the model's. Check config.json's model_type."
        )
    for name, array in weights.items():
        if array.shape != parameters[name].shape:
            raise CheckpointError(
                f"{folder}: tensor {name!r} has shape {list(array.shape)}, "
                f"wanted {list(parameters[name].shape)}. Download the checkpoint again."
            )
        if not mx.issubdtype(array.dtype, mx.floating):
            raise CheckpointError(
                f"{folder}: tensor {name!r} holds {array.dtype}, wanted floats: it is quantized already, "
                "in a way that expertd cannot undo. Give the full-precision checkpoint instead."
            )


def find_needs(source: Source, weights: Weights, loaded: Weights) -> dict[str, tuple[str, ...]]:
    """The source tensors that each of `weights` is computed from. `loaded` are all source tensors, lazy.

    Raises CheckpointError when the bytes of a remote source were used before they were fetched.
    """
    by_load = _names_of_loads(loaded)
    if source.is_remote and len(by_load) < len(loaded):
        early = min(loaded.keys() - set(by_load.values()))
        raise CheckpointError(
            f"{source.folder}: mlx-lm reads tensor {early!r} of this family while it arranges the weights, "
            "which needs a checkpoint on a local disk. Download it, and give the folder."
        )
    return {name: tuple(sorted({by_load[load] for load in _loads(array)})) for name, array in weights.items()}


def _names_of_loads(loaded: Weights) -> dict[str, str]:
    """The number that MLX prints for each `Load` -> the name of what it loads; not of what is computed already."""
    names = list(loaded)
    found: dict[str, str] = {}
    for start in range(0, len(names), MAX_NAMED):
        part = names[start : start + MAX_NAMED]
        graph = _graph({f"S:{index}": loaded[name] for index, name in enumerate(part)})
        found |= {match[1]: part[int(match[2])] for match in LOADED.finditer(graph)}
    return found


def _loads(array: mx.array) -> set[str]:
    return set(LOAD.findall(_graph({"wanted": array})))


def _graph(arrays: Mapping[str, mx.array]) -> str:
    text = io.StringIO()
    mx.export_to_dot(text, **arrays)
    return text.getvalue()


def _expert_names(model: Module) -> Iterable[str]:
    for path, module in model.named_modules():
        if is_switch(module):
            yield from (f"{path}.{leaf}" for leaf in dict(tree_flatten(module.parameters())))
