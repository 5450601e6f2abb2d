"""`lock_tables`: modes, order, budget, what is restored, and who is named."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
)

from pgtoolset import (
    LockMode,
    LockTimeoutError,
    RowLockMode,
    TransactionStateError,
    get_transaction,
    lock_tables,
)
from pgtoolset._postgres.locks import CONFLICTS, lock_block
from tests.locks.locking import (
    COUNTED_ONCE,
    SCHEMA,
    Animal,
    Dog,
    Order,
    holding,
    locks_of,
    nothing_left,
    pid_of,
    settings_of,
    two_holders,
    waiting,
)
from tests.support import Account, Item, Part, at_best, insert, stored

Maker = async_sessionmaker[AsyncSession]


# Modes


@pytest.mark.parametrize("held", LockMode, ids=lambda mode: mode.name)
async def test_conflict_table(
    session_maker: Maker, other: asyncpg.Connection, held: LockMode
) -> None:
    """Every mode conflicts with every other as in PostgreSQL, and our table says the same."""
    async with session_maker() as one, lock_tables(one, [Item], mode=held):
        for wanted in LockMode:
            async with session_maker() as two:
                try:
                    async with lock_tables(two, [Item], mode=wanted, nowait=True):
                        conflict = False
                except LockTimeoutError:
                    conflict = True
            try:
                async with other.transaction():
                    await other.execute(f"LOCK TABLE item IN {wanted.value} MODE NOWAIT")
                    by_hand = False
            except asyncpg.LockNotAvailableError:
                by_hand = True
            assert conflict == by_hand == (wanted in CONFLICTS[held]), (held, wanted)


@pytest.mark.parametrize("mode", ["EXCLUSIVE", "exclusive", LockMode.EXCLUSIVE])
async def test_mode_spellings(session_maker: Maker, other: asyncpg.Connection, mode: Any) -> None:
    """A mode is a member, its value or its name, in any case; SHARE UPDATE EXCLUSIVE by default."""
    async with session_maker() as session:
        async with lock_tables(session=session, tables=[Item], mode=mode) as same:
            assert same is session
            assert ("item", "ExclusiveLock") in await locks_of(other, await pid_of(session))
        async with lock_tables(session, [Item], mode="access_Share"):
            assert ("item", "AccessShareLock") in await locks_of(other, await pid_of(session))
        async with lock_tables(session, [Item]):
            assert ("item", "ShareUpdateExclusiveLock") in await locks_of(
                other, await pid_of(session)
            )
    await nothing_left(other)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"tables": []}, ValueError),
        ({"tables": Item}, TypeError),
        ({"tables": "item"}, TypeError),
        ({"tables": ["item"]}, TypeError),
        ({"tables": [Item()]}, TypeError),
        ({"tables": [int]}, TypeError),
        ({"tables": None}, TypeError),
        ({"mode": "EXCLUSIVE; DROP TABLE item"}, ValueError),
        ({"mode": RowLockMode.SHARE}, TypeError),
        ({"mode": 3}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": float("inf")}, ValueError),
        ({"timeout": True}, TypeError),
        ({"timeout": b"5s"}, TypeError),
        ({"timeout": "5"}, ValueError),
        ({"timeout": "5 fortnights"}, ValueError),
        ({"timeout": "-5s"}, ValueError),
        ({"timeout": "0s"}, ValueError),
        ({"timeout": "5s'; DROP TABLE item"}, ValueError),
        ({"timeout": timedelta(0)}, ValueError),
        ({"nowait": 1}, TypeError),
    ],
)
async def test_bad_arguments(
    session_maker: Maker, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """A bad argument is refused by the call itself: no SQL, no transaction."""
    async with session_maker() as session:
        with pytest.raises(error):
            lock_tables(session, **({"tables": [Item]} | arguments))
        assert not session.in_transaction()


async def test_bad_session(session_maker: Maker) -> None:
    """A synchronous session and a factory are refused: a lock needs the session's connection."""
    async with session_maker() as session:
        for wrong in (session.sync_session, session_maker, None):
            with pytest.raises(TypeError):
                lock_tables(wrong, [Item])  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("timeout", "milliseconds"),
    [
        (5, 5000), (0.25, 250), (timedelta(minutes=1), 60000), ("500ms", 500), ("5s", 5000),
        (" 1.5 min ", 90000), ("2h", 7200000), ("1d", 86400000), ("500us", 1), ("0.0001s", 1),
        (0.001, 1),
        ("60d", 2**31 - 1), (timedelta.max, 2**31 - 1), (10**400, 2**31 - 1),
    ],
)  # fmt: skip
def test_timeout_spellings(timeout: Any, milliseconds: int) -> None:
    """A timeout is seconds, a timedelta or a number with a unit, rounded up to milliseconds."""
    from pgtoolset._arguments import milliseconds as to_milliseconds
    from pgtoolset._arguments import seconds

    assert to_milliseconds(seconds("timeout", timeout)) == milliseconds


