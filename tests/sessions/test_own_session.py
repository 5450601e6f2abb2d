"""Section 1 of the contract, "its own session": what a unit of work refuses to begin with."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import SAWarning, SQLAlchemyError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from pgtoolset import (
    TransactionStateError,
    create_db_context,
    create_db_dependency,
    get_transaction,
    on_commit,
    run_transaction,
)
from pgtoolset.errors import PgToolsetError
from pgtoolset.testing.doubles import MemoryDatabase
from tests.support import Item, insert, stored

Maker = async_sessionmaker[AsyncSession]
Work = Callable[[Any], Awaitable[None]]


async def by_context(session_maker: Any, work: Work) -> None:
    async with create_db_context(session_maker)() as session:
        await work(session)


async def by_dependency(session_maker: Any, work: Work) -> None:
    async with asynccontextmanager(create_db_dependency(session_maker))() as session:
        await work(session)


async def by_run_transaction(session_maker: Any, work: Work) -> None:
    await run_transaction(session_maker, work)


units = pytest.mark.parametrize("unit", [by_context, by_dependency, by_run_transaction])


async def never(session: object) -> None:
    raise AssertionError("the unit has begun")


def scoped(session_maker: Maker) -> Any:
    return async_scoped_session(session_maker, scopefunc=asyncio.current_task)


@units
@pytest.mark.parametrize("factory", ["scoped", "calls a scoped session", "always the same"])
async def test_a_session_in_a_transaction(
    session_maker: Maker, other: asyncpg.Connection, unit: Any, factory: str
) -> None:
    """A factory that gives a session in a transaction is refused, and the session not touched."""
    registry = scoped(session_maker)
    session = registry()
    makers = {
        "scoped": registry,
        "calls a scoped session": lambda: registry(),
        "always the same": lambda: session,
    }
    await insert(session, 1)
    session.add(Item(id=2))
    called: list[int] = []
    on_commit(session, lambda: called.append(1))
    with pytest.raises(TransactionStateError, match="session_maker"):
        await unit(makers[factory], never)
    assert session.in_transaction()
    assert [item.id for item in session.new] == [2]
    assert await stored(other) == set()
    await session.commit()
    assert await stored(other) == {1, 2}
    assert called == [1]
    await session.close()


@units
@pytest.mark.parametrize("outer", [by_context, by_dependency, by_run_transaction])
@pytest.mark.parametrize("committed", [False, True])
async def test_a_unit_inside_a_unit(
    session_maker: Maker, other: asyncpg.Connection, outer: Any, unit: Any, committed: bool
) -> None:
    """A unit inside another one with the same session is refused, between two transactions of the
    outer one too, and what the outer one writes is stored as if nothing had happened."""
    registry = scoped(session_maker)

    async def work(session: AsyncSession) -> None:
        await insert(session, 1)
        if committed:
            await session.commit()
        with pytest.raises(TransactionStateError):
            await unit(registry, never)
        await insert(session, 2)
        assert await stored(other) == ({1} if committed else set())

    await outer(registry, work)
    assert await stored(other) == {1, 2}


@units
async def test_a_scoped_session_in_no_transaction(
    session_maker: Maker, other: asyncpg.Connection, unit: Any
) -> None:
    """A scoped session that is in no transaction serves one unit after the other."""
    registry = scoped(session_maker)
    await unit(registry, lambda session: insert(session, 1))
    await unit(registry, lambda session: insert(session, 2))
    assert await stored(other) == {1, 2}


@units
async def test_a_session_of_another_kind(unit: Any) -> None:
    """A session that is not SQLAlchemy's is refused in a transaction as well."""
    session = MemoryDatabase().session()
    await session.begin()
    with pytest.raises(TransactionStateError):
        await unit(lambda: session, never)
    assert session.in_transaction()
    await session.rollback()


async def test_a_context_that_is_open(session_maker: Maker, other: asyncpg.Connection) -> None:
    """One block cannot be entered twice at a time; afterwards it can be entered again."""
    block = create_db_context(session_maker)()
    async with block as session:
        await insert(session, 1)
        with pytest.raises(TransactionStateError):
            await block.__aenter__()
    async with block as session:
        await insert(session, 2)
    assert await stored(other) == {1, 2}


# AUTOCOMMIT


def of_the_dialect(url: str) -> AsyncEngine:
    return create_async_engine(url, isolation_level="AUTOCOMMIT")


def of_the_engine(url: str) -> AsyncEngine:
    return create_async_engine(url, execution_options={"isolation_level": "AUTOCOMMIT"})


