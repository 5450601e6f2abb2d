"""Pictures of the page for the README, light and dark: `python -m examples.shop.picture`, which
writes docs/images.

They show a shop after some orders and provocations, while a sale waits for a till that is held.
"""

import asyncio
import re
from pathlib import Path
from typing import Literal

from playwright.async_api import Page, ViewportSize, expect

from examples.shop.app import create_app
from examples.shop.browser import chromium
from examples.shop.demo import database, own_schema
from examples.shop.serving import listen, serving
from examples.shop.settings import Settings

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SIZE: ViewportSize = {"width": 1280, "height": 800}
HELD = re.compile("is-held")
WAITING = re.compile(r"waits (0\.[3-9]|[1-9])")
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


async def draw(settings: Settings, folder: Path) -> None:
    """Start the shop, play, and write the pictures."""
    with listen("0") as listener:
        async with (
            own_schema(settings),
            serving(create_app(settings), listener) as address,
            chromium() as browser,
        ):
            page = await browser.new_page(viewport=SIZE, reduced_motion="reduce")
            await page.goto(f"{address}/")
            await play(page)
            while not await taken(page, folder):
                pass


async def play(page: Page) -> None:
    """Use the page until each part of it has something to show."""
    for number in range(1, 5):
        await page.get_by_test_id("place-order").click()
        await expect(page.get_by_test_id(f"order-{number}")).to_be_visible()
    for number, status in ((1, "paid"), (1, "sent"), (2, "paid")):
        await page.get_by_test_id(f"order-{number}").get_by_role("button").click()
        await expect(page.get_by_test_id(f"order-{number}-status")).to_have_text(status)
    for kind in ("swallowed-error", "hundred-waiters"):
        await page.get_by_test_id(f"provoke-{kind}").click()
        entry = page.get_by_test_id("log").locator(f"[data-kind$={kind}][data-outcome=kept]")
        await expect(entry).to_be_visible()


async def taken(page: Page, folder: Path) -> bool:
    """Let a closing and a sale wait for the till, and take the pictures; false where they waited
    not long enough for both."""
    tree = page.get_by_test_id("lock-tree")
    for name in ("hold-till", "close-till", "sell"):
        await page.get_by_test_id(name).click()
        await expect(page.get_by_test_id("till")).to_have_class(HELD)
    await expect(tree.locator("[data-pid]")).to_have_count(3)
    await expect(tree).to_contain_text(WAITING)
    for scheme in SCHEMES:
        await page.emulate_media(color_scheme=scheme)
        await page.screenshot(path=folder / f"demo-{scheme}.png")
    return await tree.locator("[data-pid]").count() == 3


def main() -> None:
    """Write both pictures, and say how large they are."""
    IMAGES.mkdir(exist_ok=True)
    with database() as settings:
        asyncio.run(draw(settings, IMAGES))
    for picture in sorted(IMAGES.glob("demo-*.png")):
        print(f"{picture.relative_to(IMAGES.parents[1])}: {picture.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
