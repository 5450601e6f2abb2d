"""A job of a queue in PostgreSQL, enqueued in the transaction of a session."""

from __future__ import annotations

import pytest
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries
from procrastinate import App, PsycopgConnector
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from pgtoolset import create_db_context, driver_connection
from tests.support import plain_url


async def with_procrastinate(session: AsyncSession, app: App, number: int) -> None:
    async with driver_connection(session) as connection:
        await app.configure_task("send_receipt", connection=connection).defer_async(order=number)


async def with_pgqueuer(session: AsyncSession, number: int) -> None:
    async with driver_connection(session) as connection:
        await Queries(AsyncpgDriver(connection)).enqueue("send_receipt", b"%d" % number)


async def test_procrastinate(empty_database: str) -> None:
    """A job of procrastinate is stored with the work of the session, and gone with its rollback."""
    app = App(connector=PsycopgConnector(conninfo=plain_url(empty_database).replace(" ", "%20")))
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
    engine = create_async_engine(
        make_url(empty_database).set(drivername="postgresql+psycopg"), poolclass=NullPool
    )
    db_context = create_db_context(async_sessionmaker(engine))
    async with db_context() as session:
        await session.execute(text("CREATE TABLE paid (number int)"))
    for number in (1, 2):
        try:
            async with db_context() as session:
                await session.execute(text("INSERT INTO paid VALUES (:n)"), {"n": number})
                await with_procrastinate(session, app, number)
                if number == 2:
                    raise KeyError
        except KeyError:
            pass
    async with db_context() as session:
        jobs = await session.execute(text("SELECT args ->> 'order' FROM procrastinate_jobs"))
        assert jobs.scalars().all() == ["1"]
        assert (await session.scalars(text("SELECT number FROM paid"))).all() == [1]
    await engine.dispose()


@pytest.mark.asyncpg(reason="pgqueuer takes its connection here")
async def test_pgqueuer(empty_database: str) -> None:
    """A job of pgqueuer is stored with the work of the session, and gone with its rollback."""
    engine = create_async_engine(
        make_url(empty_database).set(drivername="postgresql+asyncpg"), poolclass=NullPool
    )
    db_context = create_db_context(async_sessionmaker(engine))
    async with db_context() as session:
        async with driver_connection(session) as connection:
            await Queries(AsyncpgDriver(connection)).install()
        await session.execute(text("CREATE TABLE paid (number int)"))
    for number in (1, 2):
        try:
            async with db_context() as session:
                await session.execute(text("INSERT INTO paid VALUES (:n)"), {"n": number})
                await with_pgqueuer(session, number)
                if number == 2:
                    raise KeyError
        except KeyError:
            pass
    async with db_context() as session:
        jobs = await session.execute(text("SELECT payload FROM pgqueuer"))
        assert jobs.scalars().all() == [b"1"]
        assert (await session.scalars(text("SELECT number FROM paid"))).all() == [1]
    await engine.dispose()
