"""`advisory_lock`: held until its transaction ends, and never carried into the pool."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import AbstractAsyncContextManager
from typing import Any

import asyncpg
import pytest
from fastapi import Depends, FastAPI
from httpx import ASGITransport, AsyncClient
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    LockTimeoutError,
    TransactionAbortedError,
    TransactionStateError,
    advisory_lock,
    create_db_context,
    create_db_dependency,
    get_transaction,
    lock_tables,
)
from pgtoolset._arguments import advisory_numbers
from tests.locks.locking import holding, nothing_left, settings_of, waiting
from tests.support import Account, Item, insert, stored, swallow_error

Maker = async_sessionmaker[AsyncSession]

TAKE = "SELECT pg_advisory_xact_lock(42)"


async def is_free(other: asyncpg.Connection, key: int = 42) -> bool:
    """Whether another session could have the lock now."""
    async with other.transaction():
        return bool(await other.fetchval("SELECT pg_try_advisory_xact_lock($1)", key))


# How long it is held


async def test_outermost_ends_with_the_block(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Outermost, the commit at the end of the block releases the lock."""
    async with session_maker() as session:
        async with advisory_lock(session, 42) as held:
            assert held is True
            assert not await is_free(other)
            await insert(session, 2)
        assert not session.in_transaction()
        assert await is_free(other)
        assert await stored(other) == {2}
    await nothing_left(other)


