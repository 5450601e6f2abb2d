"""`create_database` and `drop_database`, cancelled anywhere: nothing is half done."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import asyncpg
import pytest

from pgtoolset import create_database, drop_database
from tests.databases.making import PREFIX, exists
from tests.support import Interrupted, until

pytestmark = pytest.mark.usefixtures("databases_gone")


async def backends(other: asyncpg.Connection) -> int:
    query = """SELECT count(*) FROM pg_stat_activity
               WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"""
    return int(await other.fetchval(query))


async def test_create_is_cancelled_everywhere(server_url: str, other: asyncpg.Connection) -> None:
    """Cancelled at any suspension, a call has created nothing, and no connection stays behind."""
    before = await backends(other)
    for n in range(1, 100):
        name = f"{PREFIX} cancelled {n}"
        interrupted = Interrupted(create_database(name, server_url=server_url), n)

        async def run(interrupted: Interrupted = interrupted) -> None:
            await interrupted

        task = asyncio.create_task(run())
        await asyncio.wait([task], timeout=20)
        assert task.done(), n
        assert await exists(other, name) == (not task.cancelled()), n
        if not interrupted.happened:
            break
    else:
        raise AssertionError("never finished")
    assert n > 3

    async def gone() -> bool:
        gc.collect()  # a cancelled task may be in a cycle, and a half-open connection with it
        return await backends(other) <= before

    await until(gone)


async def test_create_is_cancelled_while_it_waits(
    server_url: str, other: asyncpg.Connection, connect_to: Any
) -> None:
    """Cancelled while PostgreSQL waits for the template, a call has created nothing."""
    model, copy = f"{PREFIX} model", f"{PREFIX} copy"
    await create_database(model, server_url=server_url)
    connection = await connect_to(model)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await create_database(copy, server_url=server_url, template=model)
    await connection.close()
    assert not await exists(other, copy)


async def test_drop_is_cancelled_everywhere(
    server_url: str, other: asyncpg.Connection, connect_to: Any
) -> None:
    """Cancelled at any suspension, a drop has happened or not: what is left can be entered."""
    name = f"{PREFIX} cancelled"
    for n in range(1, 100):
        await create_database(name, server_url=server_url, exist_ok=True)
        interrupted = Interrupted(drop_database(name, server_url=server_url), n)

        async def run(interrupted: Interrupted = interrupted) -> None:
            await interrupted

        task = asyncio.create_task(run())
        await asyncio.wait([task], timeout=20)
        assert task.done(), n
        if await exists(other, name):
            await (await connect_to(name)).close()
        if not interrupted.happened:
            break
    else:
        raise AssertionError("never finished")