# Names


@pytest.mark.usefixtures("odd_tables")
async def test_names(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Reserved words, mixed case and schemas are quoted; a class locks every table that it maps."""
    async with session_maker() as session:
        async with lock_tables(session, [Order, Dog, Animal.__table__], mode="SHARE") as locked:
            held = {
                name
                for name, mode in await locks_of(other, await pid_of(locked))
                if mode == "ShareLock"
            }
            assert held == {"order", "Animal", Dog.__tablename__}
        async with lock_tables(session, [Animal], mode="SHARE"):
            held = {
                name
                for name, mode in await locks_of(other, await pid_of(session))
                if mode == "ShareLock"
            }
            assert held == {"Animal"}
        async with holding(other, f'LOCK TABLE "{SCHEMA}"."order"'):
            with pytest.raises(LockTimeoutError) as caught:
                async with lock_tables(session, [Order, Animal], nowait=True):
                    pass
        assert caught.value.tables == (f'"{SCHEMA}"."order"', '"Animal"')


@pytest.mark.usefixtures("odd_tables")
@pytest.mark.parametrize("where", ["engine", "transaction"])
async def test_schema_translate_map(
    engine: AsyncEngine, other: asyncpg.Connection, where: str
) -> None:
    """Schemas are translated as they are for the session's own statements."""
    await other.execute(f'CREATE TABLE "{SCHEMA}".item (LIKE item); CREATE TABLE "order" (id int)')
    try:
        translation = {None: SCHEMA, SCHEMA: None}
        translated = (
            engine.execution_options(schema_translate_map=translation)
            if where == "engine"
            else engine
        )
        async with AsyncSession(translated) as session, session.begin():
            if where == "transaction":
                await session.connection(execution_options={"schema_translate_map": translation})
            async with lock_tables(session, [Item, Order], mode="SHARE"):
                oids = await other.fetch(
                    """SELECT relation::regclass::text AS name FROM pg_locks
                       WHERE mode = 'ShareLock' AND pid = $1""",
                    await pid_of(session),
                )
                assert {row["name"] for row in oids} == {f'"{SCHEMA}".item', '"order"'}
    finally:
        await other.execute('DROP TABLE "order"')


async def test_missing_table(session_maker: Maker) -> None:
    """A missing table is PostgreSQL's own error, and the outer transaction survives it."""
    async with session_maker() as session, session.begin():
        with pytest.raises(DBAPIError) as caught:
            async with lock_tables(session, [Order]):
                pass
        assert not isinstance(caught.value, LockTimeoutError)
        assert await session.scalar(text("SELECT 1")) == 1


async def test_one_statement(session_maker: Maker, caplog: pytest.LogCaptureFixture) -> None:
    """All tables are locked, and the timeout is set and restored, by one statement."""
    with caplog.at_level("INFO", logger="sqlalchemy.engine.Engine"):
        async with session_maker() as session, session.begin():
            await session.execute(text("SELECT 1"))
            caplog.clear()
            async with lock_tables(session, [Part, Item, Account], mode="SHARE"):
                pass
    statements = [
        record.getMessage() for record in caplog.records if not record.getMessage().startswith("[")
    ]
    assert [statement.split()[0] for statement in statements if statement != "COMMIT"] == [
        "SAVEPOINT",
        "DO",
        "RELEASE",
    ]
    assert (
        statements[1].index("account") < statements[1].index("item") < statements[1].index("part")
    )


async def test_autocommit_is_refused(engine: AsyncEngine) -> None:
    """In AUTOCOMMIT a lock would end with its own statement: an error, not an open block."""
    async with AsyncSession(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
            async with lock_tables(session, [Item]):
                pass


# The transaction


async def test_outermost_ends_with_the_block(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Outermost, the block is a transaction: it commits at its end, and the lock is released."""
    async with session_maker() as session:
        async with lock_tables(session, [Item]):
            await insert(session, 1)
        assert not session.in_transaction()
        assert await stored(other) == {1}
        with pytest.raises(KeyError):
            async with lock_tables(session, [Item]):
                await insert(session, 2)
                raise KeyError
        assert await stored(other) == {1}
    await nothing_left(other)


async def test_nested_holds_until_the_outermost_ends(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Nested, the lock outlives its block until the outermost ends or its level rolls back."""
    async with session_maker() as session, get_transaction(session):
        pid = await pid_of(session)
        async with lock_tables(session, [Item], mode="SHARE"):
            pass
        with pytest.raises(KeyError):
            async with lock_tables(session, [Account], mode="SHARE"):
                raise KeyError
        assert await locks_of(other, pid) == {("item", "ShareLock")}
    await nothing_left(other)


async def test_after_a_timeout_the_outer_transaction_is_usable(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """After a timeout the earlier and later writes of the outer transaction are committed."""
    async with holding(other, "LOCK TABLE account"):
        async with session_maker() as session, get_transaction(session):
            await insert(session, 1)
            with pytest.raises(LockTimeoutError):
                async with lock_tables(session, [Part, Account], timeout=0.1):
                    raise AssertionError("the block runs without its lock")
            assert not await locks_of(other, await pid_of(session)) & {
                ("part", "ShareUpdateExclusiveLock")
            }
            await insert(session, 2)
    assert await stored(other) == {1, 2}


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("setting", ["default", "session", "local"])
@pytest.mark.parametrize("timeout", ["5s", None, "nowait"])
async def test_lock_timeout_is_restored(
    session_maker: Maker,
    other: asyncpg.Connection,
    isolation_level: Any,
    setting: str,
    timeout: Any,
) -> None:
    """`lock_timeout` is as it was in the block, after a failure and after the commit."""
    arguments: dict[str, Any] = {"nowait": True} if timeout == "nowait" else {"timeout": timeout}
    async with session_maker() as session:
        connection = await session.connection()
        expected = "0" if setting == "default" else "1234ms"
        if setting == "session":
            await session.execute(text("SET lock_timeout = '1234ms'"))
            await session.commit()
            connection = await session.connection()
        await session.rollback()
        async with get_transaction(session, isolation_level=isolation_level):
            if setting == "local":
                await session.execute(text("SET LOCAL lock_timeout = '1234ms'"))
            async with lock_tables(session, [Item, Account], mode="SHARE", **arguments):
                assert await settings_of(session) == expected
            assert await settings_of(session) == expected
            if timeout is not None:
                async with holding(other, "LOCK TABLE part"):
                    with pytest.raises(LockTimeoutError):
                        async with lock_tables(
                            session, [Item, Part], nowait="nowait" in arguments, timeout=0.05
                        ):
                            pass
                assert await settings_of(session) == expected
        after = "1234ms" if setting == "session" else "0"
        assert await settings_of(session) == after
        await session.execute(text("RESET lock_timeout"))
        await session.commit()
        assert connection is not None


@pytest.mark.parametrize("isolation_level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("tables", [[Item], [Item, Account]], ids=["one", "two"])
async def test_no_snapshot_before_the_lock(
    session_maker: Maker, other: asyncpg.Connection, isolation_level: Any, tables: list[Any]
) -> None:
    """Locked first, a REPEATABLE READ transaction sees what the earlier holder has written."""

    async def count() -> list[int]:
        async with (
            session_maker() as session,
            get_transaction(session, isolation_level=isolation_level),
        ):
            async with lock_tables(session, tables, mode="EXCLUSIVE"):
                return list(await session.scalars(text("SELECT id FROM item")))

    async with holding(other, "LOCK TABLE item"):
        task = asyncio.create_task(count())
        await waiting(other)
        await other.execute("INSERT INTO item (id, name) VALUES (7, '')")
    assert await task == [7]


@pytest.mark.parametrize("isolation_level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("timeout", ["5s", None])
@pytest.mark.parametrize("blocked", [False, True])
async def test_statements_do_not_grow_with_the_tables(
    engine: AsyncEngine,
    other: asyncpg.Connection,
    isolation_level: Any,
    timeout: Any,
    blocked: bool,
) -> None:
    """Without a snapshot too, three tables take as many statements as one, free or not."""
    statements: list[str] = []

    def sent(*arguments: Any) -> None:
        statements.append(arguments[2])

    async def count(tables: list[Any]) -> int:
        async with (
            AsyncSession(engine) as session,
            get_transaction(session, isolation_level=isolation_level),
        ):
            await session.connection()
            statements.clear()
            async with lock_tables(session, tables, mode="EXCLUSIVE", timeout=timeout):
                taken = sum(not each.startswith("SAVEPOINT") for each in statements)
                assert await settings_of(session) == "0"
                assert await session.scalar(text("SHOW statement_timeout")) == "0"
        return taken

    event.listen(engine.sync_engine, "before_cursor_execute", sent)
    counts = []
    for tables in ([Item], [Item, Account, Part]):
        if blocked:
            async with holding(other, "LOCK TABLE item"):
                task = asyncio.create_task(count(tables))
                await waiting(other)
            counts.append(await task)
        else:
            counts.append(await count(tables))
    event.remove(engine.sync_engine, "before_cursor_execute", sent)
    assert counts[0] == counts[1]
    assert blocked or counts[0] <= 2


# Order


async def test_opposite_orders_never_deadlock(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Two tasks that name the same tables in opposite orders never deadlock, in 200 rounds."""
    tables: list[Any] = [Item, Account, Part, Item.__table__]

    async def work(order: list[Any]) -> None:
        for _ in range(200):
            async with (
                session_maker() as session,
                lock_tables(session, order, mode="EXCLUSIVE", timeout="30s"),
            ):
                await session.execute(text("SELECT 1"))

    await asyncio.gather(work(tables), work(tables[::-1]))
    await nothing_left(other)


# Time


@pytest.mark.parametrize("timeout", [1.0, "1000ms", timedelta(seconds=1)])
@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_timeout_is_one_budget(
    session_maker: Maker, database_url: str, timeout: Any, isolation_level: Any
) -> None:
    """One budget holds for all the tables, though they are taken one after the other."""

    async def attempt() -> bool:
        async with two_holders(database_url, "LOCK TABLE account", "LOCK TABLE item"):
            async with (
                session_maker() as session,
                get_transaction(session, isolation_level=isolation_level),
            ):
                await session.connection()
                start = time.monotonic()
                with pytest.raises(LockTimeoutError) as caught:
                    async with lock_tables(session, [Item, Account], timeout=timeout):
                        pass
                took = time.monotonic() - start
            assert caught.value.timeout == 1.0
            assert took >= 0.99
            return took <= COUNTED_ONCE

    await at_best(attempt)


async def test_timeouts_under_load(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Five waiters that exhaust the pool fail in time, and each error names the holder."""
    async with holding(other, "LOCK TABLE item") as pid:

        async def wait(timeout: float) -> bool:
            async with session_maker() as session, session.begin():
                await session.connection()
                start = time.monotonic()
                with pytest.raises(LockTimeoutError) as caught:
                    async with lock_tables(session, [Item], timeout=timeout):
                        pass
                # Half as long again on a quiet machine.
                is_in_time = time.monotonic() - start < 3 * timeout
                return is_in_time and pid in {each.pid for each in caught.value.blockers}

        async def attempt() -> bool:
            return all(await asyncio.gather(*(wait(each) for each in (0.6, 0.7, 0.8, 0.9, 1.0))))

        await at_best(attempt)


async def test_no_timeout_waits(session_maker: Maker, other: asyncpg.Connection) -> None:
    """`None` waits for ever, whatever `lock_timeout` the connection has."""
    async with holding(other, "LOCK TABLE item"):

        async def work() -> bool:
            async with session_maker() as session, get_transaction(session):
                await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
                async with lock_tables(session, [Item], timeout=None):
                    return True

        task = asyncio.create_task(work())
        await waiting(other)
        await asyncio.sleep(0.2)  # four times the setting
        assert not task.done()
    assert await task


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_sixty_days(
    session_maker: Maker, other: asyncpg.Connection, isolation_level: Any
) -> None:
    """A timeout longer than PostgreSQL's setting can hold waits, and the setting is restored."""

    async def work() -> str:
        async with (
            session_maker() as session,
            get_transaction(session, isolation_level=isolation_level),
        ):
            async with lock_tables(session, [Account, Item], timeout=timedelta(days=60)):
                return await settings_of(session)

    async with holding(other, "LOCK TABLE item"):
        task = asyncio.create_task(work())
        await waiting(other)
    assert await task == "0"


def test_the_text_is_made_once() -> None:
    """The text for the same locks is kept; other tables, order, mode or time have their own."""
    kinds = [
        (names, mode, limit)
        for names in (["a"], ["b"], ["a", "b"], ["b", "a"])
        for mode in (LockMode.SHARE, LockMode.EXCLUSIVE)
        for limit in (None, 1, 5000)
    ]
    texts = [lock_block(*kind) for kind in kinds]
    assert len(set(texts)) == len(kinds)
    for (names, mode, limit), made in zip(kinds, texts, strict=True):
        assert lock_block(list(names), mode, limit) is made
