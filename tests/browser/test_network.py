"""What the page fetches, and what its policy refuses."""

from __future__ import annotations

from tests.browser.windows import ROOM, Windows

pytestmark = ROOM

#: Try what only an attacker would: a script in the page, and one from elsewhere.
INJECT = """
const scripts = [["textContent", "noted.injected = true"], ["src", "//elsewhere.test/"]];
for (const [name, value] of scripts)
  document.head.append(Object.assign(document.createElement("script"), { [name]: value }));
"""

TRANSFERRED = """
[...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
  .map(({ transferSize }) => transferSize).reduce((one, other) => one + other)
"""


async def test_policy(windows: Windows) -> None:
    """The browser refuses a script that is injected, in the page itself or from another host."""
    window = await windows.open()
    await window.page.evaluate(INJECT)
    await window.page.wait_for_function("() => noted.violations.length === 2")
    assert not await window.page.evaluate("noted.injected")
    await windows.close([window])  # which has two faults now


async def test_weight(windows: Windows) -> None:
    """A first visit fetches at most 100 KiB; a second one fetches no file that it has."""
    window = await windows.open()
    first = await window.page.evaluate(TRANSFERRED)
    assert 0 < first <= 100 * 1024
    await window.page.reload()
    await window.is_live()
    assert await window.page.evaluate(TRANSFERRED) < first / 2
