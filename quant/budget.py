"""How large the result may be, and who gives or gets bits until it is.

Theory of operation. Sizes are those of the arrays that are written, to the byte; file headers and the tokenizer
are not counted. The solver starts from what EWQ decided. Over the target it goes through the blocks in
ascending order of score, again and again, each time one level of the menu down, until the sum fits; then the
embeddings and at last the head go from 8 bits to 4. Under the target it does the same upwards, in descending order,
passing over what does not fit, and spends what is left on single matrices: the one whose next level takes
away the most error per byte comes first. Equal scores are told apart by the execution index: the later block
is lowered first and raised last. Nothing depends on time, threads or the order of dictionaries.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from expertd.checkpoint.sizes import cache_bytes, size_in_words
from expertd.errors import ConfigError
from expertd.quant.modules import ModuleInfo
from expertd.quant.settings import GROUP_SIZES, TRUNK_MENU, WHOLE, Settings

# Embeddings and head: 8 bits cost them next to nothing, and the head alone hurts more than a layer does.
OUTER_BITS = 8
LAST_RESORT_BITS = 4

# The share of a Mac's memory that Metal lets the GPU keep by default, at the low end of what is reported:
# 10.67 of 16 GB (exo PR 1672), 48 of 64 GB (llama.cpp issue 1870); 107.5 of 128 GB on newer systems (ds4 PR
# 893). `sysctl iogpu.wired_limit_mb` raises it.
LARGE_MACHINE_BYTES = 36 * 10**9
# Room beside the weights: a cache of this many tokens, all layers at full attention, 16 bits ...
CACHE_TOKENS = 32_768
# ... and activations, MLX's buffer cache and Python: 512 tokens per prefill step through a block 16 KiB wide
# with 8 experts each make about 0.2 GB per array, and a handful are alive at a time.
ACTIVATION_BYTES = 2 * 10**9

# The error that rounding a module to so many bits makes: an absolute, weighted squared error.
ErrorOf = Callable[[str, int], float]


@dataclass
class Allocation:
    """Bits by layer, by path for what lies outside the layers, and by path for single matrices of a layer."""

    blocks: dict[int, int]
    outer: dict[str, int]
    single: dict[str, int] = field(default_factory=dict)

    def bits(self, module: ModuleInfo, experts_bits: int) -> int:
        if module.kind == "expert":
            return experts_bits
        if module.kind in ("embedding", "head"):
            return self.outer[module.path]
        if module.kind != "trunk" or module.layer is None:
            return WHOLE
        return self.single.get(module.path, self.blocks[module.layer])

    def copy(self) -> "Allocation":
        return Allocation(dict(self.blocks), dict(self.outer), dict(self.single))


def target_bytes(settings: Settings, config: dict[str, Any]) -> int | None:
    """What the weights may take, or None when there is no limit. Raises ConfigError for too small a machine.

    For a machine: 75 % of its memory, two thirds below 36 GB, less a cache of up to 32,768 tokens (fewer if the
    model's context is shorter) and 2 GB for activations.
    """
    if settings.fit_bytes is None:
        return settings.target_bytes
    share = 0.75 if settings.fit_bytes >= LARGE_MACHINE_BYTES else 2 / 3
    room = cache_bytes(config, CACHE_TOKENS) + ACTIVATION_BYTES
    if (target := int(settings.fit_bytes * share) - room) > 0:
        return target
    raise ConfigError(
        f"--fit {size_in_words(settings.fit_bytes)}: the GPU may use "
        f"{size_in_words(int(settings.fit_bytes * share))} of it, and cache and activations need "
        f"{size_in_words(room)}. Choose a larger machine, or give --target-bytes."
    )


def total_bytes(modules: Iterable[ModuleInfo], allocation: Allocation, settings: Settings) -> int:
    """The bytes of all arrays as they are written."""
    return sum(m.num_bytes(allocation.bits(m, settings.experts_bits), settings.group_size) for m in modules)


def bytes_per_token(
    modules: Sequence[ModuleInfo], allocation: Allocation, settings: Settings, top_k: int
) -> int:
    """The bytes of weights that one token reads: the trunk, `top_k` experts of each layer, the head, and one row
    of the embedding (all of it where it is the head as well)."""
    is_tied = not any(m.kind == "head" for m in modules)
    total = 0
    for m in modules:
        size = m.num_bytes(allocation.bits(m, settings.experts_bits), settings.group_size)
        if m.num_experts:
            size = size * min(top_k, m.num_experts) // m.num_experts
        elif m.kind == "embedding" and not is_tied:
            size //= m.shape[0]
        total += size
    return total


def fit_to(
    target: int,
    modules: Sequence[ModuleInfo],
    ascending: Sequence[int],
    start: Allocation,
    settings: Settings,
    error_of: ErrorOf | None = None,
) -> Allocation:
    """`start` with bits moved until the arrays take at most `target` bytes, and as nearly that as can be.

    `ascending` are the layers in ascending order of score, of equal ones the last first.
    Raises ConfigError, with the smallest size that there is, when nothing fits.
    """
    solver = Solver(target, modules, start.copy(), settings)
    if solver.room < 0:
        solver.demote(ascending)
    else:
        solver.promote(ascending[::-1])
    if error_of:
        solver.promote_single(error_of)
    return solver.allocation


class Solver:
    """One search: `allocation` as it stands, and `room`, the bytes that are left (or, negative, too many)."""

    def __init__(
        self, target: int, modules: Sequence[ModuleInfo], allocation: Allocation, settings: Settings
    ) -> None:
        self.allocation = allocation
        self._target, self._modules, self._settings = target, modules, settings
        self.room = target - total_bytes(modules, allocation, settings)
        self._trunk: dict[int, list[ModuleInfo]] = {}
        for m in modules:
            if m.kind == "trunk" and m.layer is not None:
                self._trunk.setdefault(m.layer, []).append(m)

    def demote(self, ascending: Sequence[int]) -> None:
        """Levels down until there is room. Raises ConfigError when the lowest is too much."""
        for layer, bits in self._rounds(ascending, self._settings.trunk[::-1]):
            if self.room >= 0:
                return
            self._set_block(layer, bits)
        for m in sorted(self._outer(), key=lambda m: (m.kind != "embedding", m.path)):
            if self.room >= 0:
                return
            self.room += self._bytes(m, self.allocation.outer[m.path]) - self._bytes(m, LAST_RESORT_BITS)
            self.allocation.outer[m.path] = LAST_RESORT_BITS
        if self.room < 0:
            raise self._too_small()

    def promote(self, descending: Sequence[int]) -> None:
        """Levels up for every block whose next one fits."""
        for layer, bits in self._rounds(descending, self._settings.trunk):
            old = self.allocation.blocks[layer]
            if self._block_bytes(layer, bits) - self._block_bytes(layer, old) <= self.room:
                self._set_block(layer, bits)

    def promote_single(self, error_of: ErrorOf) -> None:
        """Levels up for single matrices, by error taken away per byte, until no more fits."""
        candidates = [c for m in self._all_trunk() if (c := self._candidate(m, error_of))]
        while candidates:
            best = min(candidates, key=lambda c: (-c.gain, c.module.path))
            candidates.remove(best)
            if best.cost > self.room:
                continue
            self.room -= best.cost
            self.allocation.single[best.module.path] = best.bits
            if following := self._candidate(best.module, error_of):
                candidates.append(following)

    def _rounds(self, order: Sequence[int], levels: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Layer and next level, a level at a time through all layers of `order`; a level that the caller does
        not take is not passed."""
        for _ in levels[1:]:
            for layer in order:
                place = levels.index(self.allocation.blocks[layer])
                if place + 1 < len(levels):
                    yield layer, levels[place + 1]

    def _candidate(self, m: ModuleInfo, error_of: ErrorOf) -> "Candidate | None":
        """The next level of one matrix, unless it has the highest or there is no room for it anyway."""
        bits = self.allocation.bits(m, self._settings.experts_bits)
        higher = [level for level in self._settings.trunk if level > bits]
        if not higher or (cost := self._bytes(m, higher[0]) - self._bytes(m, bits)) > self.room:
            return None
        after = 0.0 if higher[0] == WHOLE else error_of(m.path, higher[0])
        return Candidate(m, higher[0], cost, (error_of(m.path, bits) - after) / max(cost, 1))

    def _set_block(self, layer: int, bits: int) -> None:
        old = self.allocation.blocks[layer]
        self.room += self._block_bytes(layer, old) - self._block_bytes(layer, bits)
        self.allocation.blocks[layer] = bits

    def _block_bytes(self, layer: int, bits: int) -> int:
        return sum(self._bytes(m, bits) for m in self._trunk[layer])

    def _bytes(self, m: ModuleInfo, bits: int) -> int:
        return m.num_bytes(bits, self._settings.group_size)

    def _all_trunk(self) -> Iterator[ModuleInfo]:
        return (m for layer in sorted(self._trunk) for m in self._trunk[layer])

    def _outer(self) -> list[ModuleInfo]:
        return [m for m in self._modules if m.kind in ("embedding", "head")]

    def _too_small(self) -> ConfigError:
        smallest = smallest_bytes(self._modules, self._settings)
        for words, other in smaller_settings(self._settings):
            size = smallest_bytes(self._modules, other)
            if size <= self._target:
                advice = f"Give {words}: that takes {size_in_words(size)} or more."
                break
        else:
            advice = "No setting makes it fit: choose a larger machine or a smaller model."
        return ConfigError(
            f"the weights may take {size_in_words(self._target)} ({self._target} bytes), and with these settings "
            f"they take at least {size_in_words(smallest)} ({smallest} bytes). {advice}"
        )


@dataclass(frozen=True)
class Candidate:
    """One matrix, its next level, the bytes that it costs and the error per byte that it takes away."""

    module: ModuleInfo
    bits: int
    cost: int
    gain: float


def smallest_bytes(modules: Sequence[ModuleInfo], settings: Settings) -> int:
    """The size with every block at the menu's lowest level, and embeddings and head at 4 bits."""
    layers = {m.layer for m in modules if m.kind == "trunk" and m.layer is not None}
    lowest = Allocation(
        dict.fromkeys(layers, settings.trunk[0]),
        {m.path: LAST_RESORT_BITS for m in modules if m.kind in ("embedding", "head")},
    )
    return total_bytes(modules, lowest, settings)


def smaller_settings(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Options that make the result smaller, the least harmful first, as a user types them."""
    coarse = replace(settings, group_size=max(GROUP_SIZES))
    yield f"--group-size {coarse.group_size}", coarse
    yield "--experts-bits 2", replace(settings, experts_bits=2)
    least = replace(coarse, experts_bits=2)
    yield f"--experts-bits 2 --group-size {least.group_size}", least
    if settings.trunk[0] > TRUNK_MENU[0]:
        words = f"--experts-bits 2 --group-size {least.group_size} --trunk {','.join(map(str, TRUNK_MENU))}"
        yield words, replace(least, trunk=TRUNK_MENU)
