"""This host: with commands that answer, fail or hang, on any system."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from expertd.topology import collect
from expertd.topology.collect import CommandError, collect_host, run_command

SAMPLES = Path(__file__).parent / "samples"
ANSWERS = {
    "system_profiler": (SAMPLES / "three_macs.json").read_text(),
    "networksetup": (SAMPLES / "hardware_ports_mini.txt").read_text(),
    "ifconfig": (SAMPLES / "ifconfig_configured.txt").read_text(),
    "rdma_ctl": "enabled\n",
}


def answering(**changed: str) -> collect.Run:
    def run(command: Sequence[str], timeout_s: float) -> str:
        assert timeout_s <= collect.COMMAND_TIMEOUT_S
        name = Path(command[0]).name
        answer = {**ANSWERS, **changed}[name]
        if not answer:
            raise CommandError(f"{name}: no answer in 5 s")
        return answer

    return run


def test_mac(tmp_path: Path) -> None:
    host = collect_host("abc", answering(), "Darwin", tmp_path)
    assert (host.host_id, host.rdma_switch, host.notes) == ("abc", "enabled", ())
    assert [p.interface for p in host.cables] == ["en2", "en3"]
    assert host.interface("en2") in host.interfaces


@pytest.mark.parametrize("silent", ["system_profiler", "networksetup", "ifconfig", "rdma_ctl"])
def test_mac_with_a_command_that_hangs(silent: str, tmp_path: Path) -> None:
    host = collect_host("abc", answering(**{silent: ""}), "Darwin", tmp_path)
    assert host.notes == (f"{silent}: no answer in 5 s",)
    assert host.interfaces  # psutil's, when ifconfig said nothing
    assert bool(host.thunderbolt) is (silent != "system_profiler")


def test_mac_with_another_format(tmp_path: Path) -> None:
    host = collect_host("", answering(system_profiler="<xml/>", rdma_ctl="?"), "Darwin", tmp_path)
    assert [note.split(":")[0] for note in host.notes] == ["system_profiler", "rdma_ctl status"]


def test_linux(tmp_path: Path) -> None:
    host = collect_host("", answering(), "Linux", tmp_path)
    assert "127.0.0.1" in [a.ip for i in host.interfaces for a in i.addresses]
    assert (host.thunderbolt, host.rdma, host.rdma_switch) == ((), (), "")


def test_this_machine() -> None:
    host = collect_host()
    assert host.name and host.processor and host.interfaces


def test_command_gives_its_output() -> None:
    assert run_command([sys.executable, "-c", "print('hello')"]) == "hello\n"


def test_command_that_hangs_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(CommandError, match=r"python.*: no answer in 0.2 s"):
        run_command([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.2)
    assert time.monotonic() - began < 10


def test_command_that_fails_or_is_missing() -> None:
    with pytest.raises(CommandError, match="ended with code 3: no such thing"):
        run_command([sys.executable, "-c", "import sys; sys.stderr.write('no such thing'); sys.exit(3)"])
    with pytest.raises(CommandError, match="rdma_ctl: No such file"):
        run_command(["/nowhere/rdma_ctl", "status"])
