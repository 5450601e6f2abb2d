"""The contract classes on the doubles: no database, no server."""

from __future__ import annotations

import pytest

from pgtoolset.testing import MemoryAssociations, MemoryDatabase, MemoryLocks, MemoryWatcher
from pgtoolset.testing.contracts import (
    AbortedTransactionContract,
    AdvisoryLockerContract,
    AssociationWriterContract,
    ChangeWaiterContract,
    LockObserverContract,
    MemoryLinks,
    MemoryRows,
    RowLockerContract,
    SessionFactoryContract,
    TableLockerContract,
    TransactionalSessionContract,
    WatcherContract,
)
from tests.support import Item
from tests.testing.linked import MEMORY_SHAPES, memory_linked


class OnDoubles:
    """The fixtures of every contract."""

    @pytest.fixture
    def database(self) -> MemoryDatabase:
        return MemoryDatabase()

    @pytest.fixture
    def harness(self, database: MemoryDatabase) -> MemoryRows:
        return MemoryRows(database, Item, value="name")

    @pytest.fixture
    def locks(self) -> MemoryLocks:
        return MemoryLocks()

    @pytest.fixture
    def observer(self) -> MemoryLocks:
        return MemoryLocks()


class TestTransactionalSession(OnDoubles, TransactionalSessionContract):
    pass


class TestSessionFactory(OnDoubles, SessionFactoryContract):
    pass


class TestAbortedTransaction(OnDoubles, AbortedTransactionContract):
    pass


class TestTableLocker(OnDoubles, TableLockerContract):
    pass


class TestAdvisoryLocker(OnDoubles, AdvisoryLockerContract):
    pass


class TestRowLocker(OnDoubles, RowLockerContract):
    pass


class TestLockObserver(OnDoubles, LockObserverContract):
    pass


class TestAssociationWriter(OnDoubles, AssociationWriterContract):
    @pytest.fixture
    def associations(self) -> MemoryAssociations:
        return MemoryAssociations()

    @pytest.fixture(params=MEMORY_SHAPES)
    def links(self, database: MemoryDatabase, request: pytest.FixtureRequest) -> MemoryLinks:
        return memory_linked(database, request.param)


class TestChangeWaiter(OnDoubles, ChangeWaiterContract):
    @pytest.fixture
    def waiter(self, database: MemoryDatabase) -> MemoryWatcher:
        return MemoryWatcher(database)


class TestWatcher(OnDoubles, WatcherContract):
    @pytest.fixture
    def watcher(self, database: MemoryDatabase) -> MemoryWatcher:
        return MemoryWatcher(database)
