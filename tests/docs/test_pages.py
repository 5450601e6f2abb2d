"""The pages: a README that is short and runs, lists that are complete, and no dead link."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import httpx
import pytest

import pgtoolset
import pgtoolset.fastapi
from pgtoolset import errors, protocols, testing, types, values

#: The same on every version.
pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *ROOT.glob("[A-Z]*.md"), *(ROOT / "docs").glob("*.md")])
PAGES += [*(ROOT / "docs" / "reference").glob("*.md"), ROOT / "benchmarks" / "README.md"]
REPOSITORY = "https://github.com/pgtoolset/pgtoolset/blob/main/"

LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def links_of(page: Path) -> list[str]:
    """Return the targets of the links outside of blocks of code."""
    return LINK.findall(BLOCK.sub("", page.read_text()))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(BLOCK.sub("", page.read_text()))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_short() -> None:
    """The README has at most 600 words."""
    assert len(README.split()) <= 600


def test_links_of_the_readme_are_absolute() -> None:
    """A package index resolves no relative link."""
    assert all(link.startswith("https://") for link in LINK.findall(README))
    assert any(link.startswith(REPOSITORY) for link in LINK.findall(README))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Each link inside of the repository leads to a file, and to a heading of it."""
    for link in links_of(page):
        if link.startswith(REPOSITORY):
            base, link = ROOT, link.removeprefix(REPOSITORY)
        elif link.startswith(("https://", "http://", "mailto:")):
            continue
        else:
            base = page.parent
        path, _, anchor = link.partition("#")
        target = (base / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


def test_index() -> None:
    """docs/index.md leads to every other page."""
    listed = set(links_of(ROOT / "docs" / "index.md"))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert pages - {"index.md"} <= listed


@pytest.mark.parametrize(
    "module", [pgtoolset, pgtoolset.fastapi, errors, protocols, testing, types, values]
)
def test_reference(module: ModuleType) -> None:
    """The reference has every public name."""
    reference = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    if f"automodule:: {module.__name__}\n" in reference:
        return
    shown = set(re.findall(r"^\.\. auto\w+:: pgtoolset\.(\w+)$", reference, re.MULTILINE))
    elsewhere = {*errors.__all__, *values.__all__, *types.__all__, "IsolationLevel"}
    assert set(module.__all__) - shown - elsewhere == {"implementation"}


@pytest.mark.asyncpg(reason="the program of the README")
async def test_program(database_url: str, tmp_path: Path) -> None:
    """The first block is a program that `uvicorn app:app` serves as it stands."""
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert program is not None
    (tmp_path / "app.py").write_text(program[1])
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "app:app", "--port", "0"),
        cwd=tmp_path,
        env={**os.environ, "DATABASE_URL": database_url},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert server.stderr is not None
        async for line in server.stderr:
            if address := re.search(r"running on (http://[\d.:]+)", line.decode()):
                break
        else:
            pytest.fail("uvicorn has not started")
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"{address[1]}/time")
        assert answer.status_code == 200
        assert re.fullmatch(r'"\d{4}-\d\d-\d\d .*"', answer.text)
    finally:
        server.terminate()
        await server.communicate()
