"""The stream of events: the page says when it is lost, and goes on where it is back."""

from __future__ import annotations

from playwright.async_api import expect

from tests.browser.conftest import Shop
from tests.browser.windows import ROOM, Windows, place_order
from tests.proxy import Proxy

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
