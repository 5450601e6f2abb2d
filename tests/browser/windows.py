"""Windows of the page, and what each of them must never show."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from examples.shop.browser import PATIENCE, PROGRAM
from playwright.async_api import Browser, ConsoleMessage, Locator, Page, Request, expect

#: The marks of each test of the room: neither a version nor a compiled module decides what a
#: browser shows, and the shop has an engine of asyncpg.
ROOM = [
    pytest.mark.once,
    pytest.mark.asyncpg(reason="the shop's page"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium (apt-get install chromium)"),
]

#: Notes down what the browser tells only to the page.
NOTES = """
window.noted = { shifts: [], violations: [] };
addEventListener("securitypolicyviolation", (event) =>
  noted.violations.push(`${event.violatedDirective}: ${event.blockedURI}`));
new PerformanceObserver((list) => {
  for (const entry of list.getEntries())
    noted.shifts.push({
      value: entry.value,
      after_input: entry.hadRecentInput,
      what: entry.sources.map(({ node }) => node?.outerHTML?.slice(0, 120) ?? String(node)),
    });
}).observe({ type: "layout-shift", buffered: true });
"""

CUT_OFF = """
[...document.querySelectorAll("button, input")].filter((control) => {
  const [inner, outer] = [control, control.closest("li, fieldset, section, article")]
    .map((element) => element.getBoundingClientRect());
  return inner.left < outer.left || inner.right > outer.right
    || inner.top < outer.top || inner.bottom > outer.bottom
    || control.scrollWidth > control.clientWidth + 1;
}).map((control) => control.outerHTML)
"""

FORGET = """
Object.assign(noted, { shifts: [], violations: [] });
document.querySelector("[data-testid=log]").replaceChildren();
"""

#: What Chromium itself writes to the console where a request gets no 2xx.
FAILED_REQUEST = re.compile("Failed to load resource")


@dataclass
class Window:
    """A window with a profile of its own.

    Attributes:
        faults: the errors on its console, uncaught exceptions, and requests to another host.
        address: where the page comes from.
        failures: requests of the test fail on purpose, and Chromium may say so on the console.
    """

    page: Page
    address: str
    faults: list[str] = field(default_factory=list)
    failures: bool = False

    def __post_init__(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        self.page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if self.failures and FAILED_REQUEST.search(message.text):
            return
        if message.type in ("error", "warning"):
            self.faults.append(f"console: {message.text}")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((f"{self.address}/", "data:")):
            self.faults.append(f"request: {request.url}")

    def __getitem__(self, testid: str) -> Locator:
        return self.page.get_by_test_id(testid)

    async def violations(self) -> list[str]:
        """What axe-core finds."""
        if not await self.page.evaluate("'axe' in window"):
            await self.page.evaluate(AXE_SCRIPT)
        found = await self.page.evaluate("axe.run({ resultTypes: ['violations'] })")
        return [
            f"{violation['id']}: {node['html'][:200]} {node['failureSummary']}"
            for violation in found["violations"]
            for node in violation["nodes"]
        ]

    async def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(
            await self.page.evaluate(
                "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
                " - document.documentElement.clientWidth"
            )
        )

    async def cut_off(self) -> list[str]:
        """The controls of which a part is outside of what they stand in."""
        return list(await self.page.evaluate(CUT_OFF))

    async def shifts(self, *, after_input: bool = False) -> list[dict[str, Any]]:
        """The layout shifts so far; those within half a second of an input only when asked for,
        as in the browsers' figure CLS."""
        noted = await self.page.evaluate("noted.shifts")
        return [shift for shift in noted if after_input or not shift["after_input"]]

    async def is_live(self) -> None:
        """Wait until events arrive."""
        await expect(self["connection-state"]).to_have_attribute("data-state", "live")
        await expect(self["counter-requests"]).to_contain_text(re.compile(r"\d"))

    async def forget(self) -> None:
        """Begin anew, for the next test."""
        self.faults.clear()
        self.failures = False
        await self.page.evaluate(FORGET)

    async def all_faults(self) -> list[str]:
        """What no window may show, whatever a test does in it."""
        violations = await self.page.evaluate("noted.violations")
        shifts = await self.shifts()
        moved = sum(shift["value"] for shift in shifts)
        return [
            *self.faults,
            *(f"Content-Security-Policy: {violation}" for violation in violations),
            *([f"layout shift of {moved}: {shifts}"] if moved >= 0.01 else []),
        ]


@dataclass
class Windows:
    """Opens windows of the page.

    Two of them, each with a profile of its own, stay open from test to test: to open one costs as
    much as the rest of most tests.
    """

    browser: Browser
    address: str
    lasting: list[Window] = field(default_factory=list)
    opened: list[Window] = field(default_factory=list)

    @asynccontextmanager
    async def checked(self) -> AsyncIterator[None]:
        """Check each window at the end of a test. Close the ones that the test has opened, and all
        where it fails."""
        try:
            yield
            for window in (*self.lasting, *self.opened):
                assert await window.all_faults() == []
        except BaseException:
            await self.close()
            raise
        await self.close(self.opened)
        for window in self.lasting:
            await window.forget()

    async def close(self, windows: Iterable[Window] | None = None) -> None:
        for window in list((*self.lasting, *self.opened) if windows is None else windows):
            for kept in (self.lasting, self.opened):
                if window in kept:
                    kept.remove(window)
            await window.page.context.close()

    async def two(self, *, failures: bool = False) -> list[Window]:
        """The two that stay; requests may fail in the first."""
        if not self.lasting:
            self.lasting = [await self.open(), await self.open()]
            self.opened = [each for each in self.opened if each not in self.lasting]
        self.lasting[0].failures = failures
        return self.lasting

    async def one(self, *, failures: bool = False) -> Window:
        """The first of the two that stay."""
        return (await self.two(failures=failures))[0]

    async def open(
        self, address: str | None = None, *, failures: bool = False, **options: Any
    ) -> Window:
        """Open a window for this test alone, and wait until its stream of events is there."""
        window = await self.new(address or self.address, failures=failures, **options)
        await window.page.goto(f"{window.address}/")
        await window.is_live()
        return window

    async def new(self, address: str, *, failures: bool = False, **options: Any) -> Window:
        """A window with nothing in it; `options` are those of a context of Playwright."""
        context = await self.browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        await context.add_init_script(NOTES)
        window = Window(await context.new_page(), address, failures=failures)
        self.opened.append(window)
        return window


async def place_order(window: Window, *, press: bool = False) -> int:
    """Press the button, or the key Enter, and return the id of the order that appears."""
    rows = "[...document.querySelectorAll('[data-testid=orders] [data-status]')]"
    ids = f"{rows}.map(row => Number(row.dataset.testid.replace('order-', '')))"
    latest = max(await window.page.evaluate(ids), default=0)
    await expect(window["place-order"]).to_be_enabled()
    await (window.page.keyboard.press("Enter") if press else window["place-order"].click())
    handle = await window.page.wait_for_function(
        f"latest => {ids}.find(id => id > latest)", arg=latest
    )
    return int(await handle.json_value())
