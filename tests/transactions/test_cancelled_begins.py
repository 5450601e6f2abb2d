"""A cancellation at every suspension of a block whose BEGIN is sent together with statements.

The next user of the pooled connection sees no transaction and no setting of the block.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    create_db_context,
    deadline,
    driver_connection,
    get_transaction,
    release_connection,
    run_transaction,
)
from tests.settings import NOTHING, Maker, everything, left_behind, narrow, setting
from tests.support import DRIVER, insert, interrupt_everywhere, stored, until

Block = Callable[[Maker, int], Coroutine[Any, Any, None]]

SETTINGS = {"app.tenant": "a", "statement_timeout": "20s", "application_name": "unit"}
OTHERS = {"app.tenant": "b", "lock_timeout": "5s"}


async def with_settings(maker: Maker, n: int) -> None:
    async with create_db_context(maker, settings=SETTINGS)() as session:
        await insert(session, n)


async def with_modes(maker: Maker, n: int) -> None:
    session = maker()
    async with get_transaction(session, isolation_level="SERIALIZABLE", settings=SETTINGS):
        await insert(session, n)


async def with_deadline(maker: Maker, n: int) -> None:
    with deadline(60):
        async with create_db_context(maker)() as session:
            await insert(session, n)


async def with_both(maker: Maker, n: int) -> None:
    with deadline(60):
        async with create_db_context(maker, settings=SETTINGS)() as session:
            await insert(session, n)


async def with_an_ended_deadline(maker: Maker, n: int) -> None:
    async with create_db_context(maker, settings=SETTINGS)() as session:
        with deadline(15):
            assert await setting(session) == "a"
        await insert(session, n)


async def with_nested_settings(maker: Maker, n: int) -> None:
    async with create_db_context(maker, settings=SETTINGS)() as session:
        async with get_transaction(session, settings=OTHERS):
            await insert(session, n)
        assert await setting(session) == "a"


async def with_first_settings_inside(maker: Maker, n: int) -> None:
    async with create_db_context(maker)() as session:
        async with get_transaction(session, settings=OTHERS):
            await insert(session, n)
        assert await setting(session) == ""


async def with_a_release(maker: Maker, n: int) -> None:
    async with create_db_context(maker, settings=SETTINGS)() as session:
        assert await setting(session) == "a"
        async with release_connection(session):
            await asyncio.sleep(0)
        await insert(session, n)


async def with_a_release_in_a_deadline(maker: Maker, n: int) -> None:
    with deadline(60):
        async with get_transaction(maker(), isolation_level="REPEATABLE READ") as session:
            assert await setting(session) == ""
            async with release_connection(session):
                await asyncio.sleep(0)
            await insert(session, n)


async def with_the_driver(maker: Maker, n: int) -> None:
    async with create_db_context(maker, settings=SETTINGS)() as session:
        async with driver_connection(session) as connection:
            await connection.execute(f"INSERT INTO item VALUES ({n}, '')")


async def with_the_driver_alone(maker: Maker, n: int) -> None:
    async with create_db_context(maker)() as session:
        async with driver_connection(session) as connection:
            await connection.execute(f"INSERT INTO item VALUES ({n}, '')")


async def with_the_driver_later(maker: Maker, n: int) -> None:
    with deadline(60):
        async with create_db_context(maker)() as session:
            await insert(session, n)
            async with driver_connection(session) as connection:
                await connection.execute("SELECT 1")


async def with_a_retry(maker: Maker, n: int) -> None:
    attempts = 0

    async def work(session: AsyncSession) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            await session.execute(
                text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")
            )
        await insert(session, n)

    await run_transaction(maker, work, settings=SETTINGS)


async def on_a_connection(maker: Maker, n: int) -> None:
    engine: AsyncEngine = maker.kw["bind"]
    async with engine.connect() as connection:
        joined = async_sessionmaker(connection, expire_on_commit=False)
        async with create_db_context(joined, settings=SETTINGS)() as session:
            await insert(session, n)


BLOCKS = [
    with_settings,
    with_modes,
    with_deadline,
    with_both,
    with_an_ended_deadline,
    with_nested_settings,
    with_first_settings_inside,
    with_a_release,
    with_a_release_in_a_deadline,
    with_the_driver,
    with_the_driver_alone,
    with_the_driver_later,
    with_a_retry,
    on_a_connection,
]

#: "busy": psycopg suspends at each call, as it does in an event loop that it finds busy.
POOLS = ["warm", *(["busy"] if DRIVER == "psycopg" else [])]


@pytest.fixture
async def engine(database_url: str, other: asyncpg.Connection) -> AsyncIterator[AsyncEngine]:
    async with narrow(database_url) as engine:
        yield engine
    await other.execute("TRUNCATE item, part, account")


def is_open(connection: Any) -> bool:
    """Whether the driver's connection is in a transaction, as the server has said last."""
    if DRIVER == "asyncpg":
        return bool(connection.is_in_transaction() or connection._top_xact is not None)
    return bool(connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("pool", POOLS)
async def test_nothing_is_left(
    engine: AsyncEngine,
    other: asyncpg.Connection,
    block: Block,
    pool: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pool is whole, and its connection in no transaction and without settings."""
    if pool == "busy":
        monkeypatch.setattr(psycopg.waiting, "MAX_BUSY_TIME", -1.0, raising=False)
    maker: Maker = async_sessionmaker(engine, expire_on_commit=False)
    completed: set[int] = set()

    await left_behind(engine)  # how the first connection is made is SQLAlchemy's

    async def work(n: int) -> None:
        await block(maker, n)
        completed.add(n)

    async def no_transaction() -> bool:
        return not await other.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE xact_start IS NOT NULL"
            " AND datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend'"
        )

    async def check(n: int) -> None:
        checked_out: Any = engine.pool
        assert checked_out.checkedout() == 0, f"a connection is lost at suspension {n}"
        async with engine.connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            assert not is_open(raw), f"a transaction is left at suspension {n}"
            assert await everything(connection) == NOTHING, f"settings are left at suspension {n}"
        await until(no_transaction, 20)
        assert n not in completed or n in await stored(other), f"at suspension {n}"

    assert await interrupt_everywhere(work, check) >= 3
