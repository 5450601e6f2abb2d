"""What the shop's page costs its visitors: largest contentful paint, weight, layout shift, and the
time until its events arrive. Run as `python -m benchmarks.page`.

Each round opens the page in a new profile of headless Chromium, over loopback, and places an order.
Times are milliseconds of the wall since the navigation began; they depend on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Mapping
from statistics import quantiles

from examples.shop.app import create_app
from examples.shop.browser import chromium
from examples.shop.demo import database, own_schema
from examples.shop.serving import listen, serving
from examples.shop.settings import Settings
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


async def opened(browser: Browser, address: str) -> Mapping[str, float]:
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


async def run(rounds: int, settings: Settings) -> None:
    with listen("0") as listener:
        async with (
            own_schema(settings),
            serving(create_app(settings), listener) as address,
            chromium() as browser,
        ):
            results = [await opened(browser, address) for _ in range(rounds + 1)][1:]
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; median (quartiles)")
    for name, what in (
        ("paint", "largest contentful paint, ms"),
        ("connected", "until the stream of events is there, ms"),
        ("shift", "layout shift, of the window's height"),
        ("weight", "transferred, with headers, KiB"),
    ):
        low, median, high = quantiles([result[name] for result in results], n=4)
        print(f"{what:<45} {median:8.2f}  ({low:.2f} to {high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    with database() as settings:
        asyncio.run(run(arguments.rounds, settings))


if __name__ == "__main__":
    main()
