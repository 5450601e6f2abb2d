"""The files of the shop's page: small, whole, from nowhere else, and kept by the browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from examples.shop.db import LABELS
from examples.shop.page.site import STATIC

from tests.docs.served_shop import ROOM, Served

pytestmark = ROOM

FILES = sorted(STATIC.iterdir())
TESTED = """
    orders place-order till sell close-till hold-till lock-tree log connection-state
    counter-connections counter-waiters counter-requests counter-rolled-back counter-errors
    provoke-swallowed-error provoke-failing-commit provoke-hundred-waiters
    provoke-killed-connection
"""


class Page(HTMLParser):
    """What the page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed((STATIC / "index.html").read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def values(self, name: str, tag: str | None = None) -> list[str]:
        """The values of an attribute, of all tags or of one kind."""
        return [
            value
            for each, attributes in self.tags
            if tag in (None, each) and (value := attributes.get(name)) is not None
        ]


async def test_page(shop: Served) -> None:
    """The page, and each file that it names, is served, under a policy that allows no other place
    and nothing inline."""
    page = Page()
    names = [name for name in page.values("href") + page.values("src") if name[0] == "/"]
    for path in ["/", *names]:
        response = await shop.http.get(path)
        assert response.status_code == 200, path
        if path != "/docs":
            policy = response.headers["content-security-policy"]
            assert "default-src 'self'" in policy and "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
    assert not page.values("style") and not [
        name for _, attributes in page.tags for name in attributes if name.startswith("on")
    ]
    assert all(attributes.get("src") for tag, attributes in page.tags if tag == "script")
    assert not any(tag == "style" for tag, _ in page.tags)


async def test_cached(shop: Served) -> None:
    """A browser asks again for what it has, and gets 304 without a body."""
    for path in ["/", "/page/main.js", "/page/page.css"]:
        first = await shop.http.get(path)
        again = await shop.http.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b""), path
        assert first.headers["cache-control"] == again.headers["cache-control"] == "no-cache"


async def test_nothing_beside_the_files(shop: Served) -> None:
    """What is not a file of the page is a 404, the program's own source too."""
    for path in ["/page/none.js", "/page/..%2fsite.py", "/page/%2e%2e/live.py", "/page/"]:
        assert (await shop.http.get(path)).status_code == 404, path
    assert (await shop.http.post("/")).status_code == 405


def test_weight() -> None:
    """All files together have less than 60 kB, each module less than 250 lines, and no address of
    another place."""
    assert sum(path.stat().st_size for path in FILES) < 60_000
    for path in FILES:
        text = path.read_text()
        assert path.suffix != ".js" or len(text.splitlines()) < 250, path
        assert not re.search(r"(https?:)?//(?!www\.w3\.org/2000/svg)\w+\.\w", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".js"], ids=str)
def test_modules(path: Path) -> None:
    """A module imports names that the other module exports."""
    for names, module in re.findall(r"import (.+?) from \"\./(.+?)\"", path.read_text()):
        exported = set(
            re.findall(r"export (?:async )?(?:function|const) (\w+)", (STATIC / module).read_text())
        )
        assert exported
        if names.startswith("{"):
            assert set(re.findall(r"\w+", names)) <= exported, module


async def test_what_the_page_knows(shop: Served) -> None:
    """The products and tags that the page names are those that the database has; each label names
    an element, and no id stands twice."""
    page = Page()
    async with shop.window() as window:
        products = await window.until("products")
    assert page.values("data-sku") == [product["sku"] for product in products]
    assert page.values("value", "input") == len(products) * list(LABELS)
    stored = await shop.database.fetch("SELECT name FROM tags")
    assert set(LABELS) <= {row["name"] for row in stored}
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert set(page.values("aria-labelledby")) <= set(ids)
    marks = [f"{kind}-{sku}" for sku in page.values("data-sku") for kind in ("tags", "save-tags")]
    assert set(page.values("data-testid")) >= {*TESTED.split(), *marks}
