"""A real browser over a real daemon's page, and what it did that nobody should."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, Locator, Page, Response, async_playwright, expect

from ifabric.embedded import free_port
from ifabric.testing.daemons import RealDaemon
from tests.system.conftest import Cluster

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TOKEN = "an-operator-token-for-tests"
#: seconds that the page has to show something; the machines of tests are slow
PATIENCE_MS = 15_000
SIZES = {"desk": (1440, 1000), "phone": (360, 780), "wall": (2560, 1440)}
expect.set_options(timeout=PATIENCE_MS)
#: what the browser itself writes when a request is refused or nobody answers
REFUSED = r"Failed to load resource: the server responded with a status of (\d+)"
UNREACHED = r"Failed to load resource: net::ERR_|net::ERR_"
#: set before any script of the page: what a script out of a task's title would set, and what the policy stopped
WATCHED = """
window.hit = 0; window.stopped = [];
document.addEventListener("securitypolicyviolation", (e) => window.stopped.push(`${e.violatedDirective} ${e.blockedURI}`));
"""


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Debian's Chromium. Without it a laptop skips, and CI fails."""
    if not Path(CHROMIUM).exists():
        if os.environ.get("CI"):
            raise FileNotFoundError(f"{CHROMIUM}: the page is tested in it; apt-get install chromium")
        pytest.skip("the page is tested in chromium: apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        await browser.close()


class Sight:
    """One tab on a daemon's page. `allowed` are the statuses that the test itself brings about."""

    def __init__(self, page: Page, origin: str, allowed: frozenset[int], *, may_be_lost: bool) -> None:
        self.page = page
        self.origin = origin
        self._allowed, self._may_be_lost = allowed, may_be_lost
        self.said: list[str] = []
        self.requests: list[str] = []
        self.policies: dict[str, str] = {}
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("response", self._answered)

    def _answered(self, response: Response) -> None:
        self.policies[urlsplit(response.url).path] = response.headers.get("content-security-policy", "")

    async def look(self, where: str = "") -> Sight:
        """Opens the page, and returns when it is live."""
        await self.page.goto(f"{self.origin}/{where}", wait_until="domcontentloaded")
        await expect(self.page.locator("#status")).not_to_have_attribute("data-level", "waiting")
        return self

    def at(self, selector: str, **options: Any) -> Locator:
        return self.page.locator(selector, **options)

    def tile(self, name: str) -> Locator:
        return self.page.locator(f"[data-tile={name}] .value")

    async def text(self, selector: str) -> str:
        return (await self.page.locator(selector).first.inner_text()).strip()

    async def differs(self, locator: Locator) -> str:
        """Its text, once it is another than now."""
        before = await locator.inner_text()
        await expect(locator).not_to_have_text(before)
        return await locator.inner_text()

    async def elements(self) -> int:
        """How many the document holds."""
        found: int = await self.page.evaluate("document.getElementsByTagName('*').length")
        return found

    async def operate(self, token: str = TOKEN) -> None:
        """Shows a token to the page."""
        await self.at("#operator").click()
        await self.at("#token").fill(token)
        await self.page.get_by_role("button", name="Use it").click()

    async def do(self) -> str:
        """Confirms what the dialog asks, and returns what became of it."""
        await self.at("#confirm").click()
        outcome = self.at("#dialog .outcome")
        await expect(outcome).to_have_text(re.compile(r"^(Done|Refused)"))
        return await outcome.inner_text()

    async def picture(self, name: str) -> None:
        """Kept for whoever wants to see it: in IFABRIC_ARTIFACTS, else with the test's files."""
        await self.page.screenshot(path=pictures() / f"{name}.png")

    async def judged(self) -> None:
        """Nothing ran that should not, nothing was asked of anybody else, and the console is empty."""
        assert await self.page.evaluate("[window.hit, window.stopped]") == [0, []]
        elsewhere = [url for url in self.requests if not url.startswith((f"{self.origin}/", "data:image/svg+xml,"))]
        assert elsewhere == []
        policy = self.policies["/"]
        for needed in (
            "default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ):  # fmt: skip
            assert needed in policy
        assert "unsafe" not in policy
        assert [said for said in self.said if not self._expected(said)] == []

    def _expected(self, said: str) -> bool:
        if found := re.search(REFUSED, said):
            return int(found[1]) in self._allowed
        return self._may_be_lost and re.search(UNREACHED, said) is not None


_pictures: list[Path] = []


def pictures() -> Path:
    """Where pictures go."""
    return _pictures[-1]


def keep_pictures(otherwise: Path) -> None:
    """In IFABRIC_ARTIFACTS, else in that folder."""
    folder = Path(os.environ.get("IFABRIC_ARTIFACTS") or otherwise)
    folder.mkdir(parents=True, exist_ok=True)
    _pictures.append(folder)


@contextlib.asynccontextmanager
async def looking(
    browser: Browser,
    daemon: RealDaemon,
    *,
    size: str = "desk",
    scheme: str = "light",
    allowed: frozenset[int] = frozenset(),
    may_be_lost: bool = False,
) -> AsyncIterator[Sight]:
    """A tab in a browser profile of its own, judged at the end."""
    assert daemon.found is not None
    width, height = SIZES[size]
    context = await browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        locale="en-GB",
    )
    try:
        await context.add_init_script(WATCHED)
        sight = Sight(await context.new_page(), daemon.found.http, allowed, may_be_lost=may_be_lost)
        yield sight
        await sight.judged()
    finally:
        await context.close()


async def paged(cluster: Cluster, folder: Path, **more: Any) -> RealDaemon:
    """A daemon with an operator for its page, on a port that it keeps over restarts."""
    token = folder / "ann.token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    breaker = {"failure_threshold": 3, "minimum_calls": 3, "reset_timeout": 45}
    config = {
        "http": {"port": free_port()},
        "page": {"operators": {"ann": str(token)}},
        "governor": {"circuit_breaker": breaker},
        **more,
    }
    return await cluster.daemon(config=config)


#: the lowest contrast of text on its ground, over all that is in view: ratio, text, where. WCAG AA asks for 4.5, or 3
#: where the text is large.
CONTRAST = """
() => {
  const parse = (c) => { const m = c.match(/[\\d.]+/g).map(Number); return [m[0], m[1], m[2], m[3] ?? 1]; };
  const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = (e) => { const all = []; for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0) { all.push(c); if (c[3] === 1) break; } } return all.reverse().reduce((b, a) => over(a, b), [255, 255, 255, 1]); };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n = walker.nextNode(); n; n = walker.nextNode()) {
    const e = n.parentElement;
    if (!n.data.trim() || !e.checkVisibility({ visibilityProperty: true }) || e.closest(".sr-only, noscript, option, script, title")) continue;
    const style = getComputedStyle(e), back = ground(e);
    const text = e instanceof SVGElement ? style.fill : style.color;
    const a = light(over(parse(text), back)), b = light(back);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) low.push([Math.round(ratio * 100) / 100, n.data.trim().slice(0, 40), e.className.baseVal ?? e.className]);
  }
  return low.slice(0, 20);
}
"""
