"""Section 2 of the contract: `get_transaction`."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session

from pgtoolset import (
    TransactionAbortedError,
    TransactionStateError,
    create_db_context,
    get_transaction,
    on_commit,
)
from pgtoolset.testing import MemoryDatabase
from tests.support import DRIVER, DRIVER_ERROR, Account, Item, Part, insert, stored, swallow_error
from tests.transactions.plain_session import PlainSession

Maker = async_sessionmaker[AsyncSession]

OPTIONS = (
    "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'), \
current_setting('transaction_deferrable')"
)


async def options_of(session: AsyncSession) -> tuple[str, str, str]:
    return tuple((await session.execute(text(OPTIONS))).one())


async def test_outermost_commits(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Outermost: a transaction, committed at the end of the block."""
    async with session_maker() as session:
        async with get_transaction(session=session) as same:
            assert same is session
            await insert(session, 1)
            assert await stored(other) == set()
        assert await stored(other) == {1}
        assert not session.in_transaction()


async def test_outermost_rolls_back(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Outermost: an exception rolls back and propagates unchanged."""
    error = KeyError("k")
    async with session_maker() as session:
        with pytest.raises(KeyError) as caught:
            async with get_transaction(session):
                await insert(session, 1)
                raise error
        assert caught.value is error
        assert not session.in_transaction()
        async with get_transaction(session):
            await insert(session, 2)
    assert await stored(other) == {2}


async def test_nested_is_a_savepoint(session_maker: Maker, other: asyncpg.Connection) -> None:
    """Nested: an exception undoes exactly its own level."""
    async with session_maker() as session, get_transaction(session):
        await insert(session, 1)
        with pytest.raises(KeyError):
            async with get_transaction(session):
                await insert(session, 2)
                async with get_transaction(session):
                    await insert(session, 3)
                raise KeyError
        async with get_transaction(session):
            await insert(session, 4)
    assert await stored(other) == {1, 4}


async def test_nested_in_a_transaction_of_others(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """After `begin()` or autobegin a block is a savepoint."""
    async with session_maker() as session:
        async with session.begin():
            await insert(session, 1)
            with pytest.raises(KeyError):
                async with get_transaction(session):
                    await insert(session, 2)
                    raise KeyError
        await insert(session, 3)
        async with get_transaction(session):
            await insert(session, 4)
        assert await stored(other) == {1}
        await session.commit()
    assert await stored(other) == {1, 3, 4}


async def test_nested_database_error(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A statement that fails in a nested block costs that block alone."""
    async with session_maker() as session, get_transaction(session):
        session.add(Item(id=1))
        await session.flush()
        with pytest.raises(IntegrityError):
            async with get_transaction(session):
                await insert(session, 2)
                await insert(session, 1)
        await insert(session, 3)
    assert await stored(other) == {1, 3}


async def test_instances_follow_the_savepoint(session_maker: Maker) -> None:
    """Instances changed in a rolled-back level show the outer level's values again."""
    async with session_maker() as session, get_transaction(session):
        account = Account(id=1, balance=10)
        session.add(account)
        with pytest.raises(KeyError):
            async with get_transaction(session):
                account.balance = 0
                await session.flush()
                raise KeyError
        await session.refresh(account)
        assert account.balance == 10


async def test_works_with_async_scoped_session(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """The session of an `async_scoped_session` is held to the same guarantees."""
    scoped = async_scoped_session(session_maker, scopefunc=lambda: 1)
    async with get_transaction(scoped()):
        await insert(scoped(), 1)
    with pytest.raises(TransactionAbortedError):
        async with get_transaction(scoped()):
            await insert(scoped(), 2)
            await swallow_error(scoped())
    await scoped.remove()
    assert await stored(other) == {1}


async def test_works_with_a_double() -> None:
    """It works with the double as with the database."""
    database = MemoryDatabase()
    async with create_db_context(database.session)() as session:
        await session.put(Item, 1)
        with pytest.raises(KeyError):
            async with get_transaction(session):
                await session.put(Item, 2)
                raise KeyError
        async with get_transaction(session):
            await session.put(Item, 3)
    assert [row["id"] for row in database.rows(Item)] == [1, 3]
    assert session.log == [
        "BEGIN",
        "PUT Item 1",
        "SAVEPOINT",
        "PUT Item 2",
        "ROLLBACK TO",
        "SAVEPOINT",
        "PUT Item 3",
        "RELEASE",
        "COMMIT",
        "CLOSE",
    ]


async def test_outermost_is_honest(session_maker: Maker, other: asyncpg.Connection) -> None:
    """The outermost block never reports success for work that PostgreSQL threw away."""
    async with session_maker() as session:
        with pytest.raises(TransactionAbortedError) as caught:
            async with get_transaction(session):
                await insert(session, 1)
                swallowed = await swallow_error(session)
        assert caught.value.__cause__ is swallowed
        with pytest.raises(TransactionAbortedError):
            async with get_transaction(session):
                swallowed = await swallow_error(session)
                await session.commit()
        async with get_transaction(session):
            await insert(session, 2)
    assert await stored(other) == {2}


@pytest.mark.parametrize("how", ["statement", "flush", "driver"])
async def test_nested_is_honest(session_maker: Maker, other: asyncpg.Connection, how: str) -> None:
    """A nested block that swallowed an error raises too, and costs its own level alone."""
    async with session_maker() as session, get_transaction(session):
        await insert(session, 1)
        with pytest.raises(TransactionAbortedError) as caught:
            async with get_transaction(session):
                await insert(session, 2)
                try:
                    if how == "statement":
                        await session.execute(text("SELECT 1 / 0"))
                    elif how == "flush":
                        session.add(Item(id=1))
                        await session.flush()
                    else:
                        raw = await (await session.connection()).get_raw_connection()
                        await raw.driver_connection.execute("SELECT 1 / 0")  # type: ignore[union-attr]
                except (DBAPIError, DRIVER_ERROR) as error:
                    swallowed = error
        if how != "driver":
            assert caught.value.__cause__ is swallowed
        await insert(session, 3)
    assert await stored(other) == {1, 3}


async def test_session_without_transaction_is_left_as_it_was(session_maker: Maker) -> None:
    """After the outermost block the session is a plain SQLAlchemy session again."""
    async with session_maker() as session:
        async with get_transaction(session):
            pass
        await swallow_error(session)
        await (
            session.commit()
        )  # SQLAlchemy's own silence, which is not ours to change outside our blocks


async def test_explicit_rollback_inside(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A block that rolled back by itself goes on in a new transaction, which its end commits."""
    async with session_maker() as session:
        async with get_transaction(session):
            await insert(session, 1)
            await session.rollback()
            await insert(session, 2)
    assert await stored(other) == {2}


async def test_explicit_commit_in_nested(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A commit inside a nested block commits all levels, and the blocks end without an error."""
    async with session_maker() as session:
        async with get_transaction(session):
            await insert(session, 1)
            async with get_transaction(session):
                await insert(session, 2)
                await session.commit()
            await insert(session, 3)
    assert await stored(other) == {1, 2, 3}


async def test_commit_error_is_unchanged(session_maker: Maker, other: asyncpg.Connection) -> None:
    """An error of the COMMIT itself propagates as it is, and leaves a session that can be used."""
    async with session_maker() as session:
        with pytest.raises(IntegrityError):
            async with get_transaction(session):
                session.add(Part(id=1, item_id=99))
        async with get_transaction(session):
            assert (await session.scalars(select(Part))).all() == []


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_isolation_level(session_maker: Maker, level: Any) -> None:
    """`isolation_level` holds for this transaction and no longer."""
    async with session_maker() as session:
        async with get_transaction(session, isolation_level=level):
            assert await options_of(session) == (level.lower(), "off", "off")
        async with get_transaction(session):
            assert await options_of(session) == ("read committed", "off", "off")


async def test_read_only_and_deferrable(session_maker: Maker, engine: AsyncEngine) -> None:
    """`read_only` and `deferrable` hold for this transaction alone."""
    async with session_maker() as session:
        async with get_transaction(
            session, isolation_level="SERIALIZABLE", read_only=True, deferrable=True
        ):
            assert await options_of(session) == ("serializable", "on", "on")
        with pytest.raises(DBAPIError, match="read-only"):
            async with get_transaction(session, read_only=True):
                await insert(session, 1)
        async with get_transaction(session):
            assert await options_of(session) == ("read committed", "off", "off")


async def test_read_write_against_the_default(session_maker: Maker, engine: AsyncEngine) -> None:
    """`False` is not `None`: it overrides a default of the server that says otherwise."""

    @event.listens_for(engine.sync_engine, "connect")
    def against_the_grain(connection: Any, _: object) -> None:
        async def set_defaults(driver: Any) -> None:
            await driver.execute("SET default_transaction_read_only = on")
            await driver.execute("SET default_transaction_deferrable = on")
            if DRIVER == "psycopg":
                await driver.commit()  # its first statement has begun a transaction

        connection.run_async(set_defaults)

    async with session_maker() as session:
        async with get_transaction(session):
            assert await options_of(session) == ("read committed", "on", "on")
        async with get_transaction(session, read_only=False, deferrable=False):
            assert await options_of(session) == ("read committed", "off", "off")
    event.remove(engine.sync_engine, "connect", against_the_grain)
    await engine.dispose()


async def test_durable(session_maker: Maker, other: asyncpg.Connection) -> None:
    """`durable=True` outermost is a transaction like any other."""
    async with session_maker() as session, get_transaction(session, durable=True):
        await insert(session, 1)
    assert await stored(other) == {1}


@pytest.mark.parametrize(
    "options",
    [
        {"durable": True},
        {"isolation_level": "SERIALIZABLE"},
        {"read_only": True},
        {"read_only": False},
        {"deferrable": True},
    ],
)
async def test_options_nested(
    session_maker: Maker, options: Any, other: asyncpg.Connection
) -> None:
    """An option of the outermost transaction is refused while nested, before any SQL."""
    sent: list[str] = []
    async with session_maker() as session, get_transaction(session):
        await insert(session, 1)
        event.listen(
            session.bind.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2])
        )
        with pytest.raises(TransactionStateError, match=next(iter(options))):
            async with get_transaction(session, **options):
                raise AssertionError("must not be reached")
        assert sent == []
    assert await stored(other) == {1}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"isolation_level": "SNAPSHOT"}, ValueError),
        ({"isolation_level": "serializable"}, ValueError),
        ({"isolation_level": "AUTOCOMMIT"}, ValueError),
        ({"isolation_level": 3}, TypeError),
        ({"isolation_level": []}, TypeError),
        ({"isolation_level": "postgresql://u:secret@host/db"}, ValueError),
        ({"durable": 1}, TypeError),
        ({"durable": 0}, TypeError),
        ({"durable": None}, TypeError),
        ({"durable": "yes"}, TypeError),
        ({"read_only": "no"}, TypeError),
        ({"deferrable": 0}, TypeError),
    ],
)
async def test_bad_option(
    session_maker: Maker, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """A bad option is refused at the call, by the name of the argument, and no URL is shown."""
    async with session_maker() as session:
        with pytest.raises(error, match=f"^{next(iter(arguments))} must be") as caught:
            get_transaction(session, **arguments)
        assert "secret" not in str(caught.value)
        assert not session.in_transaction()


@pytest.mark.parametrize(
    "session", [None, "postgresql://u:secret@host/db", object(), Session(), async_sessionmaker()]
)
@pytest.mark.parametrize("function", [get_transaction, lambda session: on_commit(session, print)])
def test_bad_session(function: Any, session: Any) -> None:
    """A session that is not one, or not an async one, is refused at the call."""
    with pytest.raises(TypeError, match=r"^session must be") as caught:
        function(session)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("function", [get_transaction, lambda session: on_commit(session, print)])
def test_async_scoped_session(function: Any) -> None:
    """For an `async_scoped_session` the error says to pass the session that a call of it gives."""
    scoped: Any = async_scoped_session(async_sessionmaker(), scopefunc=lambda: 1)
    with pytest.raises(TypeError, match=r"^session must be .*: scoped\(\)$"):
        function(scoped)


async def test_options_need_sqlalchemy() -> None:
    """A session of another kind takes no isolation level: a TypeError, and no transaction."""
    session = PlainSession(set())
    with pytest.raises(TypeError, match="isolation_level"):
        async with get_transaction(session, isolation_level="SERIALIZABLE"):
            raise AssertionError("must not be reached")
    assert not session.in_transaction()


async def test_concurrent_sessions_are_independent(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Blocks of different sessions in one process know nothing of each other."""

    async def work(n: int) -> None:
        async with session_maker() as session, get_transaction(session):
            await insert(session, n)
            if n % 2:
                raise KeyError(n)

    results = await asyncio.gather(*(work(n) for n in range(20)), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), KeyError] * 10
    assert await stored(other) == set(range(0, 20, 2))


async def test_session_joined_to_a_connection(
    engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """In a session joined to an outer transaction a commit releases a savepoint."""
    async with engine.connect() as connection:
        outer = await connection.begin()
        maker = async_sessionmaker(connection, join_transaction_mode="create_savepoint")
        async with create_db_context(maker)() as session:
            await insert(session, 1)
        with pytest.raises(TransactionAbortedError):
            async with create_db_context(maker)() as session:
                await insert(session, 2)
                await swallow_error(session)
        assert (await connection.execute(select(Item.id))).scalars().all() == [1]
        await outer.rollback()
    assert await stored(other) == set()
