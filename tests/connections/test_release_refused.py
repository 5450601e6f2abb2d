"""release_connection: what is in the way of the end of a transaction is named, and it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    TransactionAbortedError,
    TransactionStateError,
    advisory_lock,
    create_db_context,
    get_transaction,
    lock_rows,
    lock_tables,
    on_commit,
    release_connection,
)
from tests.connections.releasing import Maker, held, read, xact_start
from tests.support import Item, insert, stored, swallow_error, until


@pytest.fixture
def session_maker(engine: AsyncEngine) -> Maker:
    """Sessions that expire their instances at a commit, as SQLAlchemy's do by default."""
    return async_sessionmaker(engine)


async def pending_new(session: AsyncSession) -> None:
    session.add(Item(id=2))


async def pending_change(session: AsyncSession) -> None:
    (await session.get_one(Item, 1)).name = "changed"


async def pending_delete(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Item, 1))


async def flushed(session: AsyncSession) -> None:
    session.add(Item(id=2))
    await session.flush()


async def written(session: AsyncSession) -> None:
    await insert(session, 2)


async def row_lock(session: AsyncSession) -> None:
    await lock_rows(session, Item, [1])


async def row_lock_by_hand(session: AsyncSession) -> None:
    await session.execute(text("SELECT FROM item FOR KEY SHARE"))


async def table_lock_by_hand(session: AsyncSession) -> None:
    await session.execute(text("LOCK TABLE item IN SHARE MODE"))


async def advisory_by_hand(session: AsyncSession) -> None:
    await session.execute(text("SELECT pg_advisory_xact_lock(1)"))


async def nested_lock(session: AsyncSession) -> None:
    async with lock_tables(session, [Item], mode="ACCESS SHARE"):
        pass


async def nested_advisory(session: AsyncSession) -> None:
    async with advisory_lock(session, 1):
        pass


async def callback(session: AsyncSession) -> None:
    on_commit(session, lambda: None)


async def stream(session: AsyncSession) -> None:
    session.info["stream"] = await session.stream(text("SELECT generate_series(1, 200)"))


async def cursor_by_hand(session: AsyncSession) -> None:
    await session.execute(text("DECLARE mine CURSOR FOR SELECT 1"))


IN_THE_WAY: list[tuple[Callable[[AsyncSession], Awaitable[None]], str]] = [
    (pending_new, "changes are pending, of Item"),
    (pending_change, "changes are pending, of Item"),
    (pending_delete, "changes are pending, of Item"),
    (flushed, "written or locked rows"),
    (written, "written or locked rows"),
    (row_lock, "written or locked rows"),
    (row_lock_by_hand, "written or locked rows"),
    (table_lock_by_hand, r"a lock on item \(ShareLock\)"),
    (advisory_by_hand, "an advisory lock"),
    (nested_lock, "a lock of lock_tables on item"),
    (nested_advisory, "an advisory lock"),
    (callback, "callbacks of on_commit"),
    (stream, "cursor"),
    (cursor_by_hand, "the cursor mine is open"),
]


@pytest.mark.parametrize("has_read", [False, True])
@pytest.mark.parametrize(
    ("what", "named"), IN_THE_WAY, ids=[each.__name__ for each, _ in IN_THE_WAY]
)
async def test_refused(
    session_maker: Maker, other: Any, what: Any, named: str, has_read: bool
) -> None:
    """What would be lost, or be done by half, is refused before anything is ended, and named; with
    `commit=True` it is stored, its callbacks included."""
    await other.execute("INSERT INTO item VALUES (1, '')")
    for commit in (False, True):
        async with create_db_context(session_maker)() as session:
            before = await xact_start(session) if has_read else None
            await what(session)
            opened = session.info.pop("stream", None)
            if commit:
                if opened is not None:
                    await opened.close()
                async with release_connection(session, commit=True):
                    assert held(session.bind) == 0  # type: ignore[arg-type]
                continue
            with pytest.raises(TransactionStateError, match=named):
                async with release_connection(session):
                    raise AssertionError("the block has begun")
            if has_read:
                assert await xact_start(session) == before
            if opened is not None:
                await opened.close()
            await session.rollback()
    changed = {pending_new, flushed, written, pending_delete}
    ids = {pending_delete: set()}.get(what, {1, 2}) if what in changed else {1}
    assert await stored(other) == ids


async def savepoint(session: AsyncSession, release: Any) -> None:
    async with get_transaction(session):
        await release()


async def savepoint_by_hand(session: AsyncSession, release: Any) -> None:
    async with session.begin_nested():
        await release()


async def savepoint_of_the_connection(session: AsyncSession, release: Any) -> None:
    async with (await session.connection()).begin_nested():
        await release()


