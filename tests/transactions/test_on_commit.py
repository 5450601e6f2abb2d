"""Section 2 of the contract: `on_commit`."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import (
    TransactionAbortedError,
    TransactionStateError,
    _blocks,
    create_db_context,
    get_transaction,
    on_commit,
)
from pgtoolset._blocks import foreign_callbacks
from tests.support import insert, stored, swallow_error
from tests.transactions.plain_session import PlainManagedSession, PlainSession

Maker = async_sessionmaker[AsyncSession]


async def test_order_and_kinds(session_maker: Maker) -> None:
    """Sync and async callbacks run in registration order, before control returns."""
    log: list[object] = []

    async def later() -> None:
        await asyncio.sleep(0.01)
        log.append("async")

    async with session_maker() as session:
        async with get_transaction(session):
            on_commit(session, lambda: log.append("first"))
            on_commit(session, later)
            on_commit(session, lambda: later())
            async with get_transaction(session):
                on_commit(session, lambda: log.append("nested"))
            on_commit(session, lambda: log.append("last"))
            assert log == []
        assert log == ["first", "async", "async", "nested", "last"]


async def test_after_the_commit(session_maker: Maker, other: asyncpg.Connection) -> None:
    """When a callback runs, the work is visible to everybody."""
    seen: list[set[int]] = []

    async def look() -> None:
        seen.append(await stored(other))

    async with create_db_context(session_maker)() as session:
        await insert(session, 1)
        on_commit(session, look)
        assert seen == []
    assert seen == [{1}]


@pytest.mark.parametrize("how", ["session.commit()", "transaction.commit()", "run_sync"])
async def test_explicit_commit(session_maker: Maker, how: str) -> None:
    """An explicit commit runs the callbacks of its transaction, once."""
    log: list[str] = []
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT 1"))
        on_commit(session, lambda: log.append("one"))
        if how == "run_sync":
            await session.run_sync(lambda sync: sync.commit())
        elif how == "transaction.commit()":
            transaction = session.get_transaction()
            assert transaction is not None
            await transaction.commit()
        else:
            await session.commit()
        assert log == ["one"]
        await session.execute(text("SELECT 1"))
        on_commit(session, lambda: log.append("two"))
    assert log == ["one", "two"]


async def test_in_a_plain_sqlalchemy_transaction(session_maker: Maker) -> None:
    """It needs no block of ours: `session.begin()` and autobegin do."""
    log: list[str] = []
    async with session_maker() as session:
        async with session.begin():
            on_commit(session, lambda: log.append("begin"))
        await session.execute(text("SELECT 1"))
        on_commit(session, lambda: log.append("autobegin"))
        assert log == ["begin"]
        await session.commit()
    assert log == ["begin", "autobegin"]


async def test_forgotten_with_its_level(session_maker: Maker) -> None:
    """Forgotten when its level rolls back, a plain begin_nested() included; the others stay."""
    log: list[str] = []
    async with session_maker() as session, get_transaction(session):
        on_commit(session, lambda: log.append("outer"))
        with pytest.raises(KeyError):
            async with get_transaction(session):
                on_commit(session, lambda: log.append("no 1"))
                async with session.begin_nested():
                    on_commit(session, lambda: log.append("no 2"))
                raise KeyError
        with pytest.raises(KeyError):
            async with session.begin_nested():
                on_commit(session, lambda: log.append("no 3"))
                raise KeyError
        savepoint = await session.begin_nested()
        on_commit(session, lambda: log.append("no 4"))
        await savepoint.rollback()
        async with session.begin_nested():
            on_commit(session, lambda: log.append("plain nested"))
            with pytest.raises(KeyError):
                async with get_transaction(session):
                    on_commit(session, lambda: log.append("no 5"))
                    raise KeyError
    assert log == ["outer", "plain nested"]


async def test_forgotten_with_a_swallowed_flush_error(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """A savepoint that a failed flush rolled back drops its callbacks."""
    from tests.support import Item

    log: list[str] = []
    async with session_maker() as session, get_transaction(session):
        await insert(session, 1)
        try:
            async with session.begin_nested():
                on_commit(session, lambda: log.append("no"))
                session.add(Item(id=1))
                await session.flush()
        except Exception:
            on_commit(session, lambda: log.append("yes"))
    assert log == ["yes"]


async def test_forgotten_when_the_commit_is_none(session_maker: Maker) -> None:
    """In a plain session a COMMIT that PostgreSQL answers with ROLLBACK runs no callback."""
    log: list[str] = []
    async with session_maker() as session:
        await session.execute(text("SELECT 1"))
        on_commit(session, lambda: log.append("no"))
        await swallow_error(session)
        with pytest.raises(TransactionAbortedError):
            await session.commit()
    assert log == []


@pytest.mark.parametrize("end", ["rollback", "exception", "close", "aborted"])
async def test_forgotten_with_the_transaction(session_maker: Maker, end: str) -> None:
    """A transaction that is not committed runs none, nor does the next one of the session."""
    log: list[str] = []
    async with session_maker() as session:
        try:
            async with get_transaction(session):
                await session.execute(text("SELECT 1"))
                on_commit(session, lambda: log.append("no"))
                if end == "rollback":
                    await session.rollback()
                elif end == "close":
                    await session.close()
                elif end == "aborted":
                    await swallow_error(session)
                else:
                    raise KeyError
        except (KeyError, RuntimeError):
            assert end in ("exception", "aborted")
        async with get_transaction(session):
            await session.execute(text("SELECT 1"))
    assert log == []


async def test_one_that_raises(
    session_maker: Maker, other: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """One that raises is logged and does not stop the next; the commit is still a success."""
    log: list[str] = []

    async def bad_async() -> None:
        raise ValueError("async trouble")

    async def cancelled() -> None:
        raise asyncio.CancelledError

    def bad(url: str = "") -> None:
        raise KeyError("sync trouble")

    of_a_url = partial(bad, "postgresql://u:secret@host/db")

    with caplog.at_level(logging.ERROR, "pgtoolset"):
        async with create_db_context(session_maker)() as session:
            await insert(session, 1)
            for callback in (bad, bad_async, cancelled, of_a_url, lambda: log.append("next")):
                on_commit(session, callback)
    assert log == ["next"]
    assert await stored(other) == {1}
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [
        KeyError,
        ValueError,
        asyncio.CancelledError,
        KeyError,
    ]
    assert "a partial" in caplog.messages[-1]
    assert not any("secret" in message for message in caplog.messages)


async def test_cancellation_while_they_run(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A cancellation that arrives while callbacks run is delivered after the last of them."""
    log: list[str] = []
    running = asyncio.Event()

    async def slow() -> None:
        running.set()
        await asyncio.sleep(0.05)
        log.append("slow")

    async def work() -> None:
        async with create_db_context(session_maker)() as session:
            await insert(session, 1)
            on_commit(session, slow)
            on_commit(session, lambda: log.append("next"))
        log.append("returned")
        await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["slow", "next", "returned"]
    assert await stored(other) == {1}


