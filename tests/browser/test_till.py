"""The till: who waits for whom, and a closing that misses no sale."""

from __future__ import annotations

import re

import asyncpg
from playwright.async_api import expect

from tests.browser.conftest import Shop
from tests.browser.windows import ROOM, Window, Windows
from tests.support import at_best

pytestmark = ROOM

SECOND = '{"seconds": 1}'

#: Note each text that the lock tree has, however short a time.
NOTE_LOCKS = """
() => {
  const tree = document.querySelector("[data-testid=lock-tree]");
  noted.locks = [];
  new MutationObserver(() => noted.locks.push(tree.innerText))
    .observe(tree, { subtree: true, childList: true, characterData: true });
}
"""


async def shown(window: Window, *words: str) -> str:
    """Wait until the lock tree has shown all these words together."""
    handle = await window.page.wait_for_function(
        "words => noted.locks.find(text => words.every(word => text.includes(word)))",
        arg=list(words),
    )
    return str(await handle.json_value())


async def is_empty(window: Window) -> None:
    await expect(window["lock-tree"]).to_contain_text("Nobody waits")


async def test_lock_tree(windows: Windows, shop: Shop, sale: asyncpg.Connection) -> None:
    """While the till is closed and another session holds a sale, the tree names both; it is empty
    afterwards, and the closing has counted that sale."""
    window = await windows.one()
    await is_empty(window)
    await window.page.evaluate(NOTE_LOCKS)
    holder = await sale.fetchval("SELECT pg_backend_pid()")
    await sale.execute("BEGIN; INSERT INTO till_sales (cents) VALUES (4242)")
    await window["close-till"].click()
    tree = await shown(window, str(holder), "till_sales")
    waiter = await shop.database.fetchval(
        "SELECT pid FROM pg_stat_activity WHERE $1 = ANY(pg_blocking_pids(pid))", holder
    )
    await sale.execute("COMMIT")
    await is_empty(window)
    assert waiter is None or str(waiter) in tree


async def test_hold_till(windows: Windows) -> None:
    """A sale waits behind the session that the page lets hold the till, and is stored afterwards.

    On a busy machine the till may be free before the sale is there; the best of several counts.
    """
    window = await windows.one()
    await window.page.evaluate(NOTE_LOCKS)
    # For a second, where the page asks for some more.
    await window.page.route("**/till/holds", lambda route: route.continue_(post_data=SECOND))

    async def waits() -> bool:
        await window["hold-till"].click()
        await expect(window["hold-till"]).to_be_enabled()
        await window["sell"].click()
        await expect(window["sell"]).to_be_enabled()
        await expect(window["till"]).not_to_have_class(re.compile("is-held"))
        assert await window["log"].locator("[data-outcome=failed]").count() == 0
        noted = await window.page.evaluate("noted.locks")
        return any("another session" in text and "till_sales" in text for text in noted)

    await at_best(waits)
    await is_empty(window)
    await window.page.unroute("**/till/holds")
