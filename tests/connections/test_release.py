"""release_connection: the transaction ends, the connection is in the pool, the next one is like the
last one."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    TransactionAbortedError,
    create_db_context,
    get_transaction,
    lock_tables,
    on_commit,
    release_connection,
    run_transaction,
)
from tests.connections.releasing import Maker, held, read, sent_over, xact_start
from tests.support import Item, insert, interrupt_everywhere, stored, swallow_error, until


@pytest.fixture
def session_maker(engine: AsyncEngine) -> Maker:
    """Sessions that expire their instances at a commit, as SQLAlchemy's do by default."""
    return async_sessionmaker(engine)


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
