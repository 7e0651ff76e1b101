import random
from typing import Any

import pytest

from expertd.checkpoint.sizes import cache_bytes
from expertd.config import parse_size
from expertd.errors import ConfigError
from expertd.quant.budget import (
    CACHE_TOKENS,
    Allocation,
    bytes_per_token,
    size_in_words,
    smallest_bytes,
    target_bytes,
)
from expertd.quant.ewq import Entropy
from expertd.quant.modules import Kind, ModuleInfo
from expertd.quant.recipe import Plan, decide
from expertd.quant.settings import Settings
from tests.quant.shapes import DEEPSEEK_V3, entropy, modules_of

# Bytes of a matrix of 64 x 64 in bfloat16 at each number of bits: codes, and scale and bias of 64 groups.
AT = {16: 8192, 8: 4096 + 256, 4: 2048 + 256, 2: 1024 + 256}
MENU = Settings(trunk=(4, 8, 16))


def module(path: str, kind: Kind, layer: int | None, *shape: int) -> ModuleInfo:
    role = path.partition(".")[2] or path
    return ModuleInfo(path, kind, layer, role, shape, num_experts=shape[0] if kind == "expert" else 0)


def small_model(num_layers: int = 5) -> list[ModuleInfo]:
    """Layers of two matrices each, experts in the first, embedding, head, one norm."""
    layers = [module(f"{i}.{role}", "trunk", i, 64, 64) for i in range(num_layers) for role in ("q", "o")]
    return [
        module("embed", "embedding", None, 64, 64),
        *layers,
        module("0.experts", "expert", 0, 3, 64, 64),
        module("norm", "other", None, 64),
        module("head", "head", None, 64, 64),
    ]


FIXED = 3 * AT[2] + 2 * 64


def entropies(deviations: list[float]) -> dict[str, Entropy]:
    return {f"{i}.{role}": entropy(4096, d) for i, d in enumerate(deviations) for role in ("q", "o")}


# Rising spread: scores fall with the layer. EWQ with X = 1 gives 16, 16, 8, 8, 4 here.
FALLING = [0.0200, 0.0205, 0.0215, 0.0216, 0.0230]


def solve(
    target: int | None, deviations: list[float] = FALLING, settings: Settings = MENU, **rest: Any
) -> Plan:
    return decide(small_model(len(deviations)), entropies(deviations), settings, target, **rest)


def size_of(*levels: int, outer: tuple[int, int] = (8, 8)) -> int:
    return FIXED + sum(2 * AT[level] for level in levels) + sum(AT[bits] for bits in outer)


def levels(plan: Plan) -> list[int]:
    return list(plan.allocation.blocks.values())


def test_start_is_what_ewq_decides() -> None:
    assert levels(solve(None)) == [16, 16, 8, 8, 4]
    assert solve(None).num_bytes == size_of(16, 16, 8, 8, 4)
    assert solve(size_of(16, 16, 8, 8, 4)) == solve(None)


@pytest.mark.parametrize(
    "wanted",
    [
        (16, 16, 8, 4, 4),  # round 1, the lowest scores first: layer 3 from 8 to 4 ...
        (16, 16, 4, 4, 4),
        (16, 8, 4, 4, 4),  # ... up to the highest ...
        (8, 8, 4, 4, 4),
        (8, 4, 4, 4, 4),  # ... and round 2
        (4, 4, 4, 4, 4),
    ],
)
def test_blocks_are_lowered_in_ascending_order(wanted: tuple[int, ...]) -> None:
    for spare in (0, 1):
        plan = solve(size_of(*wanted) + spare)
        assert (tuple(levels(plan)), plan.num_bytes) == (wanted, size_of(*wanted))


def test_lowered_blocks_say_so() -> None:
    reasons = [b.reason for b in solve(size_of(16, 8, 4, 4, 4)).blocks]
    assert reasons[1].endswith("above the mean: kept whole; lowered to 8 bits for the size")
    assert "lowered" not in reasons[0] and "lowered" not in reasons[4]


@pytest.mark.parametrize(
    ("outer", "wanted"), [((4, 8), {"embed": 4, "head": 8}), ((4, 4), {"embed": 4, "head": 4})]
)
def test_embedding_and_head_are_the_last_resort(outer: tuple[int, int], wanted: dict[str, int]) -> None:
    plan = solve(size_of(4, 4, 4, 4, 4, outer=outer))
    assert (levels(plan), plan.allocation.outer) == ([4] * 5, wanted)
    assert plan.num_bytes == size_of(4, 4, 4, 4, 4, outer=outer)
    assert plan.blocks[-1].bits == wanted["head"] and plan.recipe.bits["embed"] == 4


