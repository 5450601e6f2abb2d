"""The contract classes on PostgreSQL: the doubles are held to the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

import pgtoolset
from pgtoolset.testing.contracts import (
    AbortedTransactionContract,
    AdvisoryLockerContract,
    AssociationWriterContract,
    ChangeWaiterContract,
    LinkedRows,
    LockObserverContract,
    MappedRows,
    RowLockerContract,
    SessionFactoryContract,
    TableLockerContract,
    TransactionalSessionContract,
    WatcherContract,
)
from tests.m2m import models as m2m_models
from tests.support import Account, Item
from tests.testing.linked import SHAPES, linked


class OnPostgreSQL:
    """The fixtures of every contract."""

    @pytest.fixture
    def harness(self, session_maker: async_sessionmaker[AsyncSession]) -> MappedRows:
        return MappedRows(session_maker, Item, value="name")

    @pytest.fixture
    def locks(self) -> Any:
        return pgtoolset

    @pytest.fixture
    def observer(self) -> Any:
        return pgtoolset


class TestTransactionalSession(OnPostgreSQL, TransactionalSessionContract):
    pass


class TestSessionFactory(OnPostgreSQL, SessionFactoryContract):
    pass


class TestAbortedTransaction(OnPostgreSQL, AbortedTransactionContract):
    pass


class TestTableLocker(OnPostgreSQL, TableLockerContract):
    pass


class TestAdvisoryLocker(OnPostgreSQL, AdvisoryLockerContract):
    pass


class TestRowLocker(OnPostgreSQL, RowLockerContract):
    pass


class TestLockObserver(OnPostgreSQL, LockObserverContract):
    pass


class OnAnInteger(OnPostgreSQL):
    """With attributes in place of names, and a column that holds no text."""

    @pytest.fixture
    def harness(self, session_maker: async_sessionmaker[AsyncSession]) -> MappedRows:
        return MappedRows(session_maker, Account, key=Account.id, value=Account.balance)


class TestRowLockerOnAnInteger(OnAnInteger, RowLockerContract):
    pass


class TestChangeWaiterOnAnInteger(OnAnInteger, ChangeWaiterContract):
    @pytest.fixture
    def waiter(self) -> Any:
        return pgtoolset


class TestAssociationWriter(OnPostgreSQL, AssociationWriterContract):
    @pytest.fixture
    def associations(self) -> Any:
        return pgtoolset

    @pytest.fixture(params=SHAPES)
    async def links(
        self,
        engine: AsyncEngine,
        session_maker: async_sessionmaker[AsyncSession],
        request: pytest.FixtureRequest,
    ) -> AsyncIterator[LinkedRows]:
        await m2m_models.create(engine)
        await m2m_models.empty(engine)
        yield linked(session_maker, request.param)
        await m2m_models.empty(engine)


class TestChangeWaiter(OnPostgreSQL, ChangeWaiterContract):
    @pytest.fixture
    def waiter(self) -> Any:
        return pgtoolset


@pytest.mark.asyncpg(reason="RowWatcher")
class TestWatcher(OnPostgreSQL, WatcherContract):
    @pytest.fixture
    def watcher(self, engine: AsyncEngine) -> pgtoolset.RowWatcher:
        return pgtoolset.RowWatcher(engine, interval=0.02)