async def test_callback_uses_the_database(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A callback may open a session of its own, and use the session that committed."""
    db_context = create_db_context(session_maker)
    log: list[str] = []

    async def another() -> None:
        async with db_context() as session:
            await insert(session, 2)
            on_commit(session, lambda: log.append("inner"))

    async with session_maker() as session:

        async def same() -> None:
            async with get_transaction(session):
                await insert(session, 3)

        async with get_transaction(session):
            await insert(session, 1)
            on_commit(session, another)
            on_commit(session, same)
    assert await stored(other) == {1, 2, 3}
    assert log == ["inner"]


async def test_with_a_double() -> None:
    """The same rules hold for the blocks of a session of another kind."""
    log: list[str] = []
    session = PlainSession(set())

    async def later() -> None:
        log.append("async")

    async with get_transaction(session):
        on_commit(session, lambda: log.append("first"))
        with pytest.raises(KeyError):
            async with get_transaction(session):
                on_commit(session, lambda: log.append("no"))
                raise KeyError
        async with get_transaction(session):
            on_commit(session, later)
        on_commit(session, lambda: log.append("last"))
        assert log == []
    assert log == ["first", "async", "last"]
    with pytest.raises(KeyError):
        async with get_transaction(session):
            on_commit(session, lambda: log.append("no"))
            raise KeyError
    assert log == ["first", "async", "last"]
    with pytest.raises(TransactionStateError):
        on_commit(session, lambda: None)


async def test_outside_a_transaction(session_maker: Maker) -> None:
    """Outside a transaction: TransactionStateError."""
    async with session_maker() as session:
        with pytest.raises(TransactionStateError, match="on_commit"):
            on_commit(session, lambda: None)
        double: Any = PlainSession(set())
        async with double.begin():
            with pytest.raises(TransactionStateError, match="get_transaction"):
                on_commit(double, lambda: None)


async def sync_commit(session: AsyncSession) -> None:
    session.sync_session.commit()


async def sync_transaction_commit(session: AsyncSession) -> None:
    transaction = session.sync_session.get_transaction()
    assert transaction is not None
    transaction.commit()


async def sync_block(session: AsyncSession) -> None:
    await session.rollback()
    with session.sync_session.begin():
        on_commit(session, lambda: LOG.append("block"))


async def sync_savepoint_and_commit(session: AsyncSession) -> None:
    with session.sync_session.begin_nested():
        on_commit(session, lambda: LOG.append("savepoint"))
    assert session.sync_session.in_transaction()
    session.sync_session.commit()


async def sync_begin(session: AsyncSession) -> None:
    await session.rollback()
    session.sync_session.begin()
    on_commit(session, lambda: LOG.append("begin"))
    session.sync_session.commit()


#: What callbacks of these have logged.
LOG: list[str] = []


@pytest.mark.parametrize("opened", ["unit", "block", "plain"])
@pytest.mark.parametrize(
    "commit",
    [sync_commit, sync_transaction_commit, sync_block, sync_savepoint_and_commit, sync_begin],
)
async def test_commit_outside_of_a_greenlet(session_maker: Maker, commit: Any, opened: str) -> None:
    """Where a commit could not run the callbacks afterwards, it is refused before it, and they run
    after the commit that follows."""
    LOG.clear()
    async with AsyncExitStack() as stack:
        if opened == "unit":
            session = await stack.enter_async_context(create_db_context(session_maker)())
        else:
            session = await stack.enter_async_context(session_maker())
        if opened == "block":
            await stack.enter_async_context(get_transaction(session))
        elif opened == "plain":
            await session.begin()
        on_commit(session, lambda: LOG.append("first"))
        with pytest.raises(TransactionStateError, match="nothing was committed"):
            await commit(session)
        assert LOG == []
        if session.in_transaction() and commit is not sync_block:
            await session.commit()
            assert LOG == {
                sync_savepoint_and_commit: ["first", "savepoint"],
                sync_begin: ["begin"],
            }.get(commit, ["first"])


@pytest.mark.parametrize("way", ["close", "rollback", "commit without callbacks"])
async def test_other_ends_outside_of_a_greenlet(session_maker: Maker, way: str) -> None:
    """The ends that run no callback need no greenlet."""
    async with create_db_context(session_maker)() as session:
        if way == "commit without callbacks":
            session.sync_session.commit()
        else:
            on_commit(session, lambda: LOG.append("no"))
            getattr(session.sync_session, way)()


@pytest.mark.parametrize("bad", ["postgresql://u:secret@host/db", None, 3])
async def test_bad_callback(session_maker: Maker, bad: Any) -> None:
    """A callback that cannot be called is refused at the registration."""
    async with session_maker() as session, get_transaction(session):
        with pytest.raises(TypeError, match=r"^callback must be a function") as caught:
            on_commit(session, bad)
    assert "secret" not in str(caught.value)


class SlottedSession:
    """A session that allows no weak reference and no hash."""

    __slots__ = ("_session",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self._session = PlainSession(set())

    def __eq__(self, other: object) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


async def test_with_a_session_of_any_class() -> None:
    """A session of another kind needs neither a hash nor weak references, and is only itself."""
    log: list[str] = []
    sessions: Any = SlottedSession(), SlottedSession()
    async with get_transaction(sessions[0]), get_transaction(sessions[1]):
        on_commit(sessions[0], lambda: log.append("first"))
        on_commit(sessions[1], lambda: log.append("second"))
    assert log == ["second", "first"]
    for session in sessions:
        with pytest.raises(TransactionStateError):
            on_commit(session, lambda: None)


async def entered(session: PlainSession) -> Any:
    """Enter a block of a session that is never left; returns the block."""
    block = get_transaction(session)
    await block.__aenter__()
    return block


def test_forgotten_in_the_middle_of_a_block() -> None:
    """A session that is collected inside its block leaves nothing that another could meet."""
    session = PlainManagedSession(set())
    block = asyncio.run(entered(session))
    assert foreign_callbacks(session) == []
    gone = weakref.ref(session)
    del block, session
    gc.collect()
    assert gone() is None
    assert not _blocks._OpenBlocks._by_id
