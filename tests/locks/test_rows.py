"""`lock_rows`: which rows, in which order, with which values; and who is in the way."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    LockTimeoutError,
    RowLockMode,
    TransactionStateError,
    get_transaction,
    lock_rows,
)
from pgtoolset.locks import rows
from tests.locks.locking import (
    COUNTED_ONCE,
    Animal,
    Dog,
    Seat,
    holding,
    two_holders,
    waiting,
)
from tests.support import Account, at_best, plain_url

Maker = async_sessionmaker[AsyncSession]


@pytest.fixture(autouse=True)
async def accounts(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """Accounts 1 to 5 with a balance of 10 times their id."""
    await other.execute(
        "INSERT INTO account (id, balance) SELECT i, 10 * i FROM generate_series(1, 5) AS i"
    )


async def test_rows_in_key_order(session_maker: Maker) -> None:
    """Rows come in key order, each once, whatever order they are named in; missing ones do not."""
    async with session_maker() as session:
        rows = await lock_rows(session, Account, [5, 1, 99, 3, 1])
        assert [row.id for row in rows] == [1, 3, 5]
        assert session.in_transaction()
        assert await lock_rows(session, Account, []) == []


@pytest.mark.parametrize("held", RowLockMode, ids=lambda mode: mode.name)
async def test_conflict_table(
    session_maker: Maker, other: asyncpg.Connection, held: RowLockMode
) -> None:
    """Every mode conflicts with every other as PostgreSQL has it for the same by hand."""
    async with session_maker() as one:
        await lock_rows(one, Account, [1], mode=held)
        for wanted in RowLockMode:
            async with session_maker() as two:
                try:
                    conflict = not await lock_rows(
                        two, Account, [1], mode=wanted.name.lower(), nowait=True
                    )
                except LockTimeoutError:
                    conflict = True
            try:
                async with other.transaction():
                    await other.execute(
                        f"SELECT FROM account WHERE id = 1 FOR {wanted.value} NOWAIT"
                    )
                by_hand = False
            except asyncpg.LockNotAvailableError:
                by_hand = True
            assert conflict == by_hand, (held, wanted)


async def test_values_as_locked(session_maker: Maker, other: asyncpg.Connection) -> None:
    """An instance that was loaded before shows what the earlier holder has written."""
    async with session_maker() as session:
        account = await session.get_one(Account, 1)
        async with holding(other, "UPDATE account SET balance = 77 WHERE id = 1"):
            task = asyncio.create_task(lock_rows(session, Account, [1]))
            await waiting(other)
        [same] = await task
        assert same is account
        assert account.balance == 77


async def test_pending_changes_are_not_lost(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Pending changes of the session are flushed first, without autoflush too."""
    async with session_maker(autoflush=False) as session:
        account = await session.get_one(Account, 1)
        account.balance = 5
        [same] = await lock_rows(session, Account, [1])
        assert same.balance == 5
        await session.commit()
    assert await other.fetchval("SELECT balance FROM account WHERE id = 1") == 5


