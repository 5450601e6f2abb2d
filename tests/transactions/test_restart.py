"""A server that is restarted as by a crash, under a load of concurrent writers."""

import asyncio
import logging
from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from pgtoolset import create_db_context, create_db_dependency, get_transaction
from pgtoolset.testing import EmbeddedServer
from tests.support import DRIVERNAME, Base, insert, serving, until

WRITERS = 12
RESTARTS = 3


async def test_every_acknowledged_write_is_there(caplog: pytest.LogCaptureFixture) -> None:
    """Three crashes under load: each acknowledged write is stored, and the pool is whole."""
    caplog.set_level(logging.CRITICAL, "sqlalchemy.pool")
    server = await asyncio.to_thread(_started)
    engine = create_async_engine(server.url(driver=DRIVERNAME), pool_size=5, max_overflow=0)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        maker = async_sessionmaker(engine)
        app = FastAPI()
        get_db = create_db_dependency(maker)

        @app.post("/items/{id_}", status_code=201)
        async def create(id_: int, session: Annotated[AsyncSession, Depends(get_db)]) -> None:
            async with get_transaction(session):
                await insert(session, id_)

        acknowledged: set[int] = set()
        failed: set[int] = set()
        stopped = asyncio.Event()

        async def write(client: httpx.AsyncClient, writer: int) -> None:
            n = 0
            while not stopped.is_set():
                n += 1
                id_ = writer * 1_000_000 + n
                response = await client.post(f"/items/{id_}")
                if response.status_code == 201:
                    acknowledged.add(id_)
                else:
                    failed.add(id_)
                    await asyncio.sleep(0.01)

        async def restart() -> None:
            for _ in range(RESTARTS):
                before = len(acknowledged)
                await until(lambda: len(acknowledged) >= before + 50)  # noqa: B023
                met = len(failed)
                await asyncio.to_thread(server.shut_down, immediate=True)
                await until(lambda: len(failed) > met)  # noqa: B023
                await asyncio.to_thread(server.resume)
            before = len(acknowledged)
            await until(lambda: len(acknowledged) >= before + 50)
            stopped.set()

        async with (
            serving(app) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
        ):
            async with asyncio.TaskGroup() as group:
                for writer in range(1, WRITERS + 1):
                    group.create_task(write(client, writer))
                group.create_task(restart())

        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        async with create_db_context(maker)() as session:
            stored = set((await session.scalars(text("SELECT id FROM item"))).all())
        assert acknowledged <= stored
        # A COMMIT whose answer was lost with the connection may be stored; nothing else may.
        assert stored - acknowledged <= failed
    finally:
        await engine.dispose()
        await asyncio.to_thread(server.stop)


def _started() -> EmbeddedServer:
    server = EmbeddedServer()
    server.start()
    return server
