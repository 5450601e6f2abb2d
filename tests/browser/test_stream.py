"""The stream of events: the page says when it is lost, and goes on where it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from playwright.async_api import expect

from pgtoolset.testing import EmbeddedServer
from tests.browser.conftest import Shop
from tests.browser.windows import ROOM, Windows, place_order
from tests.docs.served_shop import opened
from tests.proxy import Cut, Proxy
from tests.support import until

pytestmark = ROOM


async def test_lost_stream(windows: Windows, shop: Shop) -> None:
    """A window whose server is away says so, and each button too; it connects again alone, and
    shows what it missed."""
    window = await windows.one()
    order = await place_order(window)
    async with Proxy.to(shop.address) as proxy:
        behind = await windows.open(proxy.url, failures=True)
        row = behind[f"order-{order}"]
        await expect(row).to_have_attribute("data-status", "placed")
        proxy.refusing = True
        proxy.drop()
        await expect(behind["connection-state"]).not_to_have_attribute("data-state", "live")
        await behind["sell"].click()
        await expect(behind["log"]).to_contain_text("The shop cannot be reached")
        await window[f"order-{order}"].get_by_role("button").click()
        await expect(window[f"order-{order}"]).to_have_attribute("data-status", "paid")
        await expect(row).to_have_attribute("data-status", "placed")
        proxy.refusing = False
        await behind.is_live()
        await expect(row).to_have_attribute("data-status", "paid")
        await windows.close([behind])


async def test_silent_stream(windows: Windows, shop: Shop) -> None:
    """A window whose stream is cut off without an end notices that nothing arrives, connects again
    alone, and shows what it missed."""
    window = await windows.one()
    order = await place_order(window)
    async with Proxy.to(shop.address) as proxy:
        behind = await windows.new(proxy.url)
        await behind.page.clock.install()
        await behind.page.goto(proxy.url)
        await behind.is_live()
        row = behind[f"order-{order}"]
        await expect(row).to_have_attribute("data-status", "placed")
        proxy.cut = Cut("to client", lambda chunk: b"event: orders" in chunk, "silence")
        await window[f"order-{order}"].get_by_role("button").click()
        await until(lambda: proxy.cut is None)
        await expect(behind["connection-state"]).to_have_attribute("data-state", "live")
        await behind.page.clock.fast_forward(60_000)
        await expect(row).to_have_attribute("data-status", "paid")
        await expect(behind["log"]).to_contain_text("Nothing has arrived for 15 s")
        await expect(behind["log"]).to_contain_text("connected again")
        await windows.close([behind])


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """A server of the test's own, to stop it."""
    with EmbeddedServer() as server:
        yield server


async def test_restarted_server(windows: Windows, server: EmbeddedServer) -> None:
    """A window says when PostgreSQL has stopped; when it is back, the window says so, follows the
    orders again, and an order can be placed."""
    async with opened(server.url()) as shop:
        window = await windows.open(shop.address, failures=True)
        order = await place_order(window)
        await asyncio.to_thread(server.shut_down, immediate=True)
        await expect(window.page.locator("[data-notice]")).to_contain_text("cannot be reached")
        await window["sell"].click()
        await expect(window["log"].locator("[data-kind=sell]")).to_contain_text("503")
        await asyncio.to_thread(server.resume)
        await expect(window["log"]).to_contain_text("PostgreSQL answers again")
        row = window[f"order-{order}"]
        await row.get_by_role("button").click()
        await expect(row).to_have_attribute("data-status", "paid")
        assert await place_order(window) > order
        await windows.close([window])


async def test_locked_table(windows: Windows, shop: Shop) -> None:
    """While another session has locked the till for itself, a window says so, names the session and
    still shows new orders."""
    window = await windows.one()
    notice = window.page.locator("[data-notice]")
    async with shop.database.transaction():
        await shop.database.execute("LOCK TABLE till_sales IN ACCESS EXCLUSIVE MODE")
        await expect(notice).to_contain_text("the till cannot be read now")
        await expect(window["lock-tree"]).to_contain_text(f"pid {shop.database.get_server_pid()}")
        await expect(window["lock-tree"]).to_contain_text("this page, to read")
        await place_order(window)
    await expect(window["lock-tree"]).to_contain_text("Nobody waits")
    await expect(notice).to_contain_text("Open this page in a second window")
