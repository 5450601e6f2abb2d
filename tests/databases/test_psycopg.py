"""Databases over psycopg: the same answers as over asyncpg, and no need of asyncpg."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import suppress
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import make_url

from pgtoolset import create_database, drop_database
from pgtoolset.databases import seal_database
from pgtoolset.errors import DatabaseExistsError, DatabaseInUseError, DatabaseNotFoundError
from pgtoolset.testing import create_worker_database
from tests.support import plain_url

NAME = "pgtoolset psycopg, a copy"


@pytest.fixture
def url(server_url: str) -> str:
    return (
        make_url(server_url)
        .set(drivername="postgresql+psycopg")
        .render_as_string(hide_password=False)
    )


async def exists(connection: asyncpg.Connection, name: str) -> bool:
    return bool(await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name))


async def test_errors(url: str) -> None:
    """Each refusal of PostgreSQL is the error of ours, with what PostgreSQL says about it."""
    await create_database(NAME, server_url=url)
    with pytest.raises(DatabaseExistsError):
        await create_database(NAME, server_url=url)
    await create_database(NAME, server_url=url, exist_ok=True)
    inside = psycopg.AsyncConnection.connect(plain_url(url), dbname=NAME, autocommit=True)
    async with await inside as user:
        with pytest.raises(DatabaseInUseError, match="PostgreSQL says: There is 1 other") as used:
            await drop_database(NAME, server_url=url)
        assert [each.pid for each in used.value.sessions] == [user.info.backend_pid]
        await drop_database(NAME, server_url=url, force=True)
    with pytest.raises(DatabaseNotFoundError):
        await drop_database(NAME, server_url=url)
    with pytest.raises(DatabaseNotFoundError, match="template"):
        await create_database(NAME, server_url=url, template="pgtoolset that is not there")
    with pytest.raises(DatabaseNotFoundError):
        await seal_database(NAME, server_url=url)


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.06])
async def test_cancelled(url: str, other: asyncpg.Connection, delay: float) -> None:
    """A call that raises `CancelledError` has created nothing."""
    call = asyncio.create_task(create_database(NAME, server_url=url))
    await asyncio.sleep(delay)
    call.cancel()
    await asyncio.wait([call])
    # A cancellation that arrives while the connection is closed has come after the call.
    assert await exists(other, NAME) is not call.cancelled()
    await drop_database(NAME, server_url=url, missing_ok=True)


@pytest.mark.parametrize("method", ["connect", "execute"])
async def test_swallowed(url: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancellation that psycopg drops, because the answer arrives with it, ends the call."""
    await create_database(NAME, server_url=url)
    original = getattr(psycopg.AsyncConnection, method)
    answered = asyncio.Event()
    calls = 0

    async def dropping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        answer = await original(*args, **kwargs)
        answered.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return answer

    patch = staticmethod(dropping) if method == "connect" else dropping
    monkeypatch.setattr(psycopg.AsyncConnection, method, patch)
    call = asyncio.create_task(seal_database(NAME, server_url=url))
    await answered.wait()
    call.cancel()
    await asyncio.wait([call])
    monkeypatch.undo()
    await drop_database(NAME, server_url=url)
    assert call.cancelled()
    assert calls == 1


async def test_worker_database(url: str) -> None:
    """A worker's database is made, renamed, marked and dropped, and its URL keeps the driver."""
    async with create_worker_database(url, "psycopg", prefix="pgtoolset") as made:
        assert make_url(made).drivername == "postgresql+psycopg"


ALONE = """
import sys
sys.modules["asyncpg"] = None
import asyncio
from pgtoolset import create_database, create_db_context, drop_database
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

async def main(url):
    engine_url = url.replace("postgresql:", "postgresql+psycopg:")
    for each in (url, engine_url):
        await create_database("pgtoolset alone", server_url=each, exist_ok=True)
        await drop_database("pgtoolset alone", server_url=each)
    engine = create_async_engine(engine_url)
    async with create_db_context(async_sessionmaker(engine))() as session:
        print(await session.scalar(text("SELECT 'alone'")))
    await engine.dispose()

asyncio.run(main(sys.argv[1]))
"""


def test_psycopg_alone(server_url: str) -> None:
    """Without asyncpg a URL that names no driver is psycopg's, and units of work run."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALONE, plain_url(server_url)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (run.stdout, run.returncode) == ("alone\n", 0), run.stderr
