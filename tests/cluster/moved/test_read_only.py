"""What only reads discards nothing, on a primary and on a standby."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import get_transaction, run_transaction
from tests.cluster.moved.moving import POOL, pids, refused, see, settle_on_the_standby, write_item
from tests.nodes import Nodes, execute
from tests.support import insert, roles


async def as_an_option(session: AsyncSession) -> None:
    async with get_transaction(session, read_only=True):
        await insert(session, 1)


async def as_an_option_of_sqlalchemy(session: AsyncSession) -> None:
    await session.connection(execution_options={"postgresql_readonly": True})
    await insert(session, 1)


async def as_an_option_of_a_joined_session(session: AsyncSession) -> None:
    engine: Any = session.bind
    async with engine.connect() as connection:
        async with AsyncSession(connection) as joined, get_transaction(joined, read_only=True):
            await insert(joined, 1)


async def by_a_statement(session: AsyncSession) -> None:
    async with get_transaction(session):
        await session.execute(text("SET TRANSACTION READ ONLY"))
        await insert(session, 1)


async def by_a_session_default(session: AsyncSession) -> None:
    engine: Any = session.bind
    async with engine.connect() as connection:
        await connection.execute(text("SET default_transaction_read_only = on"))
        await connection.commit()
        async with AsyncSession(connection) as joined, get_transaction(joined):
            await insert(joined, 1)


@pytest.mark.parametrize("node", ["primary", "standby"])
@pytest.mark.parametrize(
    "fail",
    [
        as_an_option,
        as_an_option_of_sqlalchemy,
        as_an_option_of_a_joined_session,
        by_a_statement,
        by_a_session_default,
    ],
)
async def test_read_only_blocks(
    nodes: Nodes,
    engine: AsyncEngine,
    maker: Any,
    node: str,
    fail: Callable[[AsyncSession], Awaitable[None]],
) -> None:
    """A block that asked for READ ONLY discards nothing when it writes: each backend is the same
    afterwards, on a primary and on a standby."""
    if node == "standby" and fail is by_a_statement:
        return  # there PostgreSQL tells nobody that the transaction was READ ONLY by a statement
    await see(engine)
    nodes.move(getattr(nodes, node))
    await engine.dispose()
    before = await pids(engine)
    with pytest.raises(Exception) as caught:
        async with maker() as session:
            await fail(session)
    assert refused(caught.value)
    assert await pids(engine) == before


async def test_serializable_readers(nodes: Nodes, engine: AsyncEngine, maker: Any) -> None:
    """A standby refuses SERIALIZABLE to readers too: their pool leaves a primary that has moved,
    and run_transaction reads on the new one."""
    await settle_on_the_standby(nodes, engine)
    before = await pids(engine)

    async def read(session: AsyncSession) -> int:
        return int(await session.scalar(text("SELECT pg_backend_pid()")) or 0)

    options: Any = {"isolation_level": "SERIALIZABLE", "read_only": True}
    assert await run_transaction(maker, read, attempts=2, **options) not in before
    assert not set(await pids(engine)) & set(before)
    async with maker() as session, get_transaction(session, **options):
        with pytest.raises(Exception) as caught:
            await insert(session, 1)
        await session.rollback()
    assert refused(caught.value)


async def test_role_that_is_read_only(nodes: Nodes, driver: str) -> None:
    """A role whose transactions are read-only by default discards nothing, nor does a standby."""
    async with roles(nodes.primary.url(), "reader"):
        await execute(nodes.primary, "ALTER ROLE reader SET default_transaction_read_only = on")
        await execute(nodes.primary, "GRANT ALL ON item TO reader")
        await nodes.caught_up()
        for node in (nodes.primary, nodes.standby):
            url = node.url(driver=driver).replace("postgres@", "reader@")
            engine = create_async_engine(url, pool_size=POOL)
            before = await pids(engine)
            with pytest.raises(Exception) as caught:
                await write_item(async_sessionmaker(engine), 1)
            assert refused(caught.value)
            assert await pids(engine) == before
            await engine.dispose()
