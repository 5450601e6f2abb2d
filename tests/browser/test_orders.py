"""Orders: what happens in one window shows in every other."""

from __future__ import annotations

from playwright.async_api import Locator, expect

from tests.browser.conftest import Shop
from tests.browser.windows import ROOM, Window, Windows, place_order
from tests.support import at_best

pytestmark = ROOM

#: Note when a button is pressed here, in milliseconds of the clock that all windows share.
NOTE_CLICKS = "addEventListener('click', () => { noted.clicked = Date.now() }, true)"

#: Note when the status of an order changes here.
NOTE_STATUS = """
id => new MutationObserver(() => {
  const status = document.querySelector(`[data-testid="order-${id}"]`)?.dataset.status;
  if (status !== noted.status) [noted.status, noted.changed] = [status, Date.now()];
}).observe(document.body, { subtree: true, childList: true, attributes: true })
"""


def move_on(window: Window, order: int) -> Locator:
    """The control that moves an order on."""
    return window[f"order-{order}"].get_by_role("button")


async def status_of(shop: Shop, order: int) -> str:
    return str(await shop.database.fetchval("SELECT status FROM orders WHERE id = $1", order))


async def test_new_order(windows: Windows, shop: Shop) -> None:
    """A new order appears in both windows, and is in the database."""
    one, other = await windows.two()
    order = await place_order(one)
    await expect(other[f"order-{order}"]).to_have_attribute("data-status", "placed")
    assert await status_of(shop, order) == "placed"


async def test_order_moves(windows: Windows, shop: Shop) -> None:
    """An order that is moved on in one window is moved in the other, from the first status to the
    last."""
    one, other = await windows.two()
    order = await place_order(one)
    for window, status in ((one, "paid"), (other, "sent"), (one, "received")):
        await move_on(window, order).click()
        for each in (one, other):
            await expect(each[f"order-{order}-status"]).to_have_text(status)
            await expect(each[f"order-{order}"]).to_have_attribute("data-status", status)
        assert await status_of(shop, order) == status


async def test_within_a_second(windows: Windows) -> None:
    """The other window shows a click within a second; on a busy machine, the best of several."""
    one, other = await windows.two()
    await one.page.evaluate(NOTE_CLICKS)

    async def click() -> bool:
        order = await place_order(one)
        await other.page.evaluate(NOTE_STATUS, order)
        await move_on(one, order).click()
        await other.page.wait_for_function("() => noted.status === 'paid'")
        clicked = await one.page.evaluate("noted.clicked")
        return bool(await other.page.evaluate("noted.changed") - clicked <= 1000)

    await at_best(click)


async def test_order_of_another_program(windows: Windows, shop: Shop) -> None:
    """A window shows what another program commits, and not what it rolls back."""
    window = await windows.one()
    order = await place_order(window)
    change = "UPDATE orders SET status = $2 WHERE id = $1"
    transaction = shop.database.transaction()
    await transaction.start()
    await shop.database.execute(change, order, "received")
    await transaction.rollback()
    await shop.database.execute(change, order, "sent")
    await expect(window[f"order-{order}"]).to_have_attribute("data-status", "sent")
