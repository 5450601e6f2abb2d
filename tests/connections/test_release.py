"""release_connection: the transaction ends, the connection is in the pool, the next one is like the
last one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, inspect, text
from sqlalchemy.exc import DBAPIError
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
    run_transaction,
)
from tests.support import Item, insert, interrupt_everywhere, stored, swallow_error, until

Maker = async_sessionmaker[AsyncSession]


@pytest.fixture
def session_maker(engine: AsyncEngine) -> Maker:
    """Sessions that expire their instances at a commit, as SQLAlchemy's do by default."""
    return async_sessionmaker(engine)


def sent_over(engine: AsyncEngine) -> list[str]:
    statements: list[str] = []
    event.listen(
        engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2])
    )
    return statements


def held(engine: AsyncEngine) -> int:
    return engine.pool.checkedout()  # type: ignore[attr-defined,no-any-return]


async def read(session: AsyncSession) -> None:
    await session.execute(text("SELECT count(*) FROM item"))


async def xact_start(session: AsyncSession) -> Any:
    return await session.scalar(text("SELECT now()"))


async def test_connection_is_in_the_pool(engine: AsyncEngine, session_maker: Maker) -> None:
    """The connection is in the pool while the block runs, and the next statement begins another
    transaction."""
    async with create_db_context(session_maker)() as session:
        first = await xact_start(session)
        assert held(engine) == 1
        async with release_connection(session):
            assert held(engine) == 0
            assert session.in_transaction()
        assert held(engine) == 0
        assert await xact_start(session) > first


async def test_use_inside(engine: AsyncEngine, session_maker: Maker, other: Any) -> None:
    """A statement inside of the block begins the next transaction, whose work is stored."""
    async with create_db_context(session_maker)() as session:
        await read(session)
        async with release_connection(session):
            await insert(session, 1)
            assert held(engine) == 1
    assert await stored(other) == {1}


async def test_nothing_is_sent_without_a_connection(
    engine: AsyncEngine, session_maker: Maker
) -> None:
    """A session that holds no connection sends nothing, in a transaction and outside of one."""
    sent = sent_over(engine)
    async with create_db_context(session_maker)() as session:
        async with release_connection(session):
            pass
        async with release_connection(session, commit=True):
            pass
    async with session_maker() as session:
        async with release_connection(session):
            assert not session.in_transaction()
    assert sent == []


@pytest.mark.parametrize("commit", [False, True])
async def test_instances_stay_loaded(session_maker: Maker, other: Any, commit: bool) -> None:
    """Loaded instances stay loaded, and the session expires them at a commit as before."""
    await other.execute("INSERT INTO item VALUES (1, 'loaded')")
    async with session_maker() as session:
        item = await session.get_one(Item, 1)
        async with release_connection(session, commit=commit):
            assert item.name == "loaded"
        assert session.sync_session.expire_on_commit
        await read(session)
        assert item.name == "loaded"
        await session.commit()
        assert inspect(item).expired


# Like the last one


async def modes(session: AsyncSession) -> tuple[str, ...]:
    names = ("isolation", "read_only", "deferrable")
    terms = ", ".join(f"current_setting('transaction_{name}')" for name in names)
    return tuple((await session.execute(text(f"SELECT {terms}"))).one())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"isolation_level": "REPEATABLE READ"},
    {"isolation_level": "SERIALIZABLE", "read_only": True, "deferrable": True},
    {"read_only": True},
    {"read_only": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
async def test_next_transaction_has_the_options(
    session_maker: Maker, options: dict[str, Any]
) -> None:
    """The next transaction has the isolation level, READ ONLY and DEFERRABLE of the last one, again
    and again, and the one after the block of get_transaction has none of them."""
    async with session_maker() as session:
        defaults = await modes(session)
        await session.rollback()
        async with get_transaction(session, **options):
            wanted = await modes(session)
            for _ in range(3):
                async with release_connection(session):
                    assert await modes(session) == wanted
                async with release_connection(session):
                    pass  # no statement
                async with release_connection(session):
                    pass
            assert await modes(session) == wanted
        assert await modes(session) == defaults


async def test_options_end_with_the_next_transaction(session_maker: Maker) -> None:
    """A rollback after the block ends the options with their transaction."""
    async with session_maker() as session, get_transaction(session, isolation_level="SERIALIZABLE"):
        await read(session)
        async with release_connection(session):
            await session.rollback()
            assert (await modes(session))[0] == "read committed"


async def test_read_only_is_known(session_maker: Maker) -> None:
    """A write that READ ONLY refuses after the block is no primary that has moved: the connection
    stays in the pool."""
    async with session_maker() as session:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
    with pytest.raises(DBAPIError, match="read-only transaction"):
        async with session_maker() as session, get_transaction(session, read_only=True):
            await read(session)
            async with release_connection(session):
                pass
            await insert(session, 1)
    async with session_maker() as session:
        assert await session.scalar(text("SELECT pg_backend_pid()")) == pid


async def test_options_by_hand(engine: AsyncEngine, session_maker: Maker) -> None:
    """Options of `session.connection()` and of SET TRANSACTION are taken over."""
    async with create_db_context(session_maker)() as session:
        options = {
            "isolation_level": "REPEATABLE READ",
            "schema_translate_map": {None: "pg_catalog"},
            "mine": 1,
        }
        await session.connection(execution_options=options)
        await session.execute(text("SET TRANSACTION READ ONLY"))
        async with release_connection(session):
            connection = await session.connection()
            found = connection.sync_connection.get_execution_options()  # type: ignore[union-attr]
            assert found["schema_translate_map"][None] == "pg_catalog"
            assert found["mine"] == 1
            assert await modes(session) == ("repeatable read", "on", "off")
    async with create_db_context(session_maker)() as session:
        assert await modes(session) == ("read committed", "off", "off")


async def test_options_of_run_transaction(session_maker: Maker, other: Any) -> None:
    """A retry restarts everything; the options hold in each transaction of each attempt."""
    seen = []

    async def work(session: AsyncSession) -> None:
        await read(session)
        async with release_connection(session):
            pass
        seen.append((await modes(session))[0])
        if len(seen) == 1:
            await session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))
        await insert(session, 1)

    await run_transaction(session_maker, work, isolation_level="SERIALIZABLE")
    assert seen == ["serializable"] * 2
    assert await stored(other) == {1}


