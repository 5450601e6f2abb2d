"""The buttons that provoke what the README promises: page and database agree on what happened."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from tests.browser.conftest import Shop
from tests.browser.windows import ROOM, Windows

pytestmark = ROOM

#: The buttons, and the orders that each stores: one before the error, or one after it.
STORED = {
    "swallowed-error": 1,
    "failing-commit": 0,
    "hundred-waiters": 1,
    "killed-connection": 1,
}


@pytest.mark.parametrize("button", STORED)
async def test_kept(windows: Windows, shop: Shop, button: str) -> None:
    """The promise is kept, the log says so in words, and what was lost is not in the database."""
    window = await windows.one(failures=True)
    before = await shop.database.fetchval("SELECT count(*) FROM orders")
    await window[f"provoke-{button}"].click()
    entry = window["log"].locator(f"[data-kind={button}][data-outcome]")
    await expect(entry).to_have_attribute("data-outcome", "kept")
    await expect(window[f"provoke-{button}"]).to_be_enabled()
    assert await shop.database.fetchval("SELECT count(*) FROM orders") == before + STORED[button]
