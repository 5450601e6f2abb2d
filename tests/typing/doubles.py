"""Checked by mypy and pyright, never run: the doubles satisfy the protocols, and contract classes take a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped

from pgtoolset import create_db_context, get_transaction, run_transaction
from pgtoolset.protocols import (
    AdvisoryLocker,
    AssociationWriter,
    ChangeWaiter,
    LockObserver,
    ManagedSession,
    RowLocker,
    SessionFactory,
    TableLocker,
    TransactionalSession,
    Watcher,
)
from pgtoolset.testing import ManualClock, MemoryAssociations, MemoryDatabase, MemoryLocks, MemorySession, MemoryWatcher
from pgtoolset.testing.contracts import MappedRows, TransactionHarness
from pgtoolset.testing.doubles import Clock, Event, LoopClock


class Base(DeclarativeBase):
    pass


class Item(Base):
    id: Mapped[int]


database = MemoryDatabase(clock=ManualClock())
factory: SessionFactory[MemorySession] = database.session
session: AsyncSession = database.session()
transactional: TransactionalSession = database.session()
managed: ManagedSession = database.session()

table_locker: TableLocker = MemoryLocks()
advisory_locker: AdvisoryLocker = MemoryLocks()
row_locker: RowLocker = MemoryLocks()
observer: LockObserver = MemoryLocks()
writer: AssociationWriter = MemoryAssociations()
watcher: Watcher = MemoryWatcher(database)
waiter: ChangeWaiter = MemoryWatcher(database)

clocks: list[Clock] = [ManualClock(), LoopClock()]
mapped: TransactionHarness = MappedRows(database.session, Item)


class OwnHarness:
    """For the contracts of sessions, of whatever kind."""

    def session(self) -> object:
        return object()

    async def write(self, session: Any, number: int) -> None: ...

    async def stored(self) -> set[int]:
        return set()


own: TransactionHarness = OwnHarness()


async def use() -> None:
    async with create_db_context(database.session)() as opened:
        assert_type(opened, MemorySession)
        assert_type(opened.log, list[str])
        assert_type(await opened.get(Item, 1), Item | None)
        async with get_transaction(opened) as same:
            assert_type(same, MemorySession)
        async with MemoryLocks().lock_tables(opened, [Item], mode="SHARE") as locked:
            assert_type(locked, MemorySession)
        assert_type(await MemoryLocks().lock_rows(opened, Item, [1]), Sequence[Item])

    async def work(session: MemorySession) -> int:
        return session.number

    assert_type(await run_transaction(database.session, work), int)
    assert_type(database.rows(Item), list[Mapping[str, Any]])
    assert_type(database.log, Sequence[Event])


async def wrong() -> None:
    MemoryDatabase(clock=3)  # type: ignore[arg-type]
    MemoryLocks().lock_tables(object(), [Item])  # type: ignore[type-var]
    database.fail_next("COMMIT", 40001)  # type: ignore[arg-type]
