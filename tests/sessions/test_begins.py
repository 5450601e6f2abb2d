"""Section 1 of the contract, "one unit": the transaction is begun already, and `session.begin()`
says so."""

from __future__ import annotations

import gc
import pickle
import weakref
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import (
    TransactionStateError,
    create_db_context,
    create_db_dependency,
    get_transaction,
)
from tests.support import insert, stored

Maker = async_sessionmaker[AsyncSession]


@pytest.fixture(params=["db_context", "get_db"])
def unit(request: pytest.FixtureRequest, session_maker: Maker) -> Any:
    if request.param == "db_context":
        return create_db_context(session_maker)
    return asynccontextmanager(create_db_dependency(session_maker))


async def test_begin_in_a_unit(unit: Any, other: asyncpg.Connection) -> None:
    """`session.begin()` in a unit names get_transaction, and the unit goes on."""
    async with unit() as session:
        await insert(session, 1)
        with pytest.raises(TransactionStateError, match=r"get_transaction\(session\)"):
            async with session.begin():
                raise AssertionError("the block has not been entered")
        with pytest.raises(TransactionStateError):
            await session.begin()
        with pytest.raises(TransactionStateError):
            await session.run_sync(lambda sync: sync.begin())
        await insert(session, 2)
    assert await stored(other) == {1, 2}


async def test_begin_is_caught_as_before(unit: Any) -> None:
    """What catches SQLAlchemy's own error catches ours, which survives a pickle."""
    async with unit() as session:
        with pytest.raises(InvalidRequestError) as caught:
            await session.begin()
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (type(caught.value), str(caught.value))
    assert "get_transaction" in str(again)


async def test_savepoints_go_on_working(unit: Any, other: asyncpg.Connection) -> None:
    """`begin_nested()` and `get_transaction` give savepoints, as without us."""
    async with unit() as session:
        async with session.begin_nested():
            await insert(session, 1)
        nested = await session.begin_nested()
        await insert(session, 2)
        await nested.rollback()
        async with get_transaction(session):
            await insert(session, 3)
            with pytest.raises(TransactionStateError):
                await session.begin()
        await session.run_sync(lambda sync: sync.begin(nested=True).commit())
    assert await stored(other) == {1, 3}


async def test_begin_after_an_explicit_end(unit: Any, other: asyncpg.Connection) -> None:
    """After a `commit()` or `rollback()` in the unit, `begin()` begins the next transaction."""
    async with unit() as session:
        await insert(session, 1)
        await session.commit()
        async with session.begin():
            await insert(session, 2)
        await session.begin()
        await insert(session, 3)
    assert await stored(other) == {1, 2, 3}


async def test_begin_of_other_sessions(session_maker: Maker, unit: Any) -> None:
    """A session that no unit has made has SQLAlchemy's own `begin()`, and so has one whose unit has
    ended."""
    async with unit() as ended:
        pass
    async with session_maker() as session:
        for each in (session, ended):
            async with each.begin():
                with pytest.raises(InvalidRequestError) as caught:
                    await each.begin()
                assert not isinstance(caught.value, TransactionStateError)


async def test_forgotten_session_is_collected(session_maker: Maker) -> None:
    """released: the method that explains keeps no session alive."""

    async def forget() -> weakref.ref[Any]:
        generator = create_db_dependency(session_maker)()
        session = await anext(generator)
        gone = weakref.ref(session.sync_session)
        await generator.aclose()
        return gone

    gone = await forget()
    gc.collect()
    assert gone() is None
