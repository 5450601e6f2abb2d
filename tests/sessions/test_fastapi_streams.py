"""Section 1 of the contract, "before the response": streams, generator endpoints and background
tasks, whose work is committed at their end."""

import time
from typing import Any

import asyncpg
import httpx
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.sessions.shop import SLOW, Shop, post_raw, stored_is
from tests.support import serving, stored, until


async def test_streaming(
    client: httpx.AsyncClient, slow_commit: None, other: asyncpg.Connection
) -> None:
    """streaming: the endpoint commits before the first byte, the stream at its end."""
    start = time.monotonic()
    response, writer = await post_raw(client, "/stream/false")
    await response.until("start\n")
    elapsed = time.monotonic() - start
    assert await stored(other) == {1}
    assert elapsed >= SLOW
    await response.until("end\n")
    await until(lambda: stored_is(other, {1, 2, 3}))
    writer.close()


async def test_streaming_that_fails(
    client: httpx.AsyncClient, other: asyncpg.Connection, engine: AsyncEngine
) -> None:
    """streaming: a stream that raises loses only what the stream wrote."""
    pool: Any = engine.pool
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post("/stream/true")
    await until(lambda: pool.checkedout() == 0)
    assert await stored(other) == {1}


async def test_client_disconnect(
    shop: Shop, engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """released: after clients hung up in a stream, every connection is back in the pool."""
    pool: Any = engine.pool
    errors: list[Exception] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await shop.app(scope, receive, send)
        except Exception as error:
            errors.append(error)
            raise

    async with (
        serving(app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for id_ in range(100, 110):
            response, writer = await post_raw(client, f"/endless/{id_}")
            await response.until("more\n")
            assert pool.checkedout() >= 1
            writer.close()
        await until(lambda: pool.checkedout() == 0)
        assert (await client.post("/items/1")).status_code == 201
    assert errors == []
    assert await stored(other) == {1}

    # The driver hangs up in the background; a loop that ended before would leave transactions open
    # on the server.
    async def gone() -> bool:
        return not await other.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"
            " AND datname = current_database() AND state <> 'idle'"
        )

    await until(gone)


async def test_background_task(client: httpx.AsyncClient, other: asyncpg.Connection) -> None:
    """A background task may still use the session; its work is committed when it has ended."""
    assert (await client.post("/background")).status_code == 200
    await until(lambda: stored_is(other, {1, 2}))
