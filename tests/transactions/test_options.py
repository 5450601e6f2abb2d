"""Section 2 of the contract: options hold for their transaction and no longer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import TransactionStateError, get_transaction, run_transaction
from tests.support import connect_args, swallow_error

Modes = tuple[str, str, str]

OPTIONS: list[dict[str, Any]] = [
    {"isolation_level": "REPEATABLE READ"},
    {"isolation_level": "SERIALIZABLE"},
    {"read_only": True},
    {"read_only": False},
    {"deferrable": True},
    {"deferrable": False},
    {"isolation_level": "SERIALIZABLE", "read_only": True, "deferrable": True},
    {"isolation_level": "REPEATABLE READ", "read_only": False, "deferrable": False},
]


async def modes(session: AsyncSession) -> Modes:
    row = await session.execute(
        text(
            "SELECT current_setting('transaction_isolation'),"
            " current_setting('transaction_read_only'),"
            " current_setting('transaction_deferrable')"
        )
    )
    return tuple(row.one())


def with_options(before: Modes, options: dict[str, Any]) -> Modes:
    """The modes of a transaction that has the options."""
    switch = {True: "on", False: "off"}
    return (
        options.get("isolation_level", before[0]).lower(),
        switch.get(options.get("read_only"), before[1]),  # type: ignore[arg-type]
        switch.get(options.get("deferrable"), before[2]),  # type: ignore[arg-type]
    )


async def by_commit(session: AsyncSession) -> None:
    """The end of the block commits."""


async def by_explicit_commit(session: AsyncSession) -> None:
    await session.commit()


async def by_rollback(session: AsyncSession) -> None:
    await session.rollback()


async def by_error(session: AsyncSession) -> None:
    raise KeyError


async def by_database_error(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1 / 0"))


async def by_swallowed_error(session: AsyncSession) -> None:
    await swallow_error(session)


ENDS = [
    by_commit,
    by_explicit_commit,
    by_rollback,
    by_error,
    by_database_error,
    by_swallowed_error,
]

DEFAULTS: Modes = ("read committed", "off", "off")
OPPOSITE_DEFAULTS: Modes = ("repeatable read", "on", "on")


@pytest.fixture(params=[DEFAULTS, OPPOSITE_DEFAULTS], ids=["defaults", "opposite defaults"])
def defaults(request: pytest.FixtureRequest) -> Modes:
    """The modes of a transaction without options: the server's, or their opposites."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def engine(database_url: str, defaults: Modes) -> AsyncIterator[AsyncEngine]:
    """An engine with one connection, which each session gets from the last one."""
    names = ("isolation", "read_only", "deferrable")
    settings = {
        f"default_transaction_{name}": value for name, value in zip(names, defaults, strict=True)
    }
    engine = create_async_engine(
        database_url,
        pool_size=1,
        max_overflow=0,
        connect_args=connect_args(**settings),
    )
    try:
        yield engine
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        await engine.dispose()


@pytest.fixture
async def bound(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection:
        yield connection


@pytest.fixture(params=["bound to a connection", "of the pool"])
def session(request: pytest.FixtureRequest, engine: AsyncEngine) -> Callable[[], AsyncSession]:
    """Makes sessions on one connection: bound to it, or of a pool that returns the last one."""
    if request.param == "of the pool":
        return async_sessionmaker(engine)
    connection: AsyncConnection = request.getfixturevalue("bound")
    return async_sessionmaker(connection)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
async def test_options_end_with_their_transaction(
    defaults: Modes,
    session: Callable[[], AsyncSession],
    options: dict[str, Any],
    end: Callable[[AsyncSession], Awaitable[None]],
) -> None:
    """Each option holds in its transaction, and the next one of the same session and connection
    has none of it, however the first one ended."""
    async with session() as one:
        for _ in range(2):
            try:
                async with get_transaction(one, **options):
                    assert await modes(one) == with_options(defaults, options)
                    await end(one)
                    if end in (by_explicit_commit, by_rollback):
                        assert await modes(one) == defaults
            except (KeyError, DBAPIError, RuntimeError):
                assert end in (by_error, by_database_error, by_swallowed_error)
            async with get_transaction(one):
                assert await modes(one) == defaults
            assert await modes(one) == defaults
            await one.rollback()
    async with session() as another:
        assert await modes(another) == defaults


async def test_options_of_run_transaction_end(
    defaults: Modes, session: Callable[[], AsyncSession]
) -> None:
    """The options of run_transaction end with it, on a bound connection too."""
    options: dict[str, Any] = {"isolation_level": "SERIALIZABLE", "read_only": True}
    assert await run_transaction(session, modes, **options) == with_options(defaults, options)
    assert await run_transaction(session, modes) == defaults


@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only", "control_fully"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
async def test_options_in_a_joined_session(
    engine: AsyncEngine, options: dict[str, Any], mode: Any
) -> None:
    """In a session that is joined to the transaction of its connection an option is refused before
    any SQL, because the caller's transaction would have it."""
    async with engine.connect() as connection, connection.begin():
        await connection.execute(text("SELECT 1"))
        sent: list[str] = []
        event.listen(
            engine.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2])
        )
        async with AsyncSession(connection, join_transaction_mode=mode) as session:
            with pytest.raises(TransactionStateError, match=next(iter(options))):
                async with get_transaction(session, **options):
                    raise AssertionError("the block has begun")
        assert sent == []


async def test_a_joined_session_may_be_durable(engine: AsyncEngine) -> None:
    """`durable` does not refuse a joined session: for the code under test it is the outermost."""
    async with engine.connect() as connection, connection.begin():
        await connection.execute(text("SELECT 1"))
        session = AsyncSession(connection, join_transaction_mode="create_savepoint")
        async with session, get_transaction(session, durable=True):
            await session.execute(text("SELECT 1"))
