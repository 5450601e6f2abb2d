"""`create_database` and `drop_database`: any name, what exists or is missing, and races."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from pgtoolset import DatabaseExistsError, DatabaseNotFoundError, create_database, drop_database
from pgtoolset.databases import seal_database
from tests.databases.making import PREFIX, exists

pytestmark = pytest.mark.usefixtures("databases_gone")

NAMES = [
    "plain",
    "MixedCase",
    'two words, a "quote"; DROP TABLE item; --',
    "per%cent & ampersand ? # / \\ $$",
    "ünïcödé 数据库 🐘",
    "x" * (63 - len(PREFIX) - 1),
    "ü" * ((63 - len(PREFIX) - 1) // 2),
    " blank at both ends ",
    "new\nline",
]


# Names


@pytest.mark.parametrize("suffix", NAMES)
async def test_any_name(
    server_url: str, other: asyncpg.Connection, connect_to: Callable[..., Any], suffix: str
) -> None:
    """Every name that PostgreSQL can hold makes a database of exactly that name."""
    name = f"{PREFIX} {suffix}"
    await create_database(name, server_url=server_url)
    connection = await connect_to(name)
    assert await connection.fetchval("SELECT current_database()") == name
    await connection.close()
    await drop_database(name, server_url=server_url)
    assert not await exists(other, name)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", ValueError),
        ("x" * 64, ValueError),
        ("ü" * 32, ValueError),
        ("a\0b", ValueError),
        ("\ud800", ValueError),
        (None, TypeError),
        (b"bytes", TypeError),
        (7, TypeError),
    ],
)
async def test_bad_names(name: Any, error: type[Exception]) -> None:
    """A name that PostgreSQL cannot hold is refused before any SQL: there is no server here."""
    nowhere = "postgresql://nobody@127.0.0.1:1/nothing"
    with pytest.raises(error, match="db_name"):
        await create_database(name, server_url=nowhere)
    with pytest.raises(error, match="db_name"):
        await drop_database(name, server_url=nowhere)
    with pytest.raises(error, match="db_name"):
        await seal_database(name, server_url=nowhere)
    if name is not None:
        with pytest.raises(error, match="template"):
            await create_database("fine", server_url=nowhere, template=name)


# There already, not there


async def test_exists_already(server_url: str, connect_to: Callable[..., Any]) -> None:
    """A database that exists is an error, or with exist_ok accepted and left as it is."""
    name = f"{PREFIX} twice"
    await create_database(name, server_url=server_url)
    connection = await connect_to(name)
    await connection.execute("CREATE TABLE kept ()")
    with pytest.raises(DatabaseExistsError, match=name):
        await create_database(name, server_url=server_url)
    await create_database(name, server_url=server_url, exist_ok=True)
    assert await connection.fetchval("SELECT to_regclass('kept')") == "kept"
    await connection.close()


async def test_not_there(server_url: str) -> None:
    """A missing database cannot be dropped, sealed or copied; missing_ok accepts it."""
    name = f"{PREFIX} missing"
    with pytest.raises(DatabaseNotFoundError, match=name):
        await drop_database(name, server_url=server_url)
    await drop_database(name, server_url=server_url, missing_ok=True)
    with pytest.raises(DatabaseNotFoundError, match=name):
        await seal_database(name, server_url=server_url)
    with pytest.raises(DatabaseNotFoundError, match=name):
        await create_database(f"{PREFIX} copy", server_url=server_url, template=name)


async def test_created_by_many_at_once(server_url: str, other: asyncpg.Connection) -> None:
    """Of many calls at a time one creates the database, and the others learn that it exists."""
    for number in range(3):
        name = f"{PREFIX} race {number}"
        await asyncio.gather(
            *(create_database(name, server_url=server_url, exist_ok=True) for _ in range(6))
        )
        assert await exists(other, name)
        name = f"{PREFIX} strict race {number}"
        results = await asyncio.gather(
            *(create_database(name, server_url=server_url) for _ in range(6)),
            return_exceptions=True,
        )
        assert results.count(None) == 1
        assert all(result is None or isinstance(result, DatabaseExistsError) for result in results)