async def test_skip_locked(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Rows that another session has locked are left out."""
    async with (
        holding(other, "SELECT FROM account WHERE id = 2 FOR UPDATE"),
        session_maker() as session,
    ):
        rows = await lock_rows(session, Account, [1, 2, 3], skip_locked=True)
        assert [row.id for row in rows] == [1, 3]


@pytest.mark.usefixtures("odd_tables")
async def test_composite_keys(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Tuples in the mapper's order lock exactly those pairs, not their cross product."""
    async with session_maker() as session:
        session.add_all([Seat(row=row, letter=letter) for row in (1, 2) for letter in "AB"])
        await session.commit()
        rows = await lock_rows(session, Seat, [(2, "A"), (1, "B")])
        assert [(row.row, row.letter) for row in rows] == [(1, "B"), (2, "A")]
        free = await other.fetch(
            "SELECT row, letter FROM seat ORDER BY row, letter FOR UPDATE SKIP LOCKED"
        )
        assert [tuple(row) for row in free] == [(1, "A"), (2, "B")]


@pytest.mark.usefixtures("odd_tables")
async def test_inheritance(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Of joined inheritance, the row in every table of the class is locked."""
    async with session_maker() as session:
        session.add_all([Dog(id=1), Animal(id=2)])
        await session.commit()
        assert [row.id for row in await lock_rows(session, Dog, [1, 2])] == [1]
        for table in (Animal.__tablename__, Dog.__tablename__.replace('"', '""')):
            with pytest.raises(asyncpg.LockNotAvailableError):
                await other.execute(f'SELECT FROM "{table}" WHERE id = 1 FOR UPDATE NOWAIT')
        await session.rollback()
        rows = await lock_rows(session, Animal, [2, 1])
        assert [type(row) for row in rows] == [Dog, Animal]


async def test_many_rows(session_maker: Maker, other: asyncpg.Connection) -> None:
    """More rows can be locked than a statement can have parameters."""
    await other.execute(
        "INSERT INTO account (id, balance) SELECT i, 0 FROM generate_series(6, 40000) AS i"
    )
    async with session_maker() as session:
        assert len(await lock_rows(session, Account, range(1, 40001))) == 40000


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("arguments", [{"timeout": "200ms"}, {"nowait": True}])
@pytest.mark.parametrize(
    "how", ["UPDATE account SET balance = 0 WHERE id = 2", "SELECT FROM account FOR UPDATE"]
)
async def test_timeout(
    session_maker: Maker,
    other: asyncpg.Connection,
    nested: bool,
    arguments: dict[str, Any],
    how: str,
) -> None:
    """The error names the holder of the row; the settings and the transaction are as they were."""
    async with holding(other, how) as pid, session_maker() as session:
        if nested:
            await session.begin()
            await session.execute(text("INSERT INTO account (id, balance) VALUES (9, 0)"))
            await session.execute(text("SET LOCAL lock_timeout = '1234ms'"))
        start = time.monotonic()
        with pytest.raises(
            LockTimeoutError, match="lock 2 rows of account in UPDATE mode"
        ) as caught:
            await lock_rows(session, Account, [1, 2], **arguments)
        if "timeout" in arguments:
            assert time.monotonic() - start > 0.19
        assert [blocker.pid for blocker in caught.value.blockers] == [pid]
        assert (caught.value.tables, caught.value.mode) == (("account",), "UPDATE")
        assert caught.value.timeout == (0.2 if "timeout" in arguments else 0)
        assert await session.scalar(text("SELECT count(*) FROM account")) == (6 if nested else 5)
        expected = ("1234ms" if nested else "0", "0")
        settings = text(
            "SELECT current_setting('lock_timeout'), current_setting('statement_timeout')"
        )
        assert tuple((await session.execute(settings)).one()) == expected
        await lock_rows(session, Account, [9], **arguments)
        assert tuple((await session.execute(settings)).one()) == expected


@pytest.mark.usefixtures("unhurried")
async def test_nowait_names_all_who_share(session_maker: Maker, database_url: str) -> None:
    """Sessions that share a row are all named, though PostgreSQL has one number for them."""
    sharers = [await asyncpg.connect(plain_url(database_url)) for _ in range(2)]
    try:
        for sharer in sharers:
            await sharer.execute("BEGIN; SELECT FROM account WHERE id = 1 FOR SHARE")
        async with session_maker() as session:
            with pytest.raises(LockTimeoutError) as caught:
                await lock_rows(session, Account, [1], nowait=True)
        assert {blocker.pid for blocker in caught.value.blockers} == {
            each.get_server_pid() for each in sharers
        }
    finally:
        for sharer in sharers:
            await sharer.close()


async def test_timeout_while_the_limits_are_put_back(
    session_maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that is over while the earlier limits are put back is over for the lock."""
    slow = "SELECT pg_sleep(60), CAST(:lock AS text), CAST(:statement AS text)"
    monkeypatch.setattr(rows, "_RESTORE", text(slow))
    async with session_maker() as session, session.begin():
        with pytest.raises(LockTimeoutError):
            await lock_rows(session, Account, [1], timeout="50ms")
        assert await session.scalar(text("SHOW statement_timeout")) == "0"


async def test_timeout_is_one_budget(session_maker: Maker, database_url: str) -> None:
    """One budget holds for all rows, though PostgreSQL counts for each row anew."""
    rows = [f"SELECT FROM account WHERE id = {number} FOR UPDATE" for number in (1, 2)]

    async def attempt() -> bool:
        async with two_holders(database_url, *rows), session_maker() as session:
            start = time.monotonic()
            with pytest.raises(LockTimeoutError) as caught:
                await lock_rows(session, Account, [1, 2], timeout=1.0)
            took = time.monotonic() - start
            return took <= COUNTED_ONCE and bool(caught.value.blockers)

    await at_best(attempt)


@pytest.mark.parametrize("nested", [False, True])
async def test_sixty_days(session_maker: Maker, other: asyncpg.Connection, nested: bool) -> None:
    """A timeout longer than PostgreSQL's settings can hold waits, and the settings are restored."""
    settings = text("SELECT current_setting('lock_timeout'), current_setting('statement_timeout')")
    async with session_maker() as session:
        if nested:
            await session.begin()
        async with holding(other, "UPDATE account SET balance = 77 WHERE id = 1"):
            task = asyncio.create_task(lock_rows(session, Account, [1], timeout="60d"))
            await waiting(other)
        [account] = await task
        assert account.balance == 77
        assert tuple((await session.execute(settings)).one()) == ("0", "0")


async def test_statement_timeout_of_the_caller(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """A shorter `statement_timeout` of the caller stays, and its error is PostgreSQL's own."""
    async with (
        holding(other, "SELECT FROM account WHERE id = 1 FOR UPDATE"),
        session_maker() as session,
        session.begin(),
    ):
        await session.execute(text("SET LOCAL statement_timeout = '50ms'"))
        with pytest.raises(DBAPIError) as caught:
            await lock_rows(session, Account, [1], timeout="60d")
        assert getattr(caught.value.orig, "sqlstate", None) == "57014"
        assert await session.scalar(text("SHOW statement_timeout")) == "50ms"


async def test_opposite_orders_never_deadlock(session_maker: Maker) -> None:
    """Two tasks that name the same rows in opposite orders never deadlock, in 100 rounds."""

    async def work(order: list[int]) -> None:
        for _ in range(100):
            async with session_maker() as session, get_transaction(session):
                for account in await lock_rows(session, Account, order):
                    account.balance += 1

    await asyncio.gather(work([1, 2, 3, 4, 5]), work([5, 4, 3, 2, 1]))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": int}, TypeError),
        ({"model": Account()}, TypeError),
        ({"pks": 1}, TypeError),
        ({"pks": "12"}, TypeError),
        ({"pks": [(1, 2)]}, ValueError),
        ({"pks": [None]}, ValueError),
        ({"mode": "EXCLUSIVE"}, ValueError),
        ({"mode": None}, TypeError),
        ({"timeout": "soon"}, ValueError),
        ({"nowait": True, "skip_locked": True}, ValueError),
        ({"skip_locked": "yes"}, TypeError),
        ({"session": None}, TypeError),
    ],
)
async def test_bad_arguments(
    session_maker: Maker, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """A bad argument is refused before any SQL."""
    async with session_maker() as session:
        with pytest.raises(error):
            await lock_rows(**({"session": session, "model": Account, "pks": [1]} | arguments))
        assert not session.in_transaction()


async def test_autocommit_is_refused(engine: AsyncEngine) -> None:
    """In AUTOCOMMIT the lock would end with its own statement: an error."""
    async with AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
            await lock_rows(session, Account, [1])


async def test_other_errors_propagate(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Under REPEATABLE READ a row that has changed is PostgreSQL's serialization failure."""
    async with session_maker() as session:
        with pytest.raises(DBAPIError) as caught:
            async with get_transaction(session, isolation_level="REPEATABLE READ"):
                await session.execute(text("SELECT FROM account"))
                await other.execute("UPDATE account SET balance = 1 WHERE id = 1")
                await lock_rows(session, Account, [1], timeout="1s")
        assert getattr(caught.value.orig, "sqlstate", None) == "40001"
