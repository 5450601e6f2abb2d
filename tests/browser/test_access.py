"""Who uses the page: with a keyboard, on a phone, in the dark, with a screen reader."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from playwright.async_api import Page, expect

from tests.browser.windows import ROOM, Window, Windows, place_order

pytestmark = ROOM

PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}

VIEWS: dict[str, dict[str, Any]] = {"desktop": {}, "phone": PHONE}

FOCUSED = "document.activeElement?.dataset.testid ?? ''"

#: Whether the element with the focus shows it: an outline, or a shadow.
SHOWS_FOCUS = """
() => {
  const { outlineStyle, outlineWidth, boxShadow } = getComputedStyle(document.activeElement);
  return (outlineStyle !== "none" && parseFloat(outlineWidth) > 0) || boxShadow !== "none";
}
"""

BACKGROUND = "getComputedStyle(document.body).backgroundColor"

MOVING = """
document.getAnimations().filter(({ effect }) => effect.getComputedTiming().duration > 10).length
"""


async def tab_to(page: Page, testid: str) -> None:
    """Press Tab until an element has the focus, which each element on the way must show."""
    for _ in range(100):
        await page.keyboard.press("Tab")
        assert await page.evaluate(SHOWS_FOCUS), await page.evaluate(FOCUSED)
        if await page.evaluate(FOCUSED) == testid:
            return
    raise AssertionError(f"Tab does not reach {testid}")


async def use(window: Window) -> None:
    """Do what fills each part of the page, with the longest words."""
    row = window[f"order-{await place_order(window)}"]
    for status in ("paid", "sent"):
        await row.get_by_role("button").click()
        await expect(row).to_have_attribute("data-status", status)
    await window["sell"].click()
    await window["provoke-failing-commit"].click()
    await expect(window["log"].locator("[data-kind=failing-commit]")).to_be_visible()
    await expect(window["log"].locator("[data-kind=sell]")).to_be_visible()


@pytest.mark.parametrize("view", VIEWS)
async def test_accessible(windows: Windows, view: str) -> None:
    """axe-core has no findings, at first and after the buttons were used, light and dark;
    nothing is wider than the window or cut off."""
    window = await windows.open(failures=True, **VIEWS[view])
    assert await window.violations() == []
    assert await window.overflow() == 0
    await use(window)
    assert await window.overflow() == 0
    assert await window.cut_off() == []
    for scheme in ("light", "dark"):
        await window.page.emulate_media(color_scheme=scheme)
        assert await window.violations() == []


async def test_schemes(windows: Windows) -> None:
    """The page is light or dark as the system is, and follows when it changes."""
    window = await windows.one()
    backgrounds = []
    for scheme in ("light", "dark"):
        await window.page.emulate_media(color_scheme=scheme)
        backgrounds.append(await window.page.evaluate(BACKGROUND))
    await window.page.emulate_media(color_scheme="light")
    light, dark = [sum(map(int, color[4:-1].split(","))) for color in backgrounds]
    assert light > 600 > 200 > dark


async def test_keyboard(windows: Windows) -> None:
    """The keyboard alone places an order, moves it on and saves tags, and the focus stays where it
    was while events arrive."""
    window = await windows.open()
    page = window.page
    await tab_to(page, "place-order")
    order = await place_order(window, press=True)
    assert await page.evaluate(FOCUSED) == "place-order"
    button = window[f"order-{order}"].get_by_role("button")
    await button.focus()
    await page.keyboard.press("Enter")
    await expect(window[f"order-{order}"]).to_have_attribute("data-status", "paid")
    await expect(button).to_be_focused()
    await tab_to(page, "save-tags-cup")
    await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("Space")
    await page.keyboard.press("Tab")
    await page.keyboard.press("Space")
    await expect(window["log"]).to_contain_text("1 added")


async def test_reduced_motion(windows: Windows) -> None:
    """With prefers-reduced-motion nothing is animated."""
    window = await windows.open(reduced_motion="reduce")
    order = await place_order(window)
    await window[f"order-{order}"].get_by_role("button").click()
    await expect(window[f"order-{order}"]).to_have_attribute("data-status", "paid")
    assert await window.page.evaluate(MOVING) == 0


@pytest.mark.parametrize("view", VIEWS)
async def test_nothing_moves(windows: Windows, sale: asyncpg.Connection, view: str) -> None:
    """Nothing that a window shows moves while events arrive from another."""
    other = await windows.one()
    window = await windows.open(**VIEWS[view])
    await window["orders"].scroll_into_view_if_needed()  # what is out of sight does not count
    for _ in range(2):
        order = await place_order(other)
        await other[f"order-{order}"].get_by_role("button").click()
        await expect(window[f"order-{order}"]).to_have_attribute("data-status", "paid")
    await window["lock-tree"].scroll_into_view_if_needed()
    await sale.execute("BEGIN; INSERT INTO till_sales (cents) VALUES (100)")
    await other["close-till"].click()
    await expect(window["lock-tree"]).to_contain_text("till_sales")
    await sale.execute("COMMIT")
    await expect(window["lock-tree"]).to_contain_text("Nobody waits")
    assert await window.shifts(after_input=True) == []
