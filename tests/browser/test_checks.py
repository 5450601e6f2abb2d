"""The checks of the page: a page with each fault is found at fault."""

from __future__ import annotations

from playwright.async_api import Browser, Route

from tests.browser.windows import ROOM, Window, Windows
from tests.support import until

pytestmark = ROOM

SOUND = """<!doctype html><html lang="en"><title>Sound</title><meta name="viewport"
content="width=device-width"><main><h1>Sound</h1><p id="text">Text</p></main></html>"""

FAULTY = """<!doctype html><html><title>Faulty</title><meta name="viewport"
content="width=device-width"><main><section style="width: 9px"><button>A</button></section>
<h1>Faulty</h1><div id="above"></div>
<p style="width: 900px">Wide</p><img src="x.png"><script>inline()</script>
<script src="faulty.js"></script></main></html>"""

SCRIPT = """
console.error("an error");
fetch("http://elsewhere.test/").catch(() => {});
requestAnimationFrame(() => setTimeout(() => {
  document.getElementById("above").style.height = "300px";
  setTimeout(() => { throw new Error("uncaught") }, 100);
}, 100));
"""


async def serve(route: Route) -> None:
    """Answer for the host of the test alone."""
    path = route.request.url.rpartition("/")[2]
    bodies = {"sound": SOUND, "faulty": FAULTY, "faulty.js": SCRIPT, "x.png": ""}
    if not route.request.url.startswith("http://page.test/"):
        await route.abort()
        return
    await route.fulfill(
        body=bodies[path],
        content_type="text/javascript" if path.endswith(".js") else "text/html",
        headers={"Content-Security-Policy": "default-src * ; style-src 'unsafe-inline'"},
    )


async def opened(browser: Browser, path: str) -> Window:
    window = await Windows(browser, "").new(
        "http://page.test", viewport={"width": 360, "height": 640}
    )
    await window.page.route("**/*", serve)
    await window.page.goto(f"http://page.test/{path}")
    return window


async def test_sound_page(browser: Browser) -> None:
    """The checks find nothing in a page without faults."""
    window = await opened(browser, "sound")
    try:
        assert await window.violations() == []
        assert await window.overflow() == 0
        assert await window.cut_off() == []
        assert await window.all_faults() == []
    finally:
        await window.page.context.close()


async def test_faulty_page(browser: Browser) -> None:
    """The checks find each of the faults of a page that has them all."""
    window = await opened(browser, "faulty")
    try:
        await window.page.wait_for_function("() => noted.shifts.length > 0")
        await until(lambda: "exception: uncaught" in window.faults)
        faults = "\n".join(await window.all_faults())
        for fault in (
            "console: an error",
            "exception: uncaught",
            "request: http://elsewhere.test/",
            "Content-Security-Policy: script-src",
            "layout shift of",
        ):
            assert fault in faults
        assert {finding.partition(":")[0] for finding in await window.violations()} >= {
            "html-has-lang",
            "image-alt",
        }
        assert await window.overflow() > 0
        assert await window.cut_off() == ["<button>A</button>"]
    finally:
        await window.page.context.close()
