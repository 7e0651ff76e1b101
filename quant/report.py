"""report.html: what each block got and why, what it cost, and how good the result is.

The page is one file: no script, no font, no address; its policy lets a browser load nothing at all. Every string
in it comes from a checkpoint or a user and is escaped. It is drawn from a Facts, which is plain JSON: without
`seconds` it is the content of quantization_manifest.json too, and holds nothing that changes from run to run.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from jinja2 import Environment, StrictUndefined

from expertd.checkpoint.config import Config, family_of, num_experts, top_k
from expertd.checkpoint.sizes import size_in_words
from expertd.quant.budget import bytes_per_token
from expertd.quant.ewq import in_words
from expertd.quant.modules import ModuleInfo
from expertd.quant.recipe import Plan
from expertd.quant.settings import WHOLE, Settings

TEMPLATE = Path(__file__).with_name("report.html.jinja")
# Results do not depend on it, and manifests are compared.
NOT_RECORDED = ("threads",)


class ModelFacts(TypedDict):
    name: str
    family: str
    num_layers: int
    num_experts: int
    top_k: int
    num_parameters: int


class SizeFacts(TypedDict):
    """Bytes of the arrays before and after; `bytes_per_token` is what one token reads of the weights."""

    source_bytes: int
    num_bytes: int
    bits_per_weight: float
    bytes_per_token: int


class ThresholdFacts(TypedDict):
    mu: float
    sigma: float
    low: float


class BlockFacts(TypedDict):
    """recipe.BlockDecision; `z` is the score's distance from mu in standard deviations."""

    name: str
    layer: int | None
    num_weights: int
    entropy: float | None
    entropy_eps: float | None
    deficit: float | None
    score: float | None
    z: float | None
    bits: int
    num_bytes: int
    reason: str


class ModuleFacts(TypedDict):
    """One module that MLX could quantize. `bits` 16 and `group_size` None: it is as in the source, for `reason`."""

    path: str
    kind: str
    layer: int | None
    role: str
    shape: list[int]
    bits: int
    group_size: int | None
    num_bytes: int
    reason: str


class ExpertError(TypedDict):
    """The mean relative error of all experts of one projection, as effort and calibration text measure it."""

    layer: int
    projection: str
    relative_error: float


class Facts(TypedDict):
    model: ModelFacts
    settings: dict[str, Any]
    size: SizeFacts
    threshold: ThresholdFacts | None
    blocks: list[BlockFacts]
    modules: list[ModuleFacts]
    warnings: list[str]
    expert_errors: NotRequired[list[ExpertError]]
    # What `expertd quality --json` says; numbers and texts are shown, nested ones too, lists are not.
    quality: NotRequired[dict[str, Any]]
    # By stage, in the order in which they ran.
    seconds: NotRequired[dict[str, float]]


def make_facts(
    name: str,
    config: Config,
    source_bytes: int,
    modules: Sequence[ModuleInfo],
    plan: Plan,
    settings: Settings,
) -> Facts:
    """The facts of checkpoint `name` (normalised `config`) that are known before a weight is rounded."""
    num_weights = sum(m.num_weights for m in modules)
    experts_per_token = top_k(config)
    return Facts(
        model=ModelFacts(
            name=name,
            family=family_of(config).name,
            num_layers=len({m.layer for m in modules if m.layer is not None}),
            num_experts=num_experts(config),
            top_k=experts_per_token,
            num_parameters=num_weights,
        ),
        settings=_settings_facts(settings),
        size=SizeFacts(
            source_bytes=source_bytes,
            num_bytes=plan.num_bytes,
            bits_per_weight=8 * plan.num_bytes / num_weights,
            bytes_per_token=bytes_per_token(modules, plan.allocation, settings, experts_per_token),
        ),
        threshold=cast(ThresholdFacts, asdict(plan.threshold)) if plan.threshold else None,
        blocks=[cast(BlockFacts, {**asdict(b), "z": _z(b.score, plan)}) for b in plan.blocks],
        modules=[_module_facts(m, plan, settings) for m in modules if m.kind != "other"],
        warnings=list(plan.warnings),
    )


def _settings_facts(settings: Settings) -> dict[str, Any]:
    facts = {key: value for key, value in asdict(settings).items() if key not in NOT_RECORDED}
    facts["trunk"] = list(settings.trunk)
    facts["calibrate"] = settings.calibrate.name if settings.calibrate else None
    return facts


def _z(score: float | None, plan: Plan) -> float | None:
    if score is None or plan.threshold is None:
        return None
    return (score - plan.threshold.mu) / plan.threshold.sigma if plan.threshold.sigma else 0.0


def _module_facts(m: ModuleInfo, plan: Plan, settings: Settings) -> ModuleFacts:
    bits = plan.recipe.bits.get(m.path, WHOLE)
    return ModuleFacts(
        path=m.path,
        kind=m.kind,
        layer=m.layer,
        role=m.role,
        shape=list(m.shape),
        bits=bits,
        group_size=plan.recipe.group_sizes.get(m.path),
        num_bytes=m.num_bytes(bits, settings.group_size),
        reason=m.reason,
    )


