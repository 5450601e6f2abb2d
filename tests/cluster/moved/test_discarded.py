"""A primary that has moved: whatever was refused, the next block reaches the new one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from pgtoolset import (
    LockTimeoutError,
    TransactionAbortedError,
    advisory_lock,
    cleanup_tables,
    create_db_context,
    get_transaction,
    lock_rows,
    lock_tables,
    m2m_add,
)
from tests.cluster.moved.moving import (
    POOL,
    pids,
    refused,
    see,
    settle_on_the_standby,
    stored,
    write_item,
)
from tests.nodes import Nodes, execute
from tests.support import Base, Item, insert
from tests.tagged import Post, Tagged


async def test_blocks(
    nodes: Nodes, engine: AsyncEngine, maker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """After a switchover one of 50 blocks fails, with PostgreSQL's own error, where 50 did."""
    await pids(engine)
    await nodes.switch_over(moves_address=False)  # which has cut each connection
    db_context = create_db_context(maker)
    failures: list[BaseException] = []
    for number in range(50):
        try:
            async with db_context() as session:
                await insert(session, number)
        except Exception as error:
            failures.append(error)
            if refused(error):
                nodes.move(nodes.primary)
    assert [refused(error) for error in failures if not _is_cut(error)] == [True]
    assert len(failures) <= 1 + POOL
    assert await stored(nodes) == 50 - len(failures)
    assert [each.name for each in caplog.records].count("pgtoolset") == 1


def _is_cut(error: BaseException) -> bool:
    return getattr(error, "connection_invalidated", False) is True


async def by_block(session: AsyncSession) -> None:
    async with get_transaction(session):
        await insert(session, 1)


async def by_savepoint(session: AsyncSession) -> None:
    async with get_transaction(session), get_transaction(session):
        await insert(session, 1)


async def by_plain_session(session: AsyncSession) -> None:
    await insert(session, 1)


async def by_flush(session: AsyncSession) -> None:
    async with get_transaction(session):
        session.add(Item(id=1))


async def by_lock_tables(session: AsyncSession) -> None:
    async with lock_tables(session, [Item]):
        pass


async def by_lock_rows(session: AsyncSession) -> None:
    await lock_rows(session, Item, [1])


async def by_lock_rows_in_time(session: AsyncSession) -> None:
    await lock_rows(session, Item, [1], timeout=5)


async def by_advisory_lock(session: AsyncSession) -> None:
    async with advisory_lock(session, 1):
        await insert(session, 1)


async def by_serializable(session: AsyncSession) -> None:
    async with get_transaction(session, isolation_level="SERIALIZABLE"):
        await insert(session, 1)


async def by_read_write(session: AsyncSession) -> None:
    async with get_transaction(session, read_only=False):
        await insert(session, 1)


async def by_cleanup(session: AsyncSession) -> None:
    await cleanup_tables(session, Base)


async def by_driver_connection(session: AsyncSession) -> None:
    async with get_transaction(session):
        await session.execute(text("SELECT 1"))
        raw: Any = await (await session.connection()).get_raw_connection()
        await raw.driver_connection.execute("INSERT INTO item VALUES (1, '')")


WRITES = [
    by_block,
    by_savepoint,
    by_flush,
    by_lock_tables,
    by_lock_rows,
    by_lock_rows_in_time,
    by_advisory_lock,
    by_serializable,
    by_read_write,
    by_cleanup,
    by_driver_connection,
]


