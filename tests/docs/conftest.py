"""A database and a folder for the programs that the pages show."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.docs.served_shop import open_shop, shop

__all__ = ["open_shop", "shop"]


@pytest.fixture
def no_blocking_calls(blockbuster: BlockBuster) -> None:
    """A page may block its event loop: it is a script, and starts servers."""
    blockbuster.deactivate()


@pytest.fixture
async def empty_database_url(
    engine: AsyncEngine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    """An empty database of the page's own, in DATABASE_URL."""
    async with engine.connect() as connection:
        connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.exec_driver_sql("DROP DATABASE IF EXISTS pgtoolset_docs WITH (FORCE)")
        await connection.exec_driver_sql("CREATE DATABASE pgtoolset_docs")
    base, _, query = database_url.partition("?")
    url = f"{base.rpartition('/')[0]}/pgtoolset_docs" + (f"?{query}" if query else "")
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # it names databases
    return url


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the files that a page shows; what is imported from it is forgotten."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
