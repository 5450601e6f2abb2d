"""The documentation runs: every Python block of the pages, and the example of every public
docstring."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import re
import sys
import tomllib
from pathlib import Path
from types import CodeType, ModuleType
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

import pgtoolset
import pgtoolset.fastapi
import pgtoolset.observe
from pgtoolset import testing
from tests import support
from tests.docs import howtos
from tests.m2m import models as m2m_models

ROOT = Path(__file__).parents[2]
PAGES = {
    str(page): page.read_text()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *howtos.PAGES]
}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


async def execute(source: str, filename: str, line: int, namespace: dict[str, Any]) -> None:
    """Run statements in which `await` may stand at the top level."""
    tree = ast.parse("\n" * line + source, filename)
    code: CodeType = compile(tree, filename, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, namespace)
    if inspect.iscoroutine(result):
        await result


#: Frameworks of the pages, each in blocks that need no other one. Where one is not installed, its
#: blocks are skipped; the extra `dev` installs all.
OPTIONAL = {
    "celery",
    "alembic",
    "click",
    "fast_depends",
    "faststream",
    "litestar",
    "pgqueuer",
    "procrastinate",
    "sqlmodel",
    "strawberry",
    "taskiq",
    "typer",
    "uvloop",
}


def missing_packages(source: str) -> set[str]:
    """Return the optional packages that a block imports and that are not installed."""
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    return {name for name in imported & OPTIONAL if importlib.util.find_spec(name) is None}


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of a module of its own, where SQLAlchemy can look up annotations."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    return vars(module)


@pytest.mark.asyncpg(reason="the snippets of the documentation")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(Path(page).relative_to(ROOT)))
async def test_page(
    page: str, empty_database_url: str, namespace: dict[str, Any], folder: Path
) -> None:
    """The blocks of a page run from top to bottom, as one program; those of a how-to beside the
    files that it shows."""
    content = PAGES[page]
    if Path(page).parent == howtos.FOLDER:
        howtos.write_files(Path(page).name, folder)
    for block in BLOCK.finditer(content):
        if missing_packages(block.group(1)):
            continue
        line = content[: block.start(1)].count("\n")
        await execute(block.group(1), page, line, namespace)


#: Lists, pages for the developers of pgtoolset, and pages with tests of their own.
WITHOUT_BLOCKS = {
    "architecture.md",
    "benchmarks.md",
    "compatibility.md",
    "index.md",
    "testing-of-pgtoolset.md",
    "tutorial.md",
}


def test_pages_have_blocks() -> None:
    """The pattern finds every block of every page."""
    for page, content in PAGES.items():
        assert len(BLOCK.findall(content)) == content.count("```python"), page
        assert "```python" in content or Path(page).name in WITHOUT_BLOCKS, page


def test_optional_packages_are_in_the_extra() -> None:
    """The extra `dev` installs what the blocks need, so that no block is skipped in silence."""
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = " ".join(dev["dev"])
    comes_with_another = {"click", "fast_depends"}
    assert all(name in names for name in OPTIONAL - comes_with_another)


#: Classes whose docstring has the example, in place of their methods.
CLASSES = {
    "EmbeddedServer",
    "ManualClock",
    "MemoryAssociations",
    "MemoryDatabase",
    "MemoryLocks",
    "MemoryWatcher",
}

DOCUMENTED = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (pgtoolset, testing, pgtoolset.fastapi, pgtoolset.observe)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name)) or name in CLASSES
}


class CardDeclined(Exception):
    pass


@pytest.mark.asyncpg(reason="the snippets of the documentation")
@pytest.mark.parametrize("name", DOCUMENTED)
async def test_docstring_example(
    name: str, engine: AsyncEngine, database_url: str, namespace: dict[str, Any]
) -> None:
    """The example in the docstring of every public function runs."""
    docstring = inspect.getdoc(DOCUMENTED[name]) or ""
    examples = doctest.DocTestParser().get_examples(docstring)
    assert examples, f"{name} has no example"
    session_maker = async_sessionmaker(engine, expire_on_commit=False)

    async def charge(order: support.Item) -> None:
        raise CardDeclined

    async def exchange_rate() -> int:
        return 2

    if "Account" in docstring:
        async with session_maker.begin() as session:
            session.add(support.Account(id=1, balance=100))
    if name.startswith("pgtoolset.m2m_"):
        await m2m_models.create(engine)
        await m2m_models.empty(engine)
        async with session_maker.begin() as session:
            session.add_all(
                [m2m_models.Post(id=1), *(m2m_models.Tag(key=number) for number in (1, 2, 3))]
            )
    async with session_maker() as session:
        if name.startswith("pgtoolset.m2m_"):
            namespace["post"] = await session.get_one(m2m_models.Post, 1)
            namespace["tag"] = await session.get_one(m2m_models.Tag, 1)
            await session.commit()
        namespace |= {name: getattr(pgtoolset, name) for name in pgtoolset.__all__}
        namespace |= {name: getattr(testing, name) for name in testing.__all__}
        namespace |= {name: getattr(pgtoolset.observe, name) for name in pgtoolset.observe.__all__}
        namespace |= {
            "Account": support.Account,
            "Annotated": Annotated,
            "AsyncSession": AsyncSession,
            "Base": support.Base,
            "CardDeclined": CardDeclined,
            "Depends": Depends,
            "Order": Order,
            "OrderIn": int,
            "OrderOut": int,
            "Post": m2m_models.Post,
            "Tag": m2m_models.Tag,
            "app": FastAPI(),
            "async_sessionmaker": async_sessionmaker,
            "charge": charge,
            "create_async_engine": create_async_engine,
            "engine": engine,
            "events": Events,
            "exchange_rate": exchange_rate,
            "order": support.Item(id=1),
            "replicas": pgtoolset.ReadReplicas(session_maker, []),
            "session": session,
            "session_maker": session_maker,
            "url": database_url,
        }
        for example in examples:
            await execute(example.source, name, 0, namespace)


class Order(support.Item):
    """An item under the name that the examples use."""

    def __init__(self, customer: str) -> None:
        super().__init__(id=2, name=customer)


class Events:
    @staticmethod
    def publish(event: str) -> None:
        assert event