async def test_nested_holds_until_the_outermost_ends(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Nested, the lock outlives its block and ends with the outermost transaction."""
    async with session_maker() as session, get_transaction(session):
        await insert(session, 1)
        async with advisory_lock(session, 42) as held:
            assert held is True
            assert not await is_free(other)
            await insert(session, 2)
        assert not await is_free(other)
        assert await stored(other) == set()
    assert await is_free(other)
    assert await stored(other) == {1, 2}
    await nothing_left(other)


async def test_nested_ends_with_the_rollback_of_its_level(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """An exception in the block, or in a block around it, releases the lock with its savepoint."""
    async with session_maker() as session, get_transaction(session):
        with pytest.raises(KeyError):
            async with advisory_lock(session, 42):
                raise KeyError
        assert await is_free(other)
        with pytest.raises(KeyError):
            async with get_transaction(session):
                async with advisory_lock(session, 42):
                    pass
                assert not await is_free(other)
                raise KeyError
        assert await is_free(other)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
async def test_until_the_transaction_ends(
    engine: AsyncEngine, session_maker: Maker, other: asyncpg.Connection, nested: bool, end: str
) -> None:
    """A commit, rollback or close inside the block releases the lock before the pool has it."""
    held = text("SELECT 1 FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'")
    async with session_maker() as session:
        if nested:
            await session.begin()
            await insert(session, 1)
        try:
            async with advisory_lock(session, 42):
                await getattr(session, end)()
                assert await is_free(other)
                for _ in range(5):
                    async with engine.connect() as connection:
                        assert not (await connection.scalars(held)).all()
        except InvalidRequestError:
            assert end == "close"
    await nothing_left(other)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("swallowed", [False, True])
async def test_aborted_transaction(
    session_maker: Maker, other: asyncpg.Connection, nested: bool, swallowed: bool
) -> None:
    """After an error in the block, raised or swallowed, the lock is free after the block."""
    async with session_maker() as session:
        if nested:
            await session.begin()
            await insert(session, 1)
        with pytest.raises(TransactionAbortedError if swallowed else DBAPIError):
            async with advisory_lock(session, 42):
                if swallowed:
                    await swallow_error(session)
                else:
                    await session.execute(text("SELECT 1 / 0"))
        assert await is_free(other)
        if nested:
            await insert(session, 2)
        await session.commit()
    assert await stored(other) == ({1, 2} if nested else set())
    await nothing_left(other)


@pytest.mark.parametrize("nested", [False, True])
async def test_lost_connection(
    engine: AsyncEngine, other: asyncpg.Connection, nested: bool
) -> None:
    """A lost connection takes its lock with it, and the pool goes on."""
    async with AsyncSession(engine) as session:
        if nested:
            await session.begin()
            await insert(session, 1)
        # SQLAlchemy 2.0 does not wrap the error of an asyncpg that has lost its place.
        with pytest.raises((DBAPIError, asyncpg.InternalClientError)):
            async with advisory_lock(session, 42):
                pid = await session.scalar(text("SELECT pg_backend_pid()"))
                await other.execute("SELECT pg_terminate_backend($1, 5000)", pid)
                await session.execute(text("SELECT 1"))
    assert await is_free(other)
    async with AsyncSession(engine) as session, advisory_lock(session, 42) as held:
        assert held


async def test_same_key_twice(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A block inside a block of the same key does not wait for itself, whatever the modes are."""
    async with session_maker() as session:
        async with advisory_lock(session, 42):
            async with advisory_lock(session, 42), advisory_lock(session, 42, shared=True):
                pass
            assert not await is_free(other)
        assert await is_free(other)
        async with advisory_lock(session, 42, shared=True):
            async with advisory_lock(session, 42):
                pass
            assert not await is_free(other)
        assert await is_free(other)


async def test_same_key_twice_and_rolled_back(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """The rollback of the inner block leaves the outer one its lock."""
    async with session_maker() as session, advisory_lock(session, 42):
        with pytest.raises(KeyError):
            async with advisory_lock(session, 42):
                raise KeyError
        assert not await is_free(other)
    assert await is_free(other)


async def test_session_bound_to_a_connection(
    engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """On a connection of the caller's own, the lock ends with that connection's transaction."""
    async with engine.connect() as connection:
        async with connection.begin():
            async with AsyncSession(
                connection, join_transaction_mode="create_savepoint"
            ) as session:
                async with advisory_lock(session, 42):
                    assert not await is_free(other)
                assert not await is_free(other)
        assert await is_free(other)
    async with engine.connect() as connection:
        async with AsyncSession(connection) as session:
            async with advisory_lock(session, 42):
                await session.commit()
                assert await is_free(other)


# What it is for


async def test_only_one_at_a_time(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Of many read-modify-writes at a time, each waits for the one before."""
    async with session_maker() as session, session.begin():
        await insert(session, 1)

    async def increment_alone() -> None:
        async with session_maker() as session, advisory_lock(session, "counter"):
            await increment(session)

    await asyncio.gather(*(increment_alone() for _ in range(20)))
    assert await other.fetchval("SELECT name FROM item WHERE id = 1") == "20"


async def test_only_one_at_a_time_nested(session_maker: Maker, other: asyncpg.Connection) -> None:
    """In a transaction that goes on after the block, no increment is lost either."""
    db_context = create_db_context(session_maker)
    async with db_context() as session:
        await insert(session, 1)

    async def increment_nested() -> None:
        async with db_context() as session:
            async with get_transaction(session):
                async with advisory_lock(session, "counter"):
                    await increment(session)
            # The work is not committed yet: whoever had the lock now would read the old number.
            await session.execute(text("SELECT pg_sleep(0.005)"))

    await asyncio.gather(*(increment_nested() for _ in range(20)))
    assert await other.fetchval("SELECT name FROM item WHERE id = 1") == "20"


async def test_only_one_at_a_time_in_endpoints(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Of concurrent requests with `Depends(get_db)`, each sees what the one before has written."""
    get_db = create_db_dependency(session_maker=session_maker)
    needs_db = Depends(get_db)
    app = FastAPI()

    @app.post("/")
    async def add_one(session: AsyncSession = needs_db) -> None:
        async with advisory_lock(session, "counter"):
            item = await session.get_one(Item, 1)
            item.name = str(int(item.name) + 1)

    await other.execute("INSERT INTO item (id, name) VALUES (1, '0')")
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        responses = await asyncio.gather(*(client.post("/") for _ in range(10)))
    assert {response.status_code for response in responses} == {200}
    assert await other.fetchval("SELECT name FROM item WHERE id = 1") == "10"
    await nothing_left(other)


@pytest.mark.parametrize("kind", ["advisory", "tables"])
async def test_pending_changes_are_flushed_under_the_lock(
    session_maker: Maker, other: asyncpg.Connection, onlooker: asyncpg.Connection, kind: str
) -> None:
    """While a nested block waits, no row of its pending changes is locked; then they are stored."""
    await other.execute("INSERT INTO item (id, name) VALUES (1, 'old')")

    async def work() -> None:
        async with session_maker() as session, get_transaction(session):
            item = await session.get_one(Item, 1)
            item.name = "new"
            session.add(Item(id=2))
            block: AbstractAsyncContextManager[Any] = (
                advisory_lock(session, 42)
                if kind == "advisory"
                else lock_tables(session, [Account], mode="EXCLUSIVE")
            )
            async with block:
                assert await session.scalar(text("SELECT name FROM item WHERE id = 1")) == "new"

    async with holding(other, f"{TAKE}; LOCK TABLE account"):
        task = asyncio.create_task(work())
        await waiting(onlooker)
        await onlooker.execute("SELECT FROM item WHERE id = 1 FOR UPDATE NOWAIT")
    await task
    assert await stored(other) == {1, 2}


@pytest.mark.parametrize("pending", [False, True])
async def test_timeout_with_pending_changes(
    session_maker: Maker, other: asyncpg.Connection, pending: bool
) -> None:
    """After a timeout the changes are pending as before, and the transaction stores them."""
    async with holding(other, TAKE), session_maker() as session, get_transaction(session):
        await insert(session, 1)
        if pending:
            session.add(Item(id=2))
        with pytest.raises(LockTimeoutError):
            async with advisory_lock(session, 42, timeout=0.05):
                pass
        assert bool(session.new) == pending
        assert await settings_of(session) == "0"
    assert await stored(other) == ({1, 2} if pending else {1})


async def increment(session: AsyncSession) -> None:
    """Read a number and write the next one, without a lock on the row in between."""
    number = int(await session.scalar(text("SELECT '0' || name FROM item WHERE id = 1")) or 0)
    await session.execute(
        text("UPDATE item SET name = :name WHERE id = 1"), {"name": str(number + 1)}
    )


async def test_pending_changes_are_not_the_blocks(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Changes that were pending before the block survive its rollback."""
    async with session_maker() as session:
        session.add(Item(id=1))
        with pytest.raises(KeyError):
            async with advisory_lock(session, 42):
                session.add(Item(id=2))
                raise KeyError
        await session.commit()
    assert await stored(other) == {1}


# Variants


@pytest.mark.parametrize("nested", [False, True])
async def test_nowait(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """With `nowait` the block yields `False` where another session has the lock, and goes on."""
    async with holding(other, TAKE), session_maker() as session:
        if nested:
            await session.begin()
        async with advisory_lock(session, 42, nowait=True) as held:
            assert held is False
            await insert(session, 1)
        async with advisory_lock(session, 43, nowait=True, timeout="60d") as held:
            assert held is True
        await session.commit()
    assert await stored(other) == {1}
    async with session_maker() as session, advisory_lock(session, 42, nowait=True) as held:
        assert held is True
    await nothing_left(other)


@pytest.mark.parametrize("nested", [False, True])
async def test_shared(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """Several sessions share the lock, and none has it alone meanwhile."""
    async with session_maker() as one, session_maker() as two:
        if nested:
            await one.begin()
            await two.begin()
        async with (
            advisory_lock(one, 42, shared=True),
            advisory_lock(two, 42, shared=True, nowait=True) as held,
        ):
            assert held
            assert not await is_free(other)
        assert await is_free(other) == (not nested)
        await one.commit()
        await two.commit()
        assert await is_free(other)


@pytest.mark.parametrize(
    ("key", "classid", "objid", "objsubid"),
    [
        (42, 0, 42, 1),
        (-1, 2**32 - 1, 2**32 - 1, 1),
        (2**63 - 1, 2**31 - 1, 2**32 - 1, 1),
        ((7, -8), 7, 2**32 - 8, 2),
        ("nightly report", 0xCD1FAB31, 0xFFFFFFFF, 1),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
async def test_keys(
    session_maker: Maker,
    other: asyncpg.Connection,
    key: Any,
    classid: int,
    objid: int,
    objsubid: int,
    nested: bool,
) -> None:
    """The lock in pg_locks is a bigint, two int4, or the first 64 bits of a string's SHA-256."""
    if isinstance(key, str):
        digest = hashlib.sha256(key.encode()).digest()
        classid, objid = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
    async with session_maker() as session:
        if nested:
            await session.begin()
        async with advisory_lock(session, key):
            rows = await other.fetch(
                "SELECT classid, objid, objsubid FROM pg_locks WHERE locktype = 'advisory'"
            )
            assert [tuple(row) for row in rows] == [(classid, objid, objsubid)]
    await nothing_left(other)


def test_string_keys_are_stable() -> None:
    """A string is the same lock for ever: in another process, another version, another Python."""
    empty = int.from_bytes(bytes.fromhex("e3b0c44298fc1c14"), "big", signed=True)
    assert advisory_numbers("key", "") == (empty,)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"key": None}, TypeError),
        ({"key": True}, TypeError),
        ({"key": 1.5}, TypeError),
        ({"key": b"x"}, TypeError),
        ({"key": (1, 2, 3)}, TypeError),
        ({"key": (1, "2")}, TypeError),
        ({"key": 2**63}, ValueError),
        ({"key": (2**31, 0)}, ValueError),
        ({"timeout": 0}, ValueError),
        ({"shared": "yes"}, TypeError),
        ({"nowait": None}, TypeError),
        ({"session": None}, TypeError),
    ],
)
async def test_bad_arguments(
    session_maker: Maker, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """A bad argument is refused by the call itself, by its name: no SQL, no transaction."""
    async with session_maker() as session:
        with pytest.raises(error, match=f"^{next(iter(arguments))}"):
            advisory_lock(**({"session": session, "key": 1} | arguments))
        assert not session.in_transaction()


async def test_autocommit_is_refused(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """In AUTOCOMMIT the lock would end with its own statement: an error, not an open block."""
    async with AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
            async with advisory_lock(session, 42):
                raise AssertionError("the block runs without its lock")
    await nothing_left(other)


# Time


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("nested", [False, True])
async def test_timeout(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """A timeout names the holder; `lock_timeout` is as it was, and the transaction is usable."""
    async with holding(other, TAKE) as pid, session_maker() as session:
        if nested:
            await session.begin()
            await insert(session, 1)
            await session.execute(text("SET LOCAL lock_timeout = '1234ms'"))
        with pytest.raises(LockTimeoutError, match="advisory lock 42") as caught:
            async with advisory_lock(session, 42, timeout="200ms"):
                pass
        error = caught.value
        assert [blocker.pid for blocker in error.blockers] == [pid]
        assert (error.tables, error.mode, error.timeout) == ((), "EXCLUSIVE", 0.2)
        assert await settings_of(session) == ("1234ms" if nested else "0")
        async with advisory_lock(session, 43, timeout="200ms"):
            assert await settings_of(session) == ("1234ms" if nested else "0")
        await session.commit()
    assert await stored(other) == ({1} if nested else set())
    await nothing_left(other)


async def test_lock_timeout_of_the_connection(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Without a timeout the connection's own `lock_timeout` holds."""
    async with holding(other, TAKE), session_maker() as session, get_transaction(session):
        await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
        with pytest.raises(LockTimeoutError):
            async with advisory_lock(session, 42):
                pass


@pytest.mark.parametrize("nested", [False, True])
async def test_sixty_days(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """A timeout longer than PostgreSQL's setting can hold waits, and the setting is restored."""
    async with session_maker() as session:
        if nested:
            await session.begin()
        async with holding(other, TAKE):
            task = asyncio.create_task(setting_inside(session))
            await waiting(other)
        assert await task == "0"


async def setting_inside(session: AsyncSession) -> str:
    """Return the `lock_timeout` inside a block that may be waited for for 60 days."""
    async with advisory_lock(session, 42, timeout="60d"):
        return await settings_of(session)


async def test_an_error_does_not_show_a_url(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """A URL that is used as a key stays out of the error."""
    url = "postgresql://till:secret@host/shop"
    take = f"SELECT pg_advisory_xact_lock({advisory_numbers('key', url)[0]})"
    async with holding(other, take), session_maker() as session:
        with pytest.raises(LockTimeoutError, match="advisory lock a URL") as caught:
            async with advisory_lock(session, url, timeout="50ms"):
                pass
    assert "secret" not in str(caught.value)


async def test_the_statement_is_made_once(
    engine: AsyncEngine, session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Calls of one kind execute one statement, whatever their keys; each other kind has its own."""
    kinds: list[dict[str, Any]] = [{}, {"shared": True}, {"nowait": True}, {"timeout": "5s"}]
    executed: list[Any] = []

    def note(_: object, statement: Any, *rest: object) -> None:
        if "advisory" in str(statement):
            executed.append(statement)

    event.listen(engine.sync_engine, "before_execute", note)
    try:
        for first, second in ((1, -2), ("one", "two"), ((3, 4), (-5, 6))):
            for kind in kinds:
                for key in (first, second):
                    async with session_maker() as session, advisory_lock(session, key, **kind):
                        (held,) = await held_keys(other)
                        assert held == advisory_numbers("key", key)
    finally:
        event.remove(engine.sync_engine, "before_execute", note)
    assert len(executed) == 24
    # A string is a key of one number.
    assert len({id(each) for each in executed}) == 2 * len(kinds)
    assert all(executed[at] is executed[at + 1] for at in range(0, 24, 2))


async def held_keys(other: asyncpg.Connection) -> list[tuple[int, ...]]:
    """The keys of the advisory locks that are held now, as the function takes them."""
    rows = await other.fetch(
        "SELECT classid::bigint, objid::bigint, objsubid FROM pg_locks WHERE locktype = 'advisory'"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return [
        (signed(high << 32 | low, 64),) if kind == 1 else (signed(high, 32), signed(low, 32))
        for high, low, kind in rows
    ]


def signed(number: int, bits: int) -> int:
    return number - (1 << bits) if number >> (bits - 1) else number
