"""The page in headless Chromium: drawn from a group at work and from nothing, read by screen readers, driven by keys.

Screenshots are left under build/. Skipped where there is no Chromium (apt-get install chromium).
"""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from stub_group import LIMIT_S, received

from expertd.config import ServerConfig
from expertd.server import page
from expertd.server.app import make_app
from expertd.server.service import Service
from tests.server.page_status import busy_status
from tests.server.test_serve import with_server

playwright = pytest.importorskip("playwright.async_api", reason="pip install playwright")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
# A browser on a machine that others keep busy takes its time.
BROWSER_S = 4 * LIMIT_S
BUILD = Path(__file__).parents[2] / "build"
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")

# The least contrast of any text against what is painted below it, by WCAG's formula, and where it is.
CONTRAST = """() => {
  const parse = (c) => (c.match(/[\\d.]+/g) ?? []).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let n = node; n; n = n.parentElement) {
      const c = parse(getComputedStyle(n).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const owner = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !owner.getClientRects().length) continue;
    if (["SCRIPT", "STYLE", "NOSCRIPT", "title"].includes(owner.tagName)) continue;
    const style = getComputedStyle(owner);
    const [a, b] = [light(parse(owner.tagName === "text" ? style.fill : style.color)), light(ground(owner))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, `${owner.tagName}.${owner.className.baseVal ?? owner.className}`];
  }
  return worst;
}"""

# Controls that a screen reader has no name for.
UNNAMED = """[...document.querySelectorAll("input, textarea, button")]
  .filter((e) => !e.hidden && !e.labels?.length && !e.innerText)
  .map((e) => e.outerHTML)"""


async def open_page(browser: Any, url: str, status: dict[str, Any] | None = None, **look: Any) -> Any:
    """A page that fails the test on any error in it; `status` is answered instead of the server's."""
    context = await browser.new_context(**{"viewport": {"width": 1360, "height": 900}, **look})
    shown = await context.new_page()
    shown.errors = []
    shown.on("pageerror", lambda e: shown.errors.append(str(e)))
    shown.on("console", lambda m: shown.errors.append(m.text) if m.type == "error" else None)
    if status is not None:

        async def answer(route: Any) -> None:
            await route.fulfill(json=status)

        await shown.route("**/status.json*", answer)
    await shown.goto(url)
    await until_true(shown, "document.querySelector('#figures dd')")
    return shown


def with_browser(folder: Path, test: Callable[[Any, str], Awaitable[None]]) -> None:
    async def run(url: str) -> None:
        async with playwright.async_playwright() as driver:
            sandbox = [] if os.getuid() else ["--no-sandbox"]
            browser = await driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
            try:
                await test(browser, url)
            finally:
                await browser.close()

    with_server(folder, run, 2, BROWSER_S)


async def until_true(shown: Any, expression: str) -> None:
    """Not Playwright's own wait, which evaluates text inside the page: the page's policy forbids that."""
    async with asyncio.timeout(LIMIT_S):
        while not await shown.evaluate(expression):
            await asyncio.sleep(0.02)


async def texts(shown: Any, selector: str) -> str:
    return " ".join(await shown.locator(selector).all_inner_texts())


LOOKS: dict[str, dict[str, Any]] = {
    "dark": {"color_scheme": "dark"},
    "light": {"color_scheme": "light"},
    "phone": {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}, "device_scale_factor": 2},
}


@needs_chromium
def test_a_group_at_work(tmp_path: Path) -> None:
    """Drawn from what a server might say: in each dress, by keys, for screen readers, and with figures missing."""

    async def test(browser: Any, url: str) -> None:
        for name in LOOKS:
            await check_dress(browser, url, name)
        await check_keys_and_names(browser, url)
        await check_missing_figures(browser, url)
        await check_key_and_trouble(browser, url)

    with_browser(tmp_path, test)


async def check_dress(browser: Any, url: str, name: str) -> None:
    BUILD.mkdir(exist_ok=True)
    shown = await open_page(browser, url, busy_status(), **LOOKS[name])
    await until_true(shown, "document.querySelector('#load canvas').height > 100")
    await shown.screenshot(path=BUILD / f"page-{name}.png", full_page=True)
    ratio, where = await shown.evaluate(CONTRAST)
    assert ratio >= 4.5, (name, where, ratio)
    room = await shown.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert room <= 0, f"{name}: {room} px too wide"
    assert "61.4" in await texts(shown, "#figures") and "48,312" in await texts(shown, "#figures")
    drawn = await shown.locator("#machines svg").text_content()
    assert "studio" in drawn and "laptop" in drawn and "verbs" in drawn and "7.4 µs" in drawn
    assert "1.48 times as fast as solo" in await texts(shown, "#planner")
    assert await shown.locator("#machines .flow").count() == 1
    assert shown.errors == []
    await shown.context.close()


