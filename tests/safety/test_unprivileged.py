"""A role that has only privileges on the rows of its tables uses the whole library."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    LockTimeoutError,
    RowWatcher,
    advisory_lock,
    create_db_context,
    get_transaction,
    list_lock_waits,
    lock_rows,
    lock_tables,
    m2m_add,
    m2m_add_many,
    m2m_remove,
    m2m_set,
    run_transaction,
    wait_for_row_change,
)
from tests.safety.shelf import Base, Book, Tag
from tests.support import connect_args, plain_url, roles, until

TABLES = "book, tag, book_tag, loose_tag, noted_tag, seat_number, seat_tag, pair, given"

_GIVEN = f"""
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT SELECT, INSERT, UPDATE, DELETE ON {TABLES} TO clerk;
INSERT INTO book (id, title) SELECT n, 't' FROM generate_series(1, 9) AS n;
INSERT INTO tag (id) SELECT n FROM generate_series(1, 9) AS n
"""


@pytest.fixture
async def owner(empty_database: str) -> AsyncIterator[asyncpg.Connection]:
    """The owner of the tables, which the role `clerk` may read and write and no more."""
    engine = create_async_engine(empty_database)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    async with roles(empty_database, "clerk"):
        owner = await asyncpg.connect(plain_url(empty_database))
        try:
            await owner.execute(_GIVEN)
            yield owner
        finally:
            await owner.close()


@pytest.fixture
async def clerk(owner: asyncpg.Connection, empty_database: str) -> AsyncIterator[AsyncEngine]:
    arguments = connect_args(role="clerk")
    engine = create_async_engine(empty_database, connect_args=arguments)
    yield engine
    await engine.dispose()


@pytest.fixture
def maker(clerk: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(clerk, expire_on_commit=False)


async def test_work_and_associations(maker: async_sessionmaker[AsyncSession]) -> None:
    """Units, transactions with options, locks that are free and many-to-many writes."""
    async with create_db_context(maker)() as session:
        book = await session.get_one(Book, 1)
        async with get_transaction(session):
            assert await m2m_add(session, book, Book.tags, pks=[1, 2]) == 2
        assert await m2m_remove(session, book, Book.tags, pks=[1]) == 1
        assert await m2m_set(session, book, Book.tags, pks=[2, 3]) == (1, 0)
        assert await m2m_add_many(session, Book.tags, [(2, 1)], ignore_conflicts=True) == 1
        async with lock_tables(session, [Book, Tag]), advisory_lock(session, "stocktaking"):
            assert len(await lock_rows(session, Book, [1, 2], timeout=5)) == 2

    async def work(session: AsyncSession) -> str:
        return (await session.get_one(Book, 1)).title

    assert await run_transaction(maker, work, isolation_level="SERIALIZABLE", read_only=True) == "t"


async def test_blockers_of_another_role(
    maker: async_sessionmaker[AsyncSession], owner: asyncpg.Connection
) -> None:
    """The backend in the way is named, without the query and the state that PostgreSQL hides."""
    await owner.execute(
        "BEGIN; SELECT pg_advisory_xact_lock(7); SELECT FROM book WHERE id = 1 FOR UPDATE;"
        "LOCK TABLE tag IN EXCLUSIVE MODE"
    )
    pid = owner.get_server_pid()
    async with maker() as session:
        for timeout in (0.3, 0):
            nowait = not timeout
            limit = None if nowait else timeout
            with pytest.raises(LockTimeoutError) as of_rows:
                await lock_rows(session, Book, [1], timeout=limit, nowait=nowait)
            with pytest.raises(LockTimeoutError) as of_tables:
                async with lock_tables(
                    session, [Tag], mode="EXCLUSIVE", timeout=limit, nowait=nowait
                ):
                    pass
            for caught in (of_rows, of_tables):
                assert [each.pid for each in caught.value.blockers] == [pid]
                assert caught.value.blockers[0].query is None
        with pytest.raises(LockTimeoutError) as of_a_key:
            async with advisory_lock(session, 7, timeout=0.3):
                pass
        assert [each.pid for each in of_a_key.value.blockers] == [pid]


async def test_waits_of_another_role(
    maker: async_sessionmaker[AsyncSession], clerk: AsyncEngine, owner: asyncpg.Connection
) -> None:
    """A wait is listed with what the role may see."""
    await owner.execute("BEGIN; LOCK TABLE tag IN EXCLUSIVE MODE")

    async def lock() -> None:
        async with maker() as session, lock_tables(session, [Tag], mode="SHARE", timeout=None):
            pass

    waiting = asyncio.create_task(lock())

    async def is_listed() -> bool:
        waits = await list_lock_waits(clerk)
        return any(wait.blocked_by == (owner.get_server_pid(),) for wait in waits)

    await until(is_listed)
    await owner.execute("COMMIT")
    await waiting


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_waiting_for_rows(
    maker: async_sessionmaker[AsyncSession], clerk: AsyncEngine, owner: asyncpg.Connection
) -> None:
    """A wait and a watcher see what others commit."""
    async with maker() as session, RowWatcher(clerk, interval=0.05) as watcher:
        wait = asyncio.create_task(
            wait_for_row_change(session, Book, 1, interval=0.05, baseline={"title": "t"})
        )
        change = asyncio.create_task(watcher.wait(Book, 1, baseline={"title": "t"}))
        await owner.execute("UPDATE book SET title = 'new'")
        assert (await wait).title == "new"
        after = (await change).after
        assert after is not None and after["title"] == "new"
