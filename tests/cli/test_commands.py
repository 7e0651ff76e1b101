"""Commands in processes of their own, as a user starts them: exit codes, and one line per error."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from stub_group import LIMIT_S, SOON_S, children, gone, group_of, received, until_now

Expertd = Callable[..., SimpleNamespace]
Start = Callable[..., "subprocess.Popen[str]"]


def await_first_word(process: "subprocess.Popen[str]") -> None:
    """Two bytes and no more: what a reader of text buffers beyond them, communicate() would not see."""
    assert process.stdout and os.read(process.stdout.fileno(), 2) == b"x "


def test_run_streams_text_and_gives_figures_on_stderr(expertd: Expertd, tmp_path: Path) -> None:
    got = expertd("run", tmp_path, "one two three", "--max-tokens", 2)
    assert (got.code, got.out) == (0, "one two \n")
    assert got.err == (
        "prompt: 3 tokens at 100.0/s; answer: 2 tokens at 10.0/s; split auto on 1 rank(s); ended by length\n"
    )


def test_run_json_is_one_object(expertd: Expertd, tmp_path: Path) -> None:
    got = expertd("run", tmp_path, "a b", "--json", "--ranks", 2, "--split", "experts")
    assert got.code == 0 and got.out.count("\n") == 1
    assert json.loads(got.out) == {
        "token_ids": [1, 2],
        "text": "a b ",
        "prompt_tokens": 2,
        "prefill_tokens_per_s": 100.0,
        "decode_tokens_per_s": 10.0,
        "split": "experts",
        "ranks": 2,
        "kernels": "mlx",
        "finish_reason": "stop",
    }


def test_run_json_has_logprobs_if_asked(expertd: Expertd, tmp_path: Path) -> None:
    got = expertd("run", tmp_path, "é", "--json", "--logprobs", 1)
    other = {"token_id": 999, "token": "other", "logprob": -0.125, "bytes": list(b"other")}
    chosen = {"token_id": 1, "token": "é ", "logprob": -0.5, "bytes": list("é ".encode())}
    assert json.loads(got.out)["logprobs"] == [{**chosen, "top_logprobs": [other]}]


def test_run_options_reach_the_rank(expertd: Expertd, tmp_path: Path) -> None:
    flags = ["--temperature", 0.5, "--top-p", 0.9, "--seed", 7, "--stop", "x", "--stop", "y", "--chat"]
    flags += ["--top-k", 40, "--min-p", 0.05, "--repetition-penalty", 1.1]
    assert (
        expertd("run", tmp_path, "-", *flags, "--logits", tmp_path / "l", stdin=subprocess.DEVNULL).code == 0
    )
    submit = received(tmp_path)[0]
    sampling = submit["sampling"]
    assert (sampling["temperature"], sampling["top_p"], sampling["seed"]) == (0.5, 0.9, 7)
    assert (sampling["top_k"], sampling["min_p"], sampling["repetition_penalty"]) == (40, 0.05, 1.1)
    assert submit["logprobs"] is None
    assert submit["stop"] == ["x", "y"] and submit["logits_file"] == str(tmp_path / "l")
    assert submit["prompt"] is None and submit["messages"] == [{"role": "user", "content": ""}]


def test_wrong_flags_exit_2_before_any_rank(expertd: Expertd, tmp_path: Path) -> None:
    for args, lines in ((["--ranks", 9], 1), (["--nope"], 4)):
        got = expertd("run", tmp_path, "x", *args)
        assert (got.code, got.out) == (2, "") and got.err.count("\n") <= lines
    assert not list(tmp_path.glob("rank*.log"))


def test_errors_of_the_group_are_one_line(expertd: Expertd, tmp_path: Path) -> None:
    got = expertd("run", tmp_path, "@reject:too_long")
    assert (got.code, got.out, got.err) == (2, "", "expertd: prompt: too_long\n")
    got = expertd("run", tmp_path, "@raise:SIGKILL x")
    assert got.code == 1 and got.err.startswith("expertd: rank 0 died: killed by SIGKILL; ")
    assert got.err.count("\n") == 1
    got = expertd("run", tmp_path, "so fail")
    assert (got.out, got.err) == ("so \n", "expertd: the step failed\n")
    group_of(tmp_path, r0="fatal")
    got = expertd("run", tmp_path, "x")
    assert (got.code, got.err) == (2, "expertd: model-1.safetensors: damaged. Get it again.\n")


def test_unknown_model_is_one_line(expertd: Expertd) -> None:
    got = expertd("run", "./no such", "x")
    assert got.code == 2 and got.err.startswith("expertd: './no such': ") and got.err.count("\n") == 1


def test_a_bug_is_one_line_unless_asked() -> None:
    code = "from expertd.cli import main, run\nrun.find_model = lambda name: 1 / 0\nmain()"
    for debug, lines in (("0", 1), ("1", 5)):
        command = [sys.executable, "-c", code, "run", "x", "y"]
        env = {**os.environ, "EXPERTD_DEBUG": debug}
        got = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=env)
        assert got.returncode == 1 and got.stderr.count("\n") >= lines
        last = got.stderr.splitlines()[-1]
        assert last.startswith("expertd: ZeroDivisionError: division by zero; this is a bug of expertd; ")
        assert ("Traceback" in got.stderr) == (debug == "1")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_run(start: Start, tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = start("run", tmp_path, "@slow:0.01 @repeat:4000 x", "--max-tokens", 4000, "--ranks", 2)
    await_first_word(process)
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code and time.monotonic() - began < SOON_S  # the answer takes 40 s
    assert "Traceback" not in err and not children()


def test_signal_ends_run_though_nobody_reads_its_output(start: Start, tmp_path: Path) -> None:
    process = start("run", tmp_path, "@repeat:4000 " + "x" * 200, "--max-tokens", 4000)
    until_now(lambda: received(tmp_path))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=SOON_S) == 130


def test_broken_pipe_is_quiet(start: Start, tmp_path: Path) -> None:
    process = start("run", tmp_path, "@slow:0.01 @repeat:500 x", "--max-tokens", 500)
    assert process.stdout and process.stderr
    await_first_word(process)
    process.stdout.close()
    assert process.wait(timeout=LIMIT_S) == 141 and process.stderr.read() == ""


@pytest.mark.fault
def test_terminal_ctrl_c_twice_forces(start: Start, tmp_path: Path) -> None:
    group_of(tmp_path, r0="deaf")
    env = {**os.environ, "STUB_KILL_AFTER_S": "60"}
    process = start("run", tmp_path, "@slow:0.01 @repeat:500 x", env=env)
    await_first_word(process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # or the two are one
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LIMIT_S) == 130 and not children()


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, ""),
        (
            signal.SIGTERM,
            0,
            "expertd: ending when 1 requests have, in 0.1 s at most; once more ends at once\n",
        ),
    ],
)
def test_serve_says_where_answers_and_stops(
    start: Start, tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    process = start("serve", tmp_path, "--port", 0, "--ranks", 2, "--drain-timeout", 0.1)
    assert process.stdout
    first, watch, curl = (process.stdout.readline() for _ in range(3))
    name, url = first.split()[1], first.split()[3]
    assert name == tmp_path.name and url.startswith("http://127.0.0.1:") and url.endswith("/v1")
    assert watch == f"watch: {url.removesuffix('v1')}\n"
    assert curl.startswith(f"try: curl -N {url}/chat/completions ")
    answer = subprocess.run(
        curl.removeprefix("try: "), shell=True, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert '"content":"time "' in answer.stdout and answer.stdout.endswith("data: [DONE]\n\n")
    asked = {"model": name, "prompt": "@slow:0.01 @repeat:4000 x", "max_tokens": 4000, "stream": True}
    with httpx.stream("POST", f"{url}/completions", json=asked) as stream:
        lines = stream.iter_lines()
        next(lines)
        began = time.monotonic()
        process.send_signal(number)
        *_, last = filter(None, lines)
        _, err = process.communicate(timeout=LIMIT_S)
        assert "expertd is stopping" in last and time.monotonic() - began < SOON_S
    assert process.returncode == code and err.lstrip("\n") == said and not children()


def test_ctrl_c_while_the_ranks_load(start: Start, tmp_path: Path) -> None:
    group_of(tmp_path, r1="mute")
    process = start("serve", tmp_path, "--port", 0, "--ranks", 2)
    until_now(lambda: len(psutil.Process(process.pid).children()) == 2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=SOON_S)[0] == "" and process.returncode == 130 and not children()


@pytest.mark.fault
@pytest.mark.parametrize("victim", [0, 1])
def test_run_goes_on_without_one_of_its_ranks(start: Start, tmp_path: Path, victim: int) -> None:
    process = start("run", tmp_path, "@slow:0.01 @repeat:50 x", "--ranks", 2)
    await_first_word(process)
    psutil.Process(process.pid).children()[victim].kill()
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (0, "x " * 49 + "\n")
    warning, figures = err.splitlines()
    assert warning == f"expertd: rank {victim} died: killed by SIGKILL; going on with 1 rank"
    assert figures.startswith("prompt: ")


@pytest.mark.fault
def test_serve_starts_dead_ranks_again_and_loads_again_when_told(start: Start, tmp_path: Path) -> None:
    process = start("serve", tmp_path, "--port", 0, "--ranks", 2)
    assert process.stdout and process.stderr
    process.stdout.readline()
    before = psutil.Process(process.pid).children()
    before[1].kill()
    assert process.stderr.readline() == "expertd: rank 1 died: killed by SIGKILL; going on with 1 rank\n"
    assert process.stderr.readline() == "expertd: rank 1 is back; going on with 2 ranks\n"
    process.send_signal(signal.SIGHUP)
    assert process.stderr.readline() == "expertd: reload: loading beside what runs\n"
    assert process.stderr.readline() == f"expertd: reload: serving {tmp_path.name} from new ranks\n"
    until_now(lambda: len(psutil.Process(process.pid).children()) == 2 and gone(before[0]))
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=LIMIT_S)[1] == "" and process.returncode == 0 and not children()


@pytest.mark.fault
def test_killed_server_leaves_no_rank(start: Start, tmp_path: Path) -> None:
    process = start("serve", tmp_path, "--port", 0, "--ranks", 2)
    assert process.stdout
    process.stdout.readline()
    ranks = psutil.Process(process.pid).children()
    process.kill()
    process.wait(timeout=LIMIT_S)
    assert len(ranks) == 2
    until_now(lambda: all(gone(rank) for rank in ranks))


def test_port_in_use_exits_2_before_any_rank(expertd: Expertd, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        got = expertd("serve", tmp_path, "--port", port)
    assert (got.code, got.out) == (2, "")
    assert got.err.startswith(f"expertd: --host 127.0.0.1 --port {port}: the port is in use. ")
    assert got.err.count("\n") == 1 and not list(tmp_path.glob("rank*.log"))


def test_changed_checkpoint_is_refused(expertd: Expertd, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"right")
    files = [{"name": "model.safetensors", "size": 5, "sha256": hashlib.sha256(b"right").hexdigest()}]
    (tmp_path / "quantization_manifest.json").write_text(json.dumps({"files": files}))
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / "model.safetensors").write_bytes(b"wrong")
    got = expertd("serve", tmp_path, "--port", 0, env=env)
    assert (got.code, got.out) == (2, "")
    assert f"{tmp_path / 'model.safetensors'}: has SHA-256" in got.err and "Copy or download" in got.err
    (tmp_path / "model.safetensors").write_bytes(b"wrong size")
    for command in (("serve", tmp_path, "--port", 0), ("run", tmp_path, "Hi")):
        got = expertd(*command, env=env)
        assert got.code == 2 and "has 10 bytes, wanted 5" in got.err