async def test_lock_without_snapshot(session_maker: Maker, other: Any) -> None:
    """lock_tables, as the first of a REPEATABLE READ transaction after the block, takes no
    snapshot: what the earlier holder has written is seen."""
    async with session_maker() as session:
        async with get_transaction(session, isolation_level="REPEATABLE READ"):
            await read(session)
            async with release_connection(session):
                pass
            transaction = other.transaction()
            await transaction.start()
            await other.execute("INSERT INTO item VALUES (1, '')")
            await other.execute("LOCK TABLE item IN EXCLUSIVE MODE")

            async def look() -> Any:
                async with lock_tables(session, [Item], mode="EXCLUSIVE"):
                    return await session.scalar(text("SELECT count(*) FROM item"))

            task = asyncio.create_task(look())

            async def is_waiting() -> bool:
                return bool(await other.fetch("SELECT FROM pg_locks WHERE NOT granted"))

            await until(is_waiting)
            await transaction.commit()
            assert await task == 1


async def test_settings(session_maker: Maker) -> None:
    """The settings of the unit hold in the next transaction too."""
    context = create_db_context(session_maker, settings={"app.tenant_id": "7"})
    async with context() as session:
        await read(session)
        async with release_connection(session):
            assert await session.scalar(text("SELECT current_setting('app.tenant_id')")) == "7"


# What is in the way


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


# Its end


async def test_callbacks_run_first(session_maker: Maker) -> None:
    """With `commit=True` the callbacks have run when the block begins, and later ones run at the
    end."""
    log: list[str] = []
    async with create_db_context(session_maker)() as session:
        on_commit(session, lambda: log.append("first"))
        await insert(session, 1)
        async with release_connection(session, commit=True):
            log.append("block")
        on_commit(session, lambda: log.append("second"))
    assert log == ["first", "block", "second"]


async def test_commit_that_fails(session_maker: Maker, other: Any) -> None:
    """A commit that fails raises, and the block does not run."""
    with pytest.raises(Exception, match="foreign key"):
        async with create_db_context(session_maker)() as session:
            await session.execute(text("INSERT INTO part VALUES (1, 5)"))
            async with release_connection(session, commit=True):
                raise AssertionError("the block has begun")
    assert await other.fetch("SELECT FROM part") == []


async def test_it_is_a_commit(session_maker: Maker) -> None:
    """The transaction is committed before the block, as SQLAlchemy's events see, and so it may fail
    with a serialization failure."""
    committed: list[str] = []
    async with session_maker() as session:
        event.listen(session.sync_session, "after_commit", lambda _: committed.append("commit"))
        async with get_transaction(session, isolation_level="SERIALIZABLE"):
            await read(session)
            async with release_connection(session):
                assert committed == ["commit"]


async def test_notify_is_delivered(session_maker: Maker, other: asyncpg.Connection) -> None:
    """What a SELECT has announced is delivered and not lost."""
    heard: asyncio.Queue[str] = asyncio.Queue()
    await other.add_listener("news", lambda *args: heard.put_nowait(args[3]))
    async with create_db_context(session_maker)() as session:
        await session.execute(text("SELECT pg_notify('news', 'payload')"))
        async with release_connection(session):
            assert await asyncio.wait_for(heard.get(), 60) == "payload"


async def test_honesty_goes_on(session_maker: Maker) -> None:
    """After the block a swallowed error is still reported."""
    with pytest.raises(TransactionAbortedError):
        async with create_db_context(session_maker)() as session:
            await read(session)
            async with release_connection(session):
                pass
            await swallow_error(session)


@pytest.mark.parametrize("commit", [False, True])
async def test_cancelled_everywhere(
    engine: AsyncEngine, session_maker: Maker, other: Any, commit: bool
) -> None:
    """A cancellation at each suspension leaves the old transaction or none: the pool is whole, and
    what was written is stored once or not at all."""

    async def work(n: int) -> None:
        async with create_db_context(session_maker)() as session:
            await (insert(session, n) if commit else read(session))
            async with release_connection(session, commit=commit):
                await asyncio.sleep(0)
            await insert(session, 1000 + n)

    async def check(n: int) -> None:
        assert held(engine) == 0
        async with session_maker() as session:
            await read(session)  # the next one has a connection in the pool
        ids = await stored(other)
        if commit and 1000 + n in ids:
            assert n in ids

    await check(0)
    assert await interrupt_everywhere(work, check) > 3
