"""The counters: they move, and what is taken is given back."""

from __future__ import annotations

import re

import asyncpg
from playwright.async_api import expect

from tests.browser.windows import ROOM, Window, Windows, place_order

pytestmark = ROOM


async def number(window: Window, counter: str) -> int:
    """The first number of a counter."""
    return int(
        await window[f"counter-{counter}"].evaluate("node => node.innerText.match(/\\d+/)[0]")
    )


async def passes(window: Window, counter: str, above: int) -> None:
    """Wait until a counter is above a number."""
    await window.page.wait_for_function(
        "([counter, above]) => Number(document.querySelector(`[data-testid=counter-${counter}]`)"
        ".innerText.match(/\\d+/)[0]) > above",
        arg=[counter, above],
    )


async def test_requests(windows: Windows) -> None:
    """Each request is counted, in each window."""
    one, other = await windows.two()
    before = await number(other, "requests")
    await place_order(one)
    await passes(other, "requests", before)


async def test_rolled_back(windows: Windows) -> None:
    """A transaction that is rolled back and an error response are counted."""
    window = await windows.one(failures=True)
    rolled_back, errors = await number(window, "rolled-back"), await number(window, "errors")
    await window["provoke-swallowed-error"].click()
    await passes(window, "rolled-back", rolled_back)
    await passes(window, "errors", errors)


async def test_everything_comes_back(windows: Windows) -> None:
    """A hundred waiters come and go; no connection of the pool stays in use, and no waiter."""
    window = await windows.one()
    await window["provoke-hundred-waiters"].click()
    await passes(window, "waiters", 50)
    entry = window["log"].locator("[data-kind=hundred-waiters]")
    await expect(entry).to_have_attribute("data-outcome", "kept")
    await expect(window["counter-connections"]).to_contain_text("0 / 5")
    # What remains are those of the page itself, one for each order that it shows.
    await expect(window["counter-waiters"].locator("b")).to_have_text(re.compile("^[1-6]$"))


async def test_connections(windows: Windows, sale: asyncpg.Connection) -> None:
    """A request that waits has a connection of the pool, and gives it back."""
    window = await windows.one()
    await sale.execute("BEGIN; LOCK TABLE till_sales IN EXCLUSIVE MODE")
    await window["sell"].click()
    await expect(window["counter-connections"]).to_contain_text("1 / 5")
    await sale.execute("COMMIT")
    await expect(window["counter-connections"]).to_contain_text("0 / 5")
