import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from expertd.checkpoint.config import normalise_config, read_config
from expertd.quant.modules import ModuleInfo
from expertd.quant.recipe import decide
from expertd.quant.report import Facts, draw, flatten, make_facts, render, write_report
from expertd.quant.settings import Settings
from tests.quant.shapes import DEEPSEEK_V3, entropy, modules_of
from tests.tiny import make_tiny

HOSTILE = "</td><script src=//evil.test/x.js>alert('1')</script><img onerror=\"x\">&{{ 7*7 }}"
VOID = {"meta"}


def facts_of(config: dict[str, Any], name: str = "some/model", **changes: Any) -> Facts:
    modules = modules_of(config)
    found = {
        m.path: entropy(m.num_weights, 0.02 + (m.layer or 0) / 1000) for m in modules if m.kind == "trunk"
    }
    settings = Settings(trunk=(4, 8, 16), calibrate=Path("/home/me/text.txt"), **changes)
    plan = decide(modules, found, settings)
    return make_facts(name, normalise_config(config), 10**9, modules, plan, settings)


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    return facts_of(read_config(make_tiny(tmp_path / "src", "qwen3_next")))


class Page(HTMLParser):
    """Tags that are open, everything seen, and the text of each table row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(seen == tag for seen, _ in self.seen)

    def row(self, first: str) -> list[str]:
        (found,) = [row for row in self.rows if row[0] == first]
        return found


def test_facts_are_plain_json_without_what_changes(facts: Facts) -> None:
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert "threads" not in facts["settings"] and facts["settings"]["calibrate"] == "text.txt"
    assert "seconds" not in facts
    assert facts["model"]["num_layers"] == 4 and facts["model"]["top_k"] == 4
    assert (
        facts["size"]["bits_per_weight"] == 8 * facts["size"]["num_bytes"] / facts["model"]["num_parameters"]
    )


def test_result_does_not_know_the_number_of_threads(tmp_path: Path) -> None:
    config = read_config(make_tiny(tmp_path, "mixtral"))
    assert facts_of(config, threads=1) == facts_of(config, threads=7)


def test_page_loads_nothing_and_runs_nothing(facts: Facts, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", facts)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img|<iframe| on\w+=", text)
    names = {name for _, attributes in page.seen for name in attributes}
    assert not names & {"src", "href", "style", "action", "data"}
    policy = [a["content"] for tag, a in page.seen if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_tables_say_what_they_are(facts: Facts) -> None:
    page = Page(render(facts))
    tables = page.count("table")
    assert tables >= 3 and page.count("caption") == page.count("thead") == tables
    assert all("scope" in attributes for tag, attributes in page.seen if tag == "th")
    ids = {attributes["id"] for _, attributes in page.seen if "id" in attributes}
    assert {a["aria-labelledby"] for _, a in page.seen if "aria-labelledby" in a} <= ids


def test_every_block_has_its_row(facts: Facts) -> None:
    page = Page(render(facts))
    assert len(facts["blocks"]) == 6
    for block in facts["blocks"]:
        row = page.row(block["name"])
        assert row[1] == f"{block['num_weights']:,}" and row[6] == f"{block['num_bytes']:,}"
        assert row[7] == block["reason"]
        assert row[5] == ("kept whole" if block["bits"] == 16 else f"{block['bits']} bits")
    assert page.row("layer 0")[4].startswith("+") and page.row("lm_head")[2:5] == ["–"] * 3
    assert page.row("mlp.gate")[1:3] == ["4", "kept whole"]


def test_single_matrices_are_exceptions(facts: Facts) -> None:
    low = next(b for b in facts["blocks"] if b["bits"] == 4)
    matrix = next(m for m in facts["modules"] if m["layer"] == low["layer"] and m["kind"] == "trunk")
    matrix["bits"] = 8
    row = Page(render(facts)).row(matrix["path"])
    assert row[1:3] == ["1", "8 bits"] and "its block got 4 bits" in row[4]


def test_hostile_names_are_text() -> None:
    modules = [
        ModuleInfo(f"{HOSTILE}.0.{role}", "trunk", 0, f"{HOSTILE}.{role}", (64, 64))
        for role in ("q", "\ud800")
    ]
    modules.append(ModuleInfo(f"{HOSTILE}.gate", "kept", 0, f"{HOSTILE}.gate", (8, 64), reason=HOSTILE))
    modules.append(ModuleInfo(HOSTILE, "embedding", None, HOSTILE, (64, 64)))
    settings = Settings(calibrate=Path("a") / HOSTILE.replace("/", ""))
    plan = decide(modules, {m.path: entropy(4096, 0.02) for m in modules}, settings)
    facts = make_facts(HOSTILE, normalise_config(DEEPSEEK_V3), 1, modules, plan, settings)
    facts["warnings"] = [HOSTILE]
    facts["quality"] = {HOSTILE: {HOSTILE: HOSTILE}}
    facts["expert_errors"] = [{"layer": 0, "projection": HOSTILE, "relative_error": 0.5}]
    facts["seconds"] = {HOSTILE: 1.0}
    facts["modules"][0]["bits"] = 8
    text = render(facts)
    page = Page(text)
    assert page.open == [] and not {"script", "img"} & {tag for tag, _ in page.seen}
    assert "{{" in text and "49" not in Page(text).row(HOSTILE + ".gate")[0]
    assert sum(HOSTILE in cell for row in page.rows for cell in row) >= 8
    assert page.row(f"{HOSTILE}.0.q")[2] == "8 bits"


def test_half_a_surrogate_pair_can_be_written(facts: Facts, tmp_path: Path) -> None:
    facts["model"]["name"] = "half \ud800"
    write_report(tmp_path / "report.html", facts)
    assert "half ?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_optional_parts_come_when_they_are_there(facts: Facts) -> None:
    plain = render(facts)
    for title in ("Quality", "Error of the experts", "Time"):
        assert f">{title}</h2>" not in plain
    facts["quality"] = {"perplexity": 42.12345, "kl": {"mean": 0.0123456, "p95": 0.1}, "layers": [1, 2]}
    facts["seconds"] = {"survey": 1.25}
    facts["expert_errors"] = [
        {"layer": 2, "projection": "up", "relative_error": 0.0123},
        {"layer": 0, "projection": "down", "relative_error": 0.25},
    ]
    page = Page(render(facts))
    assert page.row("perplexity") == ["perplexity", "42.123"] and page.row("kl mean")[1] == "0.012346"
    assert page.row("survey") == ["survey", "1.2"]
    assert page.row("0") == ["0", "–", "0.25"] and page.row("2") == ["2", "0.0123", "–"]


def test_values_are_flattened() -> None:
    assert list(flatten({"a": {"b": {"c": 1}}, "d": [1], "e": None, "f": "x"})) == [
        ("a b c", "1"),
        ("f", "x"),
    ]


def test_picture_of_bits(facts: Facts) -> None:
    picture = draw(facts["modules"])
    assert len(picture.bars) == 8 and [layer for _, layer in picture.ticks] == [0, 1, 2, 3]
    experts = [bar for bar in picture.bars if bar.kind == "experts"]
    assert {bar.label.rpartition(": ")[2] for bar in experts} == {"2.50 bits per weight"}
    assert {round(bar.height, 6) for bar in experts} == {180 * 2.5 / 16}
    for left, right in zip(picture.bars, picture.bars[1:], strict=False):
        assert left.x + left.width <= right.x + 1e-9
    assert all(b.x >= 0 and b.x + b.width <= picture.width for b in picture.bars)
    assert Page(render(facts)).count("rect") == 8


def test_large_model_makes_a_small_page() -> None:
    facts = facts_of(DEEPSEEK_V3)
    text = render(facts)
    assert len(text) < 100_000 and Page(text).count("rect") == 61 + 58
    assert len(draw(facts["modules"]).ticks) <= 16
    assert draw([]).bars == []