@pytest.mark.parametrize("write", WRITES)
async def test_every_function(
    nodes: Nodes, engine: AsyncEngine, maker: Any, write: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """Whatever was refused, the next block and all after it reach the new primary."""
    await execute(nodes.primary, "INSERT INTO item VALUES (0, '')")
    await nodes.caught_up()
    await settle_on_the_standby(nodes, engine)
    with pytest.raises(Exception) as caught:
        async with maker() as session:
            await write(session)
    assert not isinstance(caught.value, LockTimeoutError), caught.value
    async with asyncio.TaskGroup() as group:
        for number in range(10, 10 + 2 * POOL):
            group.create_task(write_item(maker, number))
    assert await stored(nodes) == 1 + 2 * POOL


async def test_many_to_many(nodes: Nodes, engine: AsyncEngine, maker: Any, driver: str) -> None:
    """A write of an association in a session that is in no block of ours counts as well."""
    async with engine.begin() as connection:
        await connection.run_sync(Tagged.metadata.create_all)
        await connection.execute(text("TRUNCATE tagged_post, tagged_tag, tagged_post_tag"))
        await connection.execute(text("INSERT INTO tagged_post VALUES (1)"))
        await connection.execute(text("INSERT INTO tagged_tag VALUES (1)"))
    await nodes.caught_up()
    await settle_on_the_standby(nodes, engine)
    async with maker() as session:
        post = await session.get_one(Post, 1)
        with pytest.raises(Exception) as caught:
            await m2m_add(session, post, Post.tags, pks=[1])
    assert refused(caught.value)
    async with maker() as session, session.begin():
        await m2m_add(session, await session.get_one(Post, 1), Post.tags, pks=[1])
    assert await execute(nodes.primary, "SELECT count(*) FROM tagged_post_tag") == 1


async def test_plain_engine(nodes: Nodes, engine: AsyncEngine, maker: Any) -> None:
    """A statement of SQLAlchemy's own on an engine that the library has seen counts as well."""
    await see(engine)
    await settle_on_the_standby(nodes, engine)
    with pytest.raises(Exception) as caught:
        async with engine.begin() as connection:
            await connection.execute(sqlalchemy.insert(Item), {"id": 1, "name": ""})
    assert refused(caught.value)
    async with engine.begin() as connection:
        await connection.execute(sqlalchemy.insert(Item), {"id": 1, "name": ""})
    assert await stored(nodes) == 1


@pytest.mark.parametrize("is_ours", [True, False])
async def test_a_connection_that_is_kept(
    nodes: Nodes, engine: AsyncEngine, maker: Any, is_ours: bool
) -> None:
    """An owner who keeps one connection for transaction after transaction has another one from the
    next transaction on, with sessions that are joined to it and without."""
    await see(engine)
    await settle_on_the_standby(nodes, engine)

    async def write(connection: AsyncConnection, number: int) -> None:
        if is_ours:
            async with AsyncSession(connection) as session, get_transaction(session):
                await insert(session, number)
        else:
            await connection.execute(text(f"INSERT INTO item VALUES ({number}, '')"))

    async with engine.connect() as connection:
        for number in (1, 2, 3):
            try:
                await write(connection, number)
                await connection.commit()
            except Exception as error:
                assert refused(error) and number == 1
                await connection.rollback()
    assert await stored(nodes) == 2


async def test_a_savepoint_is_swallowed(nodes: Nodes, engine: AsyncEngine, maker: Any) -> None:
    """A block that swallows the error of a savepoint goes on reading, and ends as it would have."""
    await settle_on_the_standby(nodes, engine)
    async with maker() as session, get_transaction(session):
        for _ in range(2):
            with pytest.raises(Exception) as caught:
                async with get_transaction(session):
                    await insert(session, 1)
            assert refused(caught.value)
            assert await session.scalar(text("SELECT pg_is_in_recovery()"))
    await write_item(maker, 1)
    assert await stored(nodes) == 1


async def test_swallowed(nodes: Nodes, engine: AsyncEngine, maker: Any, driver: str) -> None:
    """A block that swallows the error is told, and the next one reaches the new primary."""
    await settle_on_the_standby(nodes, engine)
    expected = TransactionAbortedError if driver.endswith("asyncpg") else Exception
    with pytest.raises(expected):
        async with maker() as session, get_transaction(session):
            try:
                await insert(session, 1)
            except Exception as error:
                assert refused(error)
            if not driver.endswith("asyncpg"):
                await session.execute(text("SELECT 1"))
    await write_item(maker, 1)
    assert await stored(nodes) == 1
