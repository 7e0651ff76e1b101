"""The benchmark of the links: it runs, its figures have their places, and what it cannot do is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertd.bench import link, link_side, verbs
from expertd.bench.compiling import compile_library
from expertd.errors import ClusterError, ConfigError
from tests.link.provider_fixture import Fabric


def test_every_link_is_measured_beside_its_floor() -> None:
    report = link.measure((64, 4 << 10), repeats=1)
    assert [row["bytes"] for row in report["rows"]] == [64, 4 << 10]
    for row in report["rows"]:
        for name in ("mailbox", "memory", "tcp", "linked", "spinning", "blocking"):
            for pattern in ("swap", "one_way"):
                figures = row[name][pattern]
                assert 0 < figures["min_us"] <= figures["p50_us"] <= figures["p99_us"] <= figures["p999_us"]
        assert row["crc"]["swap"]["p50_us"] > 0 and row["ring"]["swap"]["p50_us"] > 0
    assert "goal" not in report["rows"][0]["ratios"]["tcp_swap"]
    assert report["rows"][1]["ratios"]["mailbox_swap"]["goal"] == 1.3
    text = link.format_report(report)
    assert "4 KiB  mailbox" in text and "goal 1.3: " in text and "two hops: " in text


def test_percentiles() -> None:
    figures = link_side.summarize([[3.0, 1.0, 2.0], [9.0, 8.0, 7.0]])
    assert (figures["min_us"], figures["p50_us"], figures["p99_us"]) == (1.0, 7.0, 9.0)
    assert figures["p999_us"] is None and figures["rounds_us"] == [2.0, 8.0]
    assert link_side.summarize([[float(n) for n in range(1000)]])["p999_us"] == 999.0


def test_ratios_take_the_better_floor_and_give_the_checksum_apart() -> None:
    def kind(us: float) -> dict[str, Any]:
        return {p: {"p50_us": us, "rounds_us": [us, 2 * us]} for p in ("swap", "one_way")}

    times = {
        "mailbox": 1.2,
        "memory": 1.0,
        "tcp": 16.0,
        "spinning": 10.0,
        "blocking": 12.0,
        "crc": 2.0,
        "linked": 20.0,
    }
    ratios = link._ratios({"bytes": 16 << 10, **{name: kind(us) for name, us in times.items()}})
    assert ratios["mailbox_swap"]["met"] and ratios["mailbox_swap"]["ratio"] == 1.2
    tcp = ratios["tcp_swap"]
    assert (tcp["floor_p50_us"], tcp["ratio"], tcp["ratio_without_crc"], tcp["met"]) == (
        10.0,
        1.6,
        1.4,
        False,
    )
    assert ratios["linked_swap"]["hop_us"] == 4.0 and "goal" not in ratios["tcp_one_way"]


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no C compiler 'no-such-compiler'.* Install one, or set CC"):
        compile_library(link.HERE / "floor.c", tmp_path)


def test_verbs_stand_beside_the_others(
    fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over the provider of the link's tests; the usual tool does not know it, and that is said."""
    for name, value in fabric.environment("127.0.0.1").items():
        monkeypatch.setenv(name, value)
    json_file = tmp_path / "report.json"
    link.run(99, json_file, quick=True, verbs_library=str(fabric.library))
    report = json.loads(json_file.read_text())
    assert report["missing"].keys() == {"ib_send_lat"}, report["missing"]
    assert [row["bytes"] for row in report["rows"]] == [4 << 10, 16 << 10] and report["repeats"] == 2
    for row in report["rows"]:
        assert 0 < row["verbs"]["swap"]["p50_us"] <= row["verbs"]["swap"]["p999_us"]
        assert row["verbs"]["one_way"]["samples"] >= 1000
    said = capsys.readouterr().out
    assert "4 KiB  verbs" in said and "ib_send_lat: not measured: " in said
    assert fabric.breaches() == []


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    missing: dict[str, str] = {}
    assert link._usable(str(tmp_path / "no-such.so"), missing) is None
    assert "no-such.so" in missing["verbs"]


def test_figures_of_the_usual_tool_are_read() -> None:
    said = """ #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 4096    1000          1.52           9.81         1.61                1.63             0.10            1.95                    9.81
"""  # noqa: E501
    figures = verbs.parse(said, 4096)
    assert (figures["min_us"], figures["p50_us"], figures["p99_us"], figures["p999_us"]) == (
        1.52,
        1.61,
        1.95,
        9.81,
    )
    with pytest.raises(ClusterError, match="printed no figures for 64 bytes"):
        verbs.parse(said, 64)
