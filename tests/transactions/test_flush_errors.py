"""Errors of a flush, and what the ORM shows of an aborted transaction."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import TransactionAbortedError, get_transaction
from pgtoolset.testing.contracts import MappedRows
from tests.support import Item


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