def test_of_equal_scores_the_last_block_is_lowered_first_and_raised_last() -> None:
    equal = [0.02] * 4
    for wanted in ((8, 4, 4, 4), (8, 8, 4, 4), (8, 8, 8, 8), (16, 8, 8, 8)):
        assert tuple(levels(solve(size_of(*wanted) + 100, equal))) == wanted
    pairs = [0.02, 0.02, 0.03, 0.03]  # 16, 16, 4, 4
    assert levels(solve(size_of(16, 8, 4, 4), pairs)) == [16, 8, 4, 4]


@pytest.mark.parametrize(
    "wanted", [(16, 16, 16, 8, 4), (16, 16, 16, 16, 4), (16, 16, 16, 16, 8), (16, 16, 16, 16, 16)]
)
def test_blocks_are_raised_in_descending_order(wanted: tuple[int, ...]) -> None:
    plan = solve(size_of(*wanted) + 1)
    assert (tuple(levels(plan)), plan.num_bytes) == (wanted, size_of(*wanted))


def test_a_block_too_large_is_passed_over() -> None:
    """Between 8 -> 16 of layer 2 (7680 bytes) and 4 -> 8 of layer 4 (4096)."""
    plan = solve(size_of(16, 16, 8, 8, 4) + 4096)
    assert levels(plan) == [16, 16, 8, 8, 8]
    assert plan.blocks[4].reason.endswith("raised to 8 bits as there is room")


def test_what_is_left_goes_to_single_matrices_by_error_per_byte() -> None:
    asked: list[tuple[str, int]] = []

    def error_of(path: str, bits: int) -> float:
        asked.append((path, bits))
        return {"2.o": 9.0, "4.q": 5.0, "3.q": 2.0}.get(path, 1.0) / bits

    base = size_of(16, 16, 8, 8, 4)
    step_8, step_16 = AT[8] - AT[4], AT[16] - AT[8]
    settings = Settings(trunk=(4, 8, 16))
    # 2.o: 9/8 over 3840 bytes; 4.q: 5/8 over 2048, the better ratio, then 5/8 over 3840.
    plan = solve(base + step_8, error_of=error_of, settings=settings)
    assert (plan.allocation.single, plan.num_bytes) == ({"4.q": 8}, base + step_8)
    assert asked == [("4.q", 8), ("4.q", 4), ("4.o", 8), ("4.o", 4)]
    plan = solve(base + step_16, error_of=error_of)
    assert plan.allocation.single == {"4.q": 8}  # as 2048 + 3840 do not fit
    assert plan.recipe.bits["4.q"] == 8 and plan.recipe.bits["4.o"] == 4


def test_a_matrix_may_rise_twice() -> None:
    def error_of(path: str, bits: int) -> float:
        return (1e6 if path == "3.q" else 1.0) / bits

    equal = [0.02, 0.02, 0.02, 0.02]
    target = size_of(4, 4, 4, 4) + 2 * AT[16] - 2 * AT[4] - 1
    plan = decide(small_model(4), entropies(equal), MENU, target, error_of)
    assert plan.num_bytes <= target
    # Blocks first: three rise to 8, which leaves too little for a fourth; then 3.q takes a level.
    assert (levels(plan), plan.allocation.single) == ([8, 8, 4, 4], {"3.q": 8})
    single = [module("0.q", "trunk", 0, 64, 64), module("0.o", "trunk", 0, 64, 640)]
    found = {"0.q": entropy(4096, 0.02), "0.o": entropy(40960, 0.02)}
    plan = decide(single, found, MENU, AT[16] + 10 * AT[4] + 5, error_of)
    assert (levels(plan), plan.allocation.single) == ([4], {"0.q": 16})


def test_any_target_is_met_and_more_room_is_never_worse() -> None:
    def error_of(path: str, bits: int) -> float:
        return (1 + int(path[0])) / 4.0**bits

    low, high = smallest_bytes(small_model(), MENU), size_of(16, 16, 16, 16, 16)
    for target in range(low, high + 5000, 997):
        plan = solve(target, error_of=error_of)
        assert plan.num_bytes <= target
        if target < high:
            assert target - plan.num_bytes < AT[16] - AT[8]  # no matrix's next level is dearer
    assert plan.num_bytes == high


def test_order_of_modules_does_not_matter() -> None:
    modules = small_model()
    for seed, target in enumerate(range(size_of(4, 4, 4, 4, 4), size_of(16, 16, 16, 16, 16), 3000)):
        shuffled = random.Random(seed).sample(modules, len(modules))
        plans = [decide(m, entropies(FALLING), MENU, target, lambda p, b: 1 / b) for m in (modules, shuffled)]
        assert plans[0].recipe == plans[1].recipe and plans[0].num_bytes == plans[1].num_bytes