async def check_keys_and_names(browser: Any, url: str) -> None:
    shown = await open_page(browser, url, busy_status(), reduced_motion="reduce")
    await until_true(shown, "document.querySelector('#load canvas').height > 100")
    tree = await shown.locator("body").aria_snapshot()
    for said in (
        "status: serving",
        'textbox "Message"',
        'spinbutton "Temperature"',
        'log "Conversation"',
        'img "Tokens per second of the last 10 min.',
        'img "Expert load of 48 layers with 128 experts. Busiest: expert',
        'heading "Machines and link"',
        'img "studio with 1 rank(s), this machine; laptop with 1 rank(s)',
    ):
        assert said in tree, said
    assert await shown.evaluate(UNNAMED) == []
    await shown.focus("#load canvas")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        await shown.keyboard.press(key)
    assert "layer 1, expert 1: chosen" in await texts(shown, "#load .readout")
    await shown.focus("#speed .drawing")
    await shown.keyboard.press("ArrowLeft")
    await shown.keyboard.press("ArrowLeft")
    assert "1 s ago: " in await texts(shown, "#speed .readout")
    moving = "getComputedStyle(document.querySelector('.flow')).animationName"
    assert await shown.evaluate(moving) == "none"
    await shown.keyboard.press("Tab")
    focused = "getComputedStyle(document.activeElement).outlineStyle"
    assert await shown.evaluate(focused) == "solid"
    assert shown.errors == []
    await shown.context.close()


async def check_missing_figures(browser: Any, url: str) -> None:
    loading = busy_status()
    gone = dict.fromkeys(("ready", "group", "hosts", "engine"))
    loading |= {"status": "loading", "loaded": 0.42, "history": [], "events": [], "experts": {}, **gone}
    shown = await open_page(browser, url, loading)
    assert "loading the model, 42 %" in await texts(shown, "#state") and shown.errors == []
    await shown.context.close()
    followed = busy_status()
    followed |= {"engine": None, "experts": {}, "hosts": {"role": "joined", "link": "none", "hosts": []}}
    shown = await open_page(browser, url, followed)
    assert "asked for auto" in " ".join((await texts(shown, ".splits")).split()) and shown.errors == []
    await shown.context.close()


async def check_key_and_trouble(browser: Any, url: str) -> None:
    shown = await open_page(browser, url, busy_status())
    await shown.unroute_all()
    await shown.route("**/status.json*", lambda route: route.fulfill(status=401, body="{}"))
    await shown.wait_for_selector("#key:not([hidden])")
    keys: list[str | None] = []

    async def answer(route: Any) -> None:
        keys.append(await route.request.header_value("authorization"))
        await route.fulfill(json=busy_status())

    await shown.unroute_all()
    await shown.route("**/status.json*", answer)
    await shown.fill("#key-text", "secret")
    await shown.press("#key-text", "Enter")
    await shown.wait_for_selector("#key", state="hidden")
    await until_true(shown, "document.querySelector('#figures').innerText.includes('61.4')")
    assert keys[-1] == "Bearer secret"
    await shown.unroute_all()
    await shown.route("**/status.json*", lambda route: route.abort())
    await shown.wait_for_selector("#trouble:not([hidden])")
    assert "No answer from the server since" in await texts(shown, "#trouble")


@needs_chromium
def test_chat_with_stub_ranks(tmp_path: Path) -> None:
    """Streams, stops, keeps the conversation, shows errors; text from the model stays text."""

    async def test(browser: Any, url: str) -> None:
        shown = await open_page(browser, url)
        shown.set_default_timeout(LIMIT_S * 1000)
        await shown.fill("#question", "@stats hello <img src=x onerror=alert(1)>")
        await shown.press("#question", "Enter")
        await shown.wait_for_selector("#log .answer small")
        assert await shown.locator("#log .answer").first.inner_text() == (
            "hello <img src=x onerror=alert(1)> \n4 tokens, "
            + (await texts(shown, "#log .answer small")).split(", ", 1)[1]
        )
        await until_true(shown, "document.querySelector('#figures').innerText.includes('experts')")
        await shown.fill("#question", "@slow:0.01 @repeat:4000 x")
        await shown.fill("#max-tokens", "4000")
        await shown.press("#question", "Enter")
        await until_true(shown, "document.querySelectorAll('#log .answer')[1]?.innerText.length > 20")
        assert await shown.get_attribute("#log", "aria-busy") == "true"
        await shown.click("#stop")
        await shown.wait_for_selector("#log .answer:nth-of-type(4) small")
        asked = [m for m in received(tmp_path) if m["op"] == "Submit"][-1]
        assert [m["role"] for m in asked["messages"]] == ["user", "assistant", "user"]
        await shown.fill("#question", "so fail")
        await shown.press("#question", "Enter")
        await shown.wait_for_selector("#log .error")
        assert "the step failed" in await texts(shown, "#log .error")
        await shown.click("#clear")
        assert await shown.locator("#log .answer").count() == 0
        assert shown.errors == []

    with_browser(tmp_path, test)


def test_the_page_is_whole_and_refuses_all_else() -> None:
    async def get() -> httpx.Response:
        app = make_app(Service(ServerConfig()))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://test"
        ) as client:
            return await client.get("/")

    response = asyncio.run(get())
    policy = response.headers["content-security-policy"]
    assert response.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("sha256-") == 2
    text = response.text
    assert "http://" not in text.replace("http://www.w3.org/", "") and "https://" not in text
    assert "STYLE*/" not in text and "SCRIPT*/" not in text and "innerHTML" not in text
    assert len(response.content) < 64 << 10
    for file in page.FOLDER.iterdir():
        assert len(file.read_text().splitlines()) <= 600, file
        assert max(map(len, file.read_text().splitlines())) <= 140 or file.name == "page.html", file
