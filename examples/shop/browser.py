"""Headless Chromium, for the tests of the page, its figures and its picture."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, async_playwright, expect

#: Debian's Chromium, or the Chrome of a machine that has it.
PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")

#: Without a sandbox, which root cannot have, and with no traffic of the browser's own.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

#: Milliseconds for what is expected, on a machine that is busy with something else.
PATIENCE = 60_000

expect.set_options(timeout=PATIENCE)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser with a new profile, until the block ends."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=PROGRAM, args=FLAGS)
        try:
            yield browser
        finally:
            await browser.close()
