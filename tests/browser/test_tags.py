"""Tags: a set, as it was saved."""

from __future__ import annotations

from playwright.async_api import expect

from tests.browser.conftest import Shop
from tests.browser.windows import ROOM, Window, Windows

pytestmark = ROOM


async def save(window: Window, sku: str, *tags: str) -> None:
    """Check these tags of a product and no others, and save them."""
    for box in await window[f"tags-{sku}"].get_by_role("checkbox").all():
        await box.set_checked(await box.get_attribute("value") in tags)
    await window[f"save-tags-{sku}"].click()


async def checked(window: Window, sku: str) -> list[str]:
    boxes = window[f"tags-{sku}"].locator("input:checked")
    return [str(await box.get_attribute("value")) for box in await boxes.all()]


async def tags_of(shop: Shop, sku: str) -> list[str]:
    look = "SELECT tag FROM product_tags WHERE sku = $1 ORDER BY tag"
    return [row["tag"] for row in await shop.database.fetch(look, sku)]


async def test_tags(windows: Windows, shop: Shop) -> None:
    """Tags are saved as a set: the page says what was added and removed, and a reload and the
    database agree."""
    window = await windows.one()
    await save(window, "grinder", "gift", "new")
    await expect(window["log"]).to_contain_text("2 added, 0 removed")
    await save(window, "grinder", "fragile", "new")
    await expect(window["log"]).to_contain_text("1 added, 1 removed")
    assert await tags_of(shop, "grinder") == ["fragile", "new"]
    await window.page.reload()
    await window.is_live()
    assert await checked(window, "grinder") == ["fragile", "new"]
    await save(window, "grinder")
    await expect(window["log"]).to_contain_text("0 added, 2 removed")
    assert await tags_of(shop, "grinder") == []


async def test_tags_of_another_window(windows: Windows) -> None:
    """A window shows the tags that another one saves."""
    one, other = await windows.two()
    await save(one, "kettle", "seasonal")
    box = other["tags-kettle"].locator("input[value=seasonal]")
    await expect(box).to_be_checked()
    await save(other, "kettle")
    await expect(one["tags-kettle"].locator("input[value=seasonal]")).not_to_be_checked()
