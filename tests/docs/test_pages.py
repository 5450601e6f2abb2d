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
from tests.docs import howtos

#: The same on every version.
pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *ROOT.glob("[A-Z]*.md"), *(ROOT / "docs").glob("*.md")])
PAGES += [*(ROOT / "docs" / "reference").glob("*.md"), ROOT / "benchmarks" / "README.md"]
PAGES += howtos.PAGES
REPOSITORY = "https://github.com/pgtoolset/pgtoolset/blob/main/"

#: The pages of the capabilities, which all have the same order; a new one joins them by its first
#: heading.
WHEN = "When to use it"
LISTED = {
    "cluster.md",
    "command-line.md",
    "connections.md",
    "databases.md",
    "deadlines.md",
    "doubles.md",
    "errors.md",
    "locks.md",
    "m2m.md",
    "native.md",
    "outside-fastapi.md",
    "poolers.md",
    "replicas.md",
    "sessions.md",
    "tenants.md",
    "testing.md",
    "transactions.md",
    "watching.md",
}
CAPABILITIES = sorted(
    LISTED
    | {page.name for page in (ROOT / "docs").glob("*.md") if f"\n## {WHEN}\n" in page.read_text()}
)
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
    docs = ROOT / "docs"
    listed = set(links_of(docs / "index.md"))
    listed |= {f"howto/{link}" for link in links_of(docs / "howto" / "index.md")}
    pages = {str(page.relative_to(docs)) for page in [*docs.glob("*.md"), *howtos.PAGES]}
    assert pages - {"index.md"} <= listed


def sections_of(page: Path) -> dict[str, str]:
    """Return the text of each section of the second level, by its heading."""
    marked = BLOCK.sub(lambda block: block[0].replace("\n#", "\n #"), page.read_text())
    _, *sections = re.split(r"^## ", marked, flags=re.MULTILINE)
    split = [section.partition("\n") for section in sections]
    assert len({heading for heading, _, _ in split}) == len(split), "a heading stands twice"
    return {heading: text.strip() for heading, _, text in split}


@pytest.mark.parametrize("name", CAPABILITIES)
def test_order_of_a_capability(name: str) -> None:
    """A page says when to use it, then shows a recipe, then the guarantees, and at last the
    limits."""
    sections = sections_of(ROOT / "docs" / name)
    first, second, *_ = sections
    *_, last_but_one, last = sections
    assert [first, second] == [WHEN, "Recipe"]
    assert [last_but_one, last] == ["Guarantees", "Limits"]
    assert all(sections.values())
    assert re.search(r"^```(python|ini|console)$", sections["Recipe"], re.MULTILINE)


@pytest.mark.parametrize("page", howtos.PAGES, ids=lambda page: page.name)
def test_order_of_a_how_to(page: Path) -> None:
    """A how-to shows a recipe first, and pitfalls at last."""
    if page.name != "index.md":
        first, *_, last = sections_of(page)
        assert (first, last) == ("Recipe", "Pitfalls")


@pytest.mark.parametrize("page", [*CAPABILITIES, *(f"howto/{page.name}" for page in howtos.PAGES)])
def test_first_sentence(page: str) -> None:
    """The first sentence of a page is an instruction that says when: "Use ... where ..."."""
    text = (ROOT / "docs" / page).read_text()
    first = re.search(r"\A# [^\n]+\n\n(?:## When to use it\n\n)?(.+?[.:])\s", text, re.DOTALL)
    assert first is not None
    sentence = " ".join(first[1].split())
    assert re.fullmatch(r"(Use|Read) .*\b(where|when|before|in tests)\b.*", sentence), sentence


def test_errors() -> None:
    """docs/errors.md says of each error when, what to do, and the HTTP status."""
    rows = re.findall(
        r"^\| `(\w+Error)` \| (.*) \|$", sections_of(ROOT / "docs/errors.md")["Every error"], re.M
    )
    assert {name for name, _ in rows} == set(errors.__all__)
    for name, cells in rows:
        when, what_to_do, status = cells.split(" | ")
        assert len(when) > 8 and len(what_to_do) > 8, name
        assert re.fullmatch(r"[45]\d\d", status), name


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
