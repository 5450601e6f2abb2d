"""What the shop's page costs its visitors: largest contentful paint, weight, layout shift, and the
time until its events arrive. Run as `python -m benchmarks.page`.

Each round opens the page in a new profile of headless Chromium, over loopback, and places an order.
Times are of the wall since the navigation began, and depend on the machine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from examples.shop.app import create_app
from examples.shop.demo import own_schema
from examples.shop.serving import listen, serving
from examples.shop.settings import Settings

from benchmarks._declared import Benchmark, Experiment, Measure
from benchmarks._harness import Described, Figures, Turn
from benchmarks._run import alone

if TYPE_CHECKING:
    from playwright.async_api import Browser

NOTES = """
window.figures = { paint: 0, shift: 0 };
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) figures.paint = entry.startTime;
}).observe({ type: "largest-contentful-paint", buffered: true });
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) figures.shift += entry.value;
}).observe({ type: "layout-shift", buffered: true });
new MutationObserver(() => {
  if (document.querySelector("[data-testid=connection-state][data-state=live]"))
    figures.connected ??= performance.now();
  if (document.querySelector("[data-testid=orders] [data-status]"))
    figures.orders ??= performance.now();
}).observe(document, { subtree: true, childList: true, attributes: true });
"""

WEIGHT = """
[...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
  .map((entry) => entry.transferSize).reduce((one, other) => one + other)
"""


async def opened(browser: Browser, address: str) -> Figures:
    """Open the page as a new visitor, place an order, and return the figures."""
    context = await browser.new_context()
    try:
        await context.add_init_script(NOTES)
        page = await context.new_page()
        await page.goto(f"{address}/")
        await page.wait_for_function("() => figures.connected && figures.paint")
        weight = await page.evaluate(WEIGHT)
        await page.get_by_test_id("place-order").click()
        await page.wait_for_function("() => figures.orders")
        return {**await page.evaluate("figures"), "weight": weight / 1024}
    finally:
        await context.close()


@asynccontextmanager
async def contestants(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    from examples.shop.browser import chromium
    from playwright.async_api import Error

    settings = Settings.from_url(url)
    async with AsyncExitStack() as stack:
        try:
            browser = await stack.enter_async_context(chromium())
        except Error as error:
            raise Described(f"no Chromium: {error.message.splitlines()[0]}") from error
        listener = stack.enter_context(listen("0"))
        await stack.enter_async_context(own_schema(settings))
        address = await stack.enter_async_context(serving(create_app(settings), listener))
        yield {"page": partial(opened, browser, address)}


def figure(name: str, what: str, unit: str) -> Measure:
    """A figure of the page."""
    return Measure(name, what, "page", of=name, unit=unit)


BENCHMARK = Benchmark(
    title="The page of the demo",
    about="The shop of `make demo` in Chromium, over loopback, in a new profile each time.",
    packages=("fastapi", "playwright"),
    experiments=(
        Experiment(
            "One visit",
            contestants,
            (
                figure("paint", "largest contentful paint", "ms"),
                figure("connected", "until the stream of events is there", "ms"),
                figure("shift", "layout shift", "of the window's height"),
                figure("weight", "transferred, with headers", "KiB"),
            ),
            seconds=10,
            warm_up=1,
        ),
    ),
)

if __name__ == "__main__":
    alone("page")