def write_report(path: Path, facts: Facts) -> None:
    """Write the page; it loads nothing and runs nothing, whatever the strings in `facts` say."""
    # A name from JSON may hold half of a surrogate pair, which UTF-8 cannot.
    path.write_text(render(facts), encoding="utf-8", errors="replace")


def render(facts: Facts) -> str:
    """The page's text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": size_in_words, "bits": in_words, "figure": _figure}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        facts=facts,
        settings=[(key, _as_text(value)) for key, value in facts["settings"].items() if value is not None],
        picture=draw(facts["modules"]),
        exceptions=list(exceptions(facts)),
        errors=error_table(facts.get("expert_errors", [])),
        quality=list(flatten(facts.get("quality", {}))),
        seconds=facts.get("seconds", {}),
    )


def _figure(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _as_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Bar:
    """One bar of the picture, in its own units; `label` is read out and shown under the pointer."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    label: str


@dataclass(frozen=True)
class Picture:
    """Bits per weight, scales and biases included, of each layer's trunk and experts: `bars`, horizontal `lines`
    (height, bits) and `ticks` (middle, layer)."""

    width: float
    height: float
    bars: list[Bar]
    lines: list[tuple[float, int]]
    ticks: list[tuple[float, int]]


PLOT_WIDTH, PLOT_HEIGHT, LEFT, TOP = 720.0, 180.0, 28.0, 8.0


def draw(modules: Iterable[ModuleFacts]) -> Picture:
    """Two bars for each layer: its trunk, and its experts if it has any."""
    sizes: dict[int, dict[str, list[int]]] = {}
    for m in modules:
        if m["layer"] is not None:
            kind = "experts" if m["kind"] == "expert" else "trunk"
            total = sizes.setdefault(m["layer"], {}).setdefault(kind, [0, 0])
            total[0] += m["num_bytes"]
            total[1] += math.prod(m["shape"])
    bits = {layer: {k: 8 * n / max(w, 1) for k, (n, w) in of.items()} for layer, of in sorted(sizes.items())}
    highest = max([16.0, *(b for of in bits.values() for b in of.values())])
    step = PLOT_WIDTH / max(len(bits), 1)
    bars, ticks = [], []
    for place, (layer, of) in enumerate(bits.items()):
        for second, kind in enumerate(("trunk", "experts")):
            if kind in of:
                height = of[kind] / highest * PLOT_HEIGHT
                x = LEFT + (place + 0.1 + 0.4 * second) * step
                label = f"layer {layer}, {kind}: {of[kind]:.2f} bits per weight"
                bars.append(Bar(x, TOP + PLOT_HEIGHT - height, 0.4 * step, height, kind, label))
        if place % max(-(-len(bits) // 16), 1) == 0:
            ticks.append((LEFT + (place + 0.5) * step, layer))
    lines = [(TOP + PLOT_HEIGHT * (1 - b / highest), b) for b in (0, 2, 4, 8, 16)]
    return Picture(LEFT + PLOT_WIDTH, TOP + PLOT_HEIGHT + 20, bars, lines, ticks)


@dataclass(frozen=True)
class Odd:
    """Modules that did not get what the rest of their block or kind got."""

    what: str
    count: int
    num_bytes: int
    bits: int
    reason: str


def exceptions(facts: Facts) -> Iterator[Odd]:
    """Modules kept whole by role, then the matrices that got another level than their block."""
    kept: dict[tuple[str, str], list[int]] = {}
    for m in facts["modules"]:
        if m["kind"] == "kept":
            kept.setdefault((m["role"], m["reason"]), []).append(m["num_bytes"])
    for (role, reason), sizes in kept.items():
        yield Odd(role, len(sizes), sum(sizes), WHOLE, reason)
    levels = {b["layer"]: b["bits"] for b in facts["blocks"]}
    for m in facts["modules"]:
        level = levels.get(m["layer"], m["bits"])
        if m["kind"] == "trunk" and m["bits"] != level:
            reason = f"its block got {in_words(level)}; raised as there is room"
            yield Odd(m["path"], 1, m["num_bytes"], m["bits"], reason)


def error_table(errors: Sequence[ExpertError]) -> tuple[list[str], list[tuple[int, list[float | None]]]]:
    """Projections in the order of their first appearance, and for each layer one error per projection."""
    projections = list(dict.fromkeys(e["projection"] for e in errors))
    found = {(e["layer"], e["projection"]): e["relative_error"] for e in errors}
    layers = sorted({e["layer"] for e in errors})
    return projections, [(layer, [found.get((layer, p)) for p in projections]) for layer in layers]


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and text of every number and text, those of nested objects too."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key} ")
        elif isinstance(value, float):
            yield f"{prefix}{key}", f"{value:.5g}"
        elif isinstance(value, int | str):
            yield f"{prefix}{key}", str(value)
