"""Errors of a flush, and what the ORM shows of an aborted transaction."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import make_transient_to_detached
from sqlalchemy.orm.exc import StaleDataError

from pgtoolset import TransactionAbortedError, create_db_context, get_transaction
from pgtoolset._postgres.connections import terminate_driver
from pgtoolset.testing.contracts import MappedRows
from tests.support import Item, raw_of


@pytest.fixture
def rows(session_maker: async_sessionmaker[AsyncSession]) -> MappedRows:
    return MappedRows(session_maker, Item, value="name")


async def test_a_failed_flush(rows: MappedRows) -> None:
    """A key that exists is an `IntegrityError`; swallowed, its level raises and is undone, and the
    level around it goes on."""
    await rows.insert(1)
    async with rows.session() as session:
        async with get_transaction(session):
            await rows.write(session, 2)
            with pytest.raises(TransactionAbortedError):
                async with get_transaction(session):
                    with pytest.raises(DBAPIError) as caught:
                        await rows.write(session, 1)
                    assert getattr(caught.value.orig, "sqlstate", None) == "23505"
                    with pytest.raises(InvalidRequestError):
                        await session.get(Item, 99)
            await rows.write(session, 3)
    assert await rows.stored() == {1, 2, 3}


async def test_get_in_an_aborted_transaction(rows: MappedRows) -> None:
    """After an error of the database, `get` is refused until the level is rolled back."""
    async with rows.session() as session:
        async with get_transaction(session):
            await rows.write(session, 1)
            with pytest.raises(DBAPIError) as caught:
                async with get_transaction(session):
                    await rows.write(session, 2)
                    with pytest.raises(DBAPIError):
                        await rows.fail(session, "22012")
                    await session.get(Item, 99)
            assert getattr(caught.value.orig, "sqlstate", None) == "25P02"
            await rows.write(session, 3)
    assert await rows.stored() == {1, 3}


# What the error says of the work: it must be true of the error that was swallowed


async def no_connection(session: AsyncSession) -> None:
    """The pool is exhausted."""
    session.add(Item(id=1))
    await session.flush()


async def refused_by_postgresql(session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO item (id, name) VALUES (1, '')"))
    session.add(Item(id=1))
    await session.flush()


async def refused_by_sqlalchemy(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    gone = Item(id=1)
    make_transient_to_detached(gone)
    session.add(gone)
    gone.name = "no such row"
    await session.flush()


async def refused_by_the_driver(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    session.add(Item(id=1, name=object()))
    await session.flush()


async def lost_connection(session: AsyncSession) -> None:
    terminate_driver(await raw_of(session))
    session.add(Item(id=1))
    await session.flush()


@pytest.mark.parametrize(
    ("fail", "error", "says"),
    [
        (no_connection, PoolTimeout, "nothing of it had reached PostgreSQL"),
        (refused_by_postgresql, DBAPIError, "PostgreSQL has discarded all its work"),
        (refused_by_sqlalchemy, StaleDataError, "SQLAlchemy has rolled it back"),
        (refused_by_the_driver, DBAPIError, "SQLAlchemy has rolled it back"),
        (lost_connection, DBAPIError, "its connection is lost"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
async def test_message_is_true(
    database_url: str, fail: Any, error: type[Exception], says: str
) -> None:
    """The message says what became of the work: discarded by PostgreSQL, rolled back, lost with the
    connection, or never begun."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    maker = async_sessionmaker(engine)
    async with AsyncExitStack() as stack:
        if fail is no_connection:
            await stack.enter_async_context(engine.connect())
        with pytest.raises(TransactionAbortedError) as caught:
            async with create_db_context(maker)() as session:
                with pytest.raises(error) as swallowed:
                    await fail(session)
        assert caught.value.__cause__ is swallowed.value
        told = [each for each in SAYINGS if each in str(caught.value)]
        assert told == [says]
    await engine.dispose()


SAYINGS = [
    "nothing of it had reached PostgreSQL",
    "PostgreSQL has discarded all its work",
    "SQLAlchemy has rolled it back",
    "its connection is lost",
]
