"""What needs no rank: help, version, the way to the lazy modules."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner

import expertd
from expertd.cli import bench, cli, options, quantize, serve
from expertd.config import GroupConfig, ServerConfig
from expertd.errors import CheckpointError, ConfigError
from expertd.quant.settings import Settings


@pytest.mark.parametrize("command", ["run", "serve", "pair", "hosts", "quantize", "quality", "bench"])
def test_each_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0 and f"Example: expertd {command} " in " ".join(result.output.split())


def test_version() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert result.output == f"expertd {expertd.__version__}\n"


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("mlx", "numpy", "uvicorn", "pydantic", "asyncio", "tqdm")
    code = f"import sys, expertd.cli; print([m for m in {heavy} if m in sys.modules])"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert got.stdout == "[]\n"


def test_everything_the_commands_need_but_the_ranks_imports_no_mlx() -> None:
    code = (
        "import sys, expertd.cli.output, expertd.cli.signals, expertd.server.serve\n"
        "import expertd.checkpoint.inspect, expertd.checkpoint.locate\n"
        "assert 'mlx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ranks", "9"], "--ranks 9: expertd runs 1 to 4 ranks"),
        (["--ranks", "2", "--shares", "1,x"], "--shares 1,x: wanted numbers"),
        (["--ranks", "2", "--shares", "1,2,3"], "wanted 2 numbers"),
        (["--prefill-chunk", "0"], "--prefill-chunk 0"),
        (["--logits", "/no/such/folder/l"], "--logits /no/such/folder/l: no folder /no/such/folder"),
        (["--link", "carrier"], "'carrier' is not one of"),
        (["--split", "heads"], "'heads' is not one of"),
        (["--kernels", "cuda"], "'cuda' is not one of"),
        (["--activation-bits", "4"], "'4' is not one of"),
        (["--kv-bits", "3"], "'3' is not one of"),
        (["--temperature", "9"], "9.0 is not in the range"),
        (["--top-k", "-1"], "-1 is not in the range"),
        (["--min-p", "2"], "2.0 is not in the range"),
        (["--repetition-penalty", "0"], "0.0 is not in the range"),
        (["--json", "--logprobs", "21"], "21 is not in the range"),
        (["--logprobs", "3"], "--logprobs: needs --json"),
        (["--nope"], "No such option"),
        (["--stop"], "requires an argument"),
    ],
)
def test_wrong_flags_are_named(args: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, ["run", "/no/such/model", "x", *args])
    said = result.output if result.exit_code == 2 else f"{result.exception}"
    assert words in said and isinstance(result.exception, ConfigError | SystemExit)


def test_a_draft_model_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--draft-model: .*config.json: no such file"):
        options.find_draft(str(tmp_path))
    assert options.find_draft("") == ""


def test_sizes_of_serve_are_read() -> None:
    for wrong in ("much", "-1"):
        result = CliRunner().invoke(cli, ["serve", "/no/such/model", "--prefix-cache", wrong])
        assert f"size {wrong!r}: wanted bytes or a size" in f"{result.exception}"
    with serve.serve_command.make_context("serve", ["m", "--prefix-cache", "0"]) as context:
        assert context.params["prefix_cache_bytes"] == 0
    with serve.serve_command.make_context("serve", ["m", "--prefix-cache", "2GB"]) as context:
        assert context.params["prefix_cache_bytes"] == 2 * 10**9


def test_quantize_checks_its_flags_and_says_what_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []

    def convert(src: str, dst: Path, settings: object, progress: object, *cache: object) -> object:
        calls.append((src, dst, settings))
        assert callable(progress)
        progress("rounding", 5, 10)
        dst.mkdir()
        return SimpleNamespace(source_bytes=16_200_000_000, bits_per_weight=2.71, warnings=["take care"])

    monkeypatch.setattr("expertd.quant.convert.quantize_checkpoint", convert)
    monkeypatch.setattr(quantize, "find_model", lambda name: SimpleNamespace(total_bytes=5_400_000_000))
    flags = ["--experts-bits", "3", "--trunk", "4,8", "--target-bytes", "6GB", "--effort", "fast"]
    result = CliRunner().invoke(cli, ["quantize", "src", str(tmp_path / "d st"), *flags])
    assert result.exit_code == 0, result.output
    wanted = Settings("fast", experts_bits=3, trunk=(4, 8), target_bytes=6 * 10**9)
    assert calls == [("src", tmp_path / "d st", wanted)]
    assert "16.2 GB -> 5.4 GB (3.0 times smaller, 2.71 bits per weight)" in result.output
    assert f"next: expertd run '{tmp_path}/d st' " in result.output and "take care" in result.output
    wrong = [
        ["--trunk", "5,4"],
        ["--fit", "much"],
        ["--fit", "8GB", "--target-bytes", "2GB"],
        ["--ewq-x", "-1"],
    ]
    for flags in [*wrong, ["--effort", "fast", "--calibrate", __file__]]:
        again = CliRunner().invoke(cli, ["quantize", "src", str(tmp_path / "new"), *flags])
        assert isinstance(again.exception, ConfigError) and len(calls) == 1, flags


def test_bench_calls_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    fake = ModuleType("expertd.bench.throughput")
    monkeypatch.setattr(fake, "run", lambda *args, **kernels: calls.append((*args, kernels)), raising=False)
    monkeypatch.setitem(sys.modules, "expertd.bench.throughput", fake)
    monkeypatch.setattr(bench, "find_model", lambda name: SimpleNamespace(folder=Path(name)))
    flags = ["--ranks", "1,2", "--split", "experts", "--tokens", "9", "--kernels", "mlx"]
    flags += ["--activation-bits", "8"]
    result = CliRunner().invoke(cli, ["bench", "decode", "demo", *flags])
    assert result.exit_code == 0, result.output
    kernels = {"kernels": ["mlx"], "activation_bits": 8, "name": ""}
    assert calls == [("decode", Path("demo"), [1, 2], ["experts"], 9, 5, None, kernels)]
    for wrong in (["--ranks", "x"], ["--ranks", "9"], ["--split", "nope"], ["--json", "/no/such/f"]):
        result = CliRunner().invoke(cli, ["bench", "decode", "demo", *wrong])
        assert isinstance(result.exception, ConfigError) and wrong[1].split("/f")[0] in str(result.exception)


def test_pin_gives_each_rank_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {5, 3, 9}, raising=False)
    group = options.make_group(Path("m"), 2, "auto", "2,1", True)
    assert group.cpus == ((3,), (5,)) and group.shares == (2.0, 1.0)
    with pytest.raises(ConfigError, match="4 ranks but 3 processors"):
        options.allowed_cpus(4)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="macOS has no pinning"):
        options.allowed_cpus(1)


def test_model_id(tmp_path: Path) -> None:
    assert serve.model_id("demo", tmp_path) == "demo"
    assert serve.model_id("org/name", tmp_path) == "org/name"
    assert serve.model_id("https://host/models/my%20model/", tmp_path) == "my model"
    assert serve.model_id(str(tmp_path), tmp_path) == tmp_path.name


def test_greeting_quotes_and_names_a_reachable_host() -> None:
    config = ServerConfig("0.0.0.0", 0, "it's", GroupConfig(""))
    assert "http://127.0.0.1:99/v1" in serve.greeting(config, 99) and "it'\"'\"'s" in serve.greeting(
        config, 99
    )
    assert "http://[::1]:99/v1" in serve.greeting(ServerConfig("::1"), 99)


@pytest.mark.parametrize(
    ("ranks", "link", "said"), [(2, "tcp", True), (2, "verbs", True), (2, "mlx", False), (1, "tcp", False)]
)
def test_a_link_without_effect_is_said(
    ranks: int, link: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options.warn_of_link(GroupConfig("", ranks, link=link))
    line = f"expertd: --link {link}: ranks of one host use shared memory; it counts for hosts that join\n"
    assert capsys.readouterr().err == (line if said else "")


def test_prompts_stay_in_memory_unless_a_folder_is_named(tmp_path: Path) -> None:
    for args, wanted in (([], ""), (["--prefix-cache-dir", str(tmp_path)], str(tmp_path))):
        context = serve.serve_command.make_context("serve", ["demo", *args])
        assert context.params["prefix_cache_dir"] == wanted