def test_impossible_targets_say_what_would_fit() -> None:
    settings = Settings(trunk=(4, 16), experts_bits=4, group_size=64)
    wide = [module("0.experts", "expert", 0, 3, 64, 128), module("0.q", "trunk", 0, 64, 64)]
    found = {"0.q": entropy(4096, 0.02)}
    smallest = smallest_bytes(wide, settings)
    assert decide(wide, found, settings, smallest).num_bytes == smallest
    with pytest.raises(
        ConfigError, match=rf"\({smallest - 1} bytes.* at least .*\({smallest} bytes.*group-size 128: "
    ):
        decide(wide, found, settings, smallest - 1)
    for target, advice in (
        (12_000, "--experts-bits 2: that"),
        (9_500, "--experts-bits 2 --group-size 128: that"),
    ):
        with pytest.raises(ConfigError, match=advice):
            decide(wide, found, settings, target)
    with pytest.raises(ConfigError, match="No setting makes it fit"):
        decide(wide, found, settings, 5_000)
    with pytest.raises(ConfigError, match="--trunk 4,16: that"):
        decide(wide, found, Settings(trunk=(8, 16)), 9_500)


# Sizes.


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("128GB", 128 * 10**9), ("120GiB", 120 << 30), ("9500000000", 9_500_000_000), ("1.5 tb", 15 * 10**11),
        ("64g", 64 * 10**9), ("512MiB", 512 << 20), ("7B", 7), ("0.5kB", 500),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "0", "-5", "1e9", "12 parsecs", "1.2.3", "٣GB", "9" * 30, "0.1"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="wanted bytes or a size such as 128GB"):
        parse_size(text)


def test_sizes_in_words() -> None:
    assert [size_in_words(n) for n in (999, 1000, 16_240_000_000, 10**12)] == [
        "999 bytes", "1.0 kB", "16.2 GB", "1.0 TB",
    ]  # fmt: skip


def test_cache_of_each_kind_of_attention() -> None:
    grouped = {
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "max_position_embeddings": 40960,
    }  # fmt: skip
    assert cache_bytes(grouped, CACHE_TOKENS) == 32768 * 48 * 2 * 4 * 128 * 2
    assert (
        cache_bytes(grouped | {"max_position_embeddings": 1024}, CACHE_TOKENS) == 1024 * 48 * 2 * 4 * 128 * 2
    )
    assert cache_bytes({"text_config": grouped}, CACHE_TOKENS) == cache_bytes(grouped, CACHE_TOKENS)
    plain = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    assert cache_bytes(plain, CACHE_TOKENS) == 32768 * 2 * 2 * 64 * 2
    assert cache_bytes(DEEPSEEK_V3, CACHE_TOKENS) == 32768 * 61 * (512 + 64) * 2


def test_machine_to_target() -> None:
    room = cache_bytes(DEEPSEEK_V3, CACHE_TOKENS) + 2 * 10**9
    assert target_bytes(Settings(fit_bytes=512 * 10**9), DEEPSEEK_V3) == 384 * 10**9 - room
    assert target_bytes(Settings(fit_bytes=36 * 10**9), DEEPSEEK_V3) == 27 * 10**9 - room
    assert target_bytes(Settings(fit_bytes=24 * 10**9), DEEPSEEK_V3) == 16 * 10**9 - room
    assert target_bytes(Settings(target_bytes=12345), DEEPSEEK_V3) == 12345
    assert target_bytes(Settings(), DEEPSEEK_V3) is None
    with pytest.raises(ConfigError, match=r"--fit 4\.0 GB: the GPU may use 2\.7 GB of it, .* need 4\.3 GB"):
        target_bytes(Settings(fit_bytes=4 * 10**9), DEEPSEEK_V3)


def test_deepseek_v3_on_real_machines() -> None:
    modules = modules_of(DEEPSEEK_V3)
    found = {
        m.path: entropy(m.num_weights, 0.02 + (m.layer or 0) / 5000) for m in modules if m.kind == "trunk"
    }
    for memory, group_size, fits in ((512, 64, True), (256, 64, False), (256, 128, False), (384, 128, True)):
        settings = Settings(fit_bytes=memory * 10**9, group_size=group_size)
        target = target_bytes(settings, DEEPSEEK_V3)
        assert target is not None
        if fits:
            assert decide(modules, found, settings, target).num_bytes <= target
        else:
            with pytest.raises(ConfigError, match="at least"):
                decide(modules, found, settings, target)


def test_bytes_that_one_token_reads() -> None:
    modules = small_model(1)
    allocation = Allocation({0: 4}, {"embed": 8, "head": 8})
    row = AT[8] // 64
    expected = 2 * AT[4] + 3 * AT[2] * 2 // 3 + 128 + AT[8] + row
    assert bytes_per_token(modules, allocation, Settings(), top_k=2) == expected
    tied = [m for m in modules if m.kind != "head"]
    assert bytes_per_token(tied, allocation, Settings(), top_k=2) == expected - row
    assert bytes_per_token(modules, allocation, Settings(), top_k=9) == expected + AT[2]
