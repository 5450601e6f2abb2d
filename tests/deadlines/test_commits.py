"""A COMMIT is never cut by a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    create_db_context,
    deadline,
    get_transaction,
    on_commit,
    run_transaction,
)
from pgtoolset.testing import EmbeddedServer
from tests.deadlines.lengths import growing, in_time
from tests.nodes import execute
from tests.support import DRIVERNAME, insert, stored, until

Maker = async_sessionmaker[AsyncSession]


@pytest.fixture
async def slow_commit(other: asyncpg.Connection) -> AsyncIterator[None]:
    """A deferred constraint whose check takes a second."""
    await other.execute(
        """CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql
           AS 'BEGIN PERFORM pg_sleep(1); RETURN NULL; END';
           CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION slow()"""
    )
    yield
    await other.execute("DROP FUNCTION slow CASCADE")


@pytest.mark.parametrize(
    "kind", ["unit", "explicit", "block", "run", "resolved", "released", "plain"]
)
@in_time(*[0.5] * 10)
async def test_deferred_constraint(
    seconds: float,
    session_maker: Maker,
    engine: AsyncEngine,
    slow_commit: None,
    other: asyncpg.Connection,
    kind: str,
) -> None:
    """A COMMIT that takes longer than the time that is left is stored, without an error."""
    called: list[int] = []
    with deadline(seconds):
        if kind in ("unit", "resolved", "explicit", "released"):
            resolve = 60 if kind == "resolved" else None
            async with create_db_context(session_maker, resolve_commit=resolve)() as session:
                if kind == "released":
                    async with get_transaction(session):
                        await insert(session, 1)
                else:
                    await insert(session, 1)
                on_commit(session, lambda: called.append(1))
                if kind == "explicit":
                    await session.commit()
        elif kind == "block":
            async with session_maker() as session, get_transaction(session):
                await insert(session, 1)
                on_commit(session, lambda: called.append(1))
        elif kind == "run":

            async def work(session: AsyncSession) -> None:
                await insert(session, 1)
                on_commit(session, lambda: called.append(1))

            await run_transaction(session_maker, work)
        else:
            async with engine.begin() as connection:
                await connection.execute(text("INSERT INTO item VALUES (1, '')"))
    assert await stored(other) == {1}
    assert called == ([] if kind == "plain" else [1])


@growing
async def test_after_the_deadline(
    seconds: float, session_maker: Maker, other: asyncpg.Connection
) -> None:
    """A block that has done its work in time is committed, however long its code takes."""
    with deadline(seconds):
        async with create_db_context(session_maker)() as session:
            await insert(session, 1)
            await asyncio.sleep(seconds + 0.1)
    assert await stored(other) == {1}


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    """A server whose commits may wait for ever."""
    with EmbeddedServer() as server:
        yield server


async def test_synchronous_replication(server: EmbeddedServer) -> None:
    """A COMMIT waits for its synchronous standby, also after the deadline."""
    engine = create_async_engine(server.url(driver=DRIVERNAME))
    db_context = create_db_context(async_sessionmaker(engine))
    try:
        async with db_context() as session:
            await session.execute(text("CREATE TABLE item (id int, name text)"))
        await execute(server, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        await execute(server, "SELECT pg_reload_conf()")

        async def is_set(value: str) -> bool:
            return bool(await execute(server, "SHOW synchronous_standby_names") == value)

        await until(lambda: is_set("nobody"))
        task = asyncio.create_task(_write(db_context=db_context))
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"

        async def is_waiting() -> bool:
            return bool(await execute(server, waits) == 1)

        await until(is_waiting)
        await asyncio.sleep(1)  # past the deadline
        assert not task.done() and await is_waiting()
        await execute(server, "ALTER SYSTEM RESET synchronous_standby_names")
        await execute(server, "SELECT pg_reload_conf()")
        await task
        async with db_context() as session:
            assert await session.scalar(text("SELECT count(*) FROM item")) == 1
    finally:
        await engine.dispose()


@in_time(*[0.7] * 10)
async def _write(seconds: float, db_context: Any) -> None:
    with deadline(seconds):
        async with db_context() as session:
            await insert(session, 1)