async def joined_session(session: AsyncSession, release: Any) -> None:
    joined = async_sessionmaker(await session.connection())
    async with create_db_context(joined)() as another:
        await read(another)
        await release()


@pytest.mark.parametrize("commit", [False, True])
@pytest.mark.parametrize(
    ("what", "named"),
    [
        (savepoint, "a savepoint is open"),
        (savepoint_by_hand, "a savepoint is open"),
        (savepoint_of_the_connection, "a savepoint of its connection is open"),
        (joined_session, "another session is joined"),
    ],
)
async def test_refused_always(session_maker: Maker, what: Any, named: str, commit: bool) -> None:
    """An open savepoint, and another session on the connection, refuse it with `commit=True`
    too."""
    async with create_db_context(session_maker)() as session:
        await read(session)
        before = await xact_start(session)

        async def release() -> None:
            with pytest.raises(TransactionStateError, match=named):
                async with release_connection(session, commit=commit):
                    raise AssertionError("the block has begun")

        await what(session, release)
        assert await xact_start(session) == before


@pytest.mark.parametrize("commit", [False, True])
async def test_in_a_block_of_begin(session_maker: Maker, commit: bool) -> None:
    """A block of `session.begin()` is refused: SQLAlchemy allows no statement after a commit inside
    of it."""
    async with session_maker() as session, session.begin():
        await read(session)
        with pytest.raises(TransactionStateError, match=r"session\.begin\(\)"):
            async with release_connection(session, commit=commit):
                raise AssertionError("the block has begun")
        await read(session)


@pytest.mark.parametrize("commit", [False, True])
async def test_joined(engine: AsyncEngine, commit: bool) -> None:
    """A session that is bound to a connection has nothing to give back."""
    async with engine.connect() as connection, AsyncSession(connection) as session:
        await read(session)
        with pytest.raises(TransactionStateError, match="joined to a connection"):
            async with release_connection(session, commit=commit):
                raise AssertionError("the block has begun")


async def test_another_task(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A statement of another task is not cut."""
    await other.execute("SELECT pg_advisory_lock(1)")
    async with session_maker() as session:
        await read(session)
        task = asyncio.create_task(session.execute(text("SELECT pg_advisory_xact_lock_shared(1)")))

        async def is_waiting() -> bool:
            return bool(await other.fetch("SELECT FROM pg_locks WHERE NOT granted"))

        await until(is_waiting)
        try:
            with pytest.raises(TransactionStateError, match="another task"):
                async with release_connection(session):
                    raise AssertionError("the block has begun")
        finally:
            await other.execute("SELECT pg_advisory_unlock(1)")
            await task


async def test_two_phase(engine: AsyncEngine) -> None:
    """A session with twophase=True is refused."""
    async with AsyncSession(engine, twophase=True) as session:
        await read(session)
        with pytest.raises(TransactionStateError, match="twophase"):
            async with release_connection(session):
                raise AssertionError("the block has begun")


async def test_aborted(session_maker: Maker) -> None:
    """An aborted transaction is not taken for one that has written nothing; with `commit=True` its
    commit is the error."""
    with pytest.raises(TransactionAbortedError):
        async with create_db_context(session_maker)() as session:
            error = await swallow_error(session)
            with pytest.raises(TransactionStateError, match="division by zero") as caught:
                async with release_connection(session):
                    raise AssertionError("the block has begun")
            assert caught.value.__cause__ is error
            async with release_connection(session, commit=True):
                raise AssertionError("the block has begun")


async def test_failed_flush(session_maker: Maker, other: Any) -> None:
    """A flush that failed has rolled back; the block does not run."""
    await other.execute("INSERT INTO item VALUES (1, '')")
    async with session_maker() as session:
        session.add(Item(id=1))
        with pytest.raises(Exception, match="duplicate key"):
            await session.flush()
        with pytest.raises(TransactionStateError, match="duplicate key"):
            async with release_connection(session):
                raise AssertionError("the block has begun")


async def test_not_in_the_way(session_maker: Maker, other: Any) -> None:
    """A stream that was read to its end, a lock that its savepoint has undone, an UPDATE that found
    no row and an attribute with the value that it had are no obstacles."""
    await other.execute("INSERT INTO item VALUES (1, 'same')")
    async with create_db_context(session_maker)() as session:
        result = await session.stream(text("SELECT generate_series(1, 200)"))
        assert len(await result.all()) == 200
        with pytest.raises(KeyError):
            async with lock_tables(session, [Item]):
                raise KeyError
        await session.execute(text("UPDATE item SET name = '' WHERE id = 5"))
        item = await session.get_one(Item, 1)
        item.name = "same"
        async with release_connection(session):
            pass