def of_an_engine_over_it(url: str) -> AsyncEngine:
    return create_async_engine(url).execution_options(isolation_level="AUTOCOMMIT")


def of_an_engine_over_a_level(url: str) -> AsyncEngine:
    engine = create_async_engine(url, isolation_level="SERIALIZABLE")
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def by_listener(url: str) -> AsyncEngine:
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, record: object) -> None:
        connection.autocommit = True

    return engine


#: Where AUTOCOMMIT is known without a connection.
EARLY = [of_the_dialect, of_the_engine, of_an_engine_over_it, of_an_engine_over_a_level]


async def by_transaction(session_maker: Any, work: Work) -> None:
    async with session_maker() as session, get_transaction(session):
        await work(session)


async def by_options(session_maker: Any, work: Work) -> None:
    async with session_maker() as session, get_transaction(session, durable=True):
        await work(session)


async def by_savepoint(session_maker: Any, work: Work) -> None:
    async with session_maker() as session:
        await session.begin()
        async with get_transaction(session):
            await work(session)


every = pytest.mark.parametrize(
    "block",
    [by_context, by_dependency, by_run_transaction, by_transaction, by_options, by_savepoint],
)


@asynccontextmanager
async def engine_of(make: Callable[[str], AsyncEngine], url: str) -> AsyncIterator[AsyncEngine]:
    engine = make(url)
    try:
        yield engine
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        await engine.dispose()


@every
@pytest.mark.parametrize("make", EARLY)
async def test_an_autocommit_engine(database_url: str, make: Any, block: Any) -> None:
    """An AUTOCOMMIT engine is refused before anything connects, however it was made."""
    async with engine_of(make, database_url) as engine:
        connected: list[object] = []
        event.listen(engine.sync_engine, "do_connect", lambda *_: connected.append(1))
        with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
            await block(async_sessionmaker(engine), never)
        assert connected == []


@pytest.mark.parametrize("block", [by_context, by_dependency, by_run_transaction, by_transaction])
@pytest.mark.parametrize("make", [*EARLY, by_listener])
@pytest.mark.parametrize("how", ["routed", "swallowed"])
async def test_autocommit_of_a_connection(
    database_url: str, other: asyncpg.Connection, make: Any, block: Any, how: str
) -> None:
    """AUTOCOMMIT that only a connection shows is refused before the first statement, and none is
    sent although the block swallows that."""

    async def work(session: AsyncSession) -> None:
        for id_ in (1, 2):
            with pytest.raises(Exception) as caught:
                await insert(session, id_)
            if id_ == 1:
                assert isinstance(caught.value, TransactionStateError)
                if how == "routed":
                    raise caught.value

    async with engine_of(make, database_url) as engine:
        maker = async_sessionmaker(binds={Item: engine})
        maker.configure(sync_session_class=routing_to(engine))
        with warnings.catch_warnings(record=True, action="always", category=SAWarning) as warned:
            if how == "routed":
                with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
                    await block(maker, work)
            else:
                with suppress(PgToolsetError, SQLAlchemyError):
                    await block(maker, work)
    assert [str(each.message) for each in warned] == []
    assert await stored(other) == set()


def routing_to(engine: AsyncEngine) -> Any:
    """A session class that finds its engine for each statement."""

    class Routed(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return engine.sync_engine

    return Routed


@every
async def test_autocommit_of_a_bound_connection(
    database_url: str, other: asyncpg.Connection, block: Any
) -> None:
    """A session on a connection in AUTOCOMMIT is refused, and keeps the connection."""
    async with engine_of(create_async_engine, database_url) as engine, engine.connect() as bound:
        await bound.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
            await block(async_sessionmaker(bound), never)
        assert await bound.scalar(text("SELECT 1")) == 1


async def test_autocommit_inside_a_unit(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A unit cannot put its own connection into AUTOCOMMIT."""
    with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
        async with create_db_context(session_maker)() as session:
            await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})


@every
async def test_an_engine_over_an_autocommit_engine(
    database_url: str, other: asyncpg.Connection, block: Any
) -> None:
    """An engine that gives an AUTOCOMMIT engine a level is as good as another."""

    def make(url: str) -> AsyncEngine:
        return of_the_dialect(url).execution_options(isolation_level="READ COMMITTED")

    async def fail(session: AsyncSession) -> None:
        await insert(session, 1)
        raise KeyError

    async with engine_of(make, database_url) as engine:
        with pytest.raises(KeyError):
            await block(async_sessionmaker(engine), fail)
    assert await stored(other) == set()
