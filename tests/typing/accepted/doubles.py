"""Checked by mypy and pyright, never run: the doubles satisfy the protocols, and contract classes
take a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, assert_type

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped

from pgtoolset import (
    create_db_context,
    get_transaction,
    on_commit,
    run_transaction,
)
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
from pgtoolset.testing import (
    ManualClock,
    MemoryAssociations,
    MemoryDatabase,
    MemoryLocks,
    MemorySession,
    MemoryWatcher,
)
from pgtoolset.testing.contracts import (
    LinkedRows,
    LinksHarness,
    MappedRows,
    MemoryLinks,
    MemoryRows,
    RowsHarness,
    TransactionHarness,
)
from pgtoolset.testing.doubles import Clock, Event, LoopClock, NoResult

S = TypeVar("S", bound=TransactionalSession)
M = TypeVar("M")


class Base(DeclarativeBase):
    pass


class Item(Base):
    id: Mapped[int]


def new_item(number: int) -> Item:
    return Item(id=number)


database = MemoryDatabase(clock=ManualClock())
factory: SessionFactory[MemorySession] = database.session
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
memory_rows: RowsHarness = MemoryRows(database, Item)
memory_links: LinksHarness = MemoryLinks(database, Item.id, new_item, new_item)


async def harnesses(session_maker: async_sessionmaker[AsyncSession]) -> None:
    rows: RowsHarness = MappedRows(session_maker, Item)
    harness: TransactionHarness = rows
    links: LinksHarness = LinkedRows(session_maker, Item.id, new_item, new_item)
    assert [harness, links]


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
        assert_type(await opened.execute(text("SELECT 1")), NoResult)
        await opened.put(Item, 1, {"name": "one"})
        assert_type(opened.rows(Item), list[Mapping[str, Any]])
        assert_type(opened.events, Sequence[Event])
        on_commit(opened, lambda: None)
        async with get_transaction(opened) as same:
            assert_type(same, MemorySession)
        async with MemoryLocks().lock_tables(opened, [Item], mode="SHARE") as locked:
            assert_type(locked, MemorySession)
        assert_type(await MemoryLocks().lock_rows(opened, Item, [1]), Sequence[Item])

    async def work(session: MemorySession) -> int:
        return session.number

    assert_type(await run_transaction(database.session, work), int)
    assert_type(database.rows(Item), list[Mapping[str, Any]])
    database.put(Item, 1)
    database.remove(Item, 1)
    database.fail_next("COMMIT", "40001", times=2)
    database.fail_next("BEGIN", OSError)
    database.fail_next("STATEMENT", OSError("lost"))
    assert_type(database.log, Sequence[Event])


async def wrong() -> None:
    MemoryDatabase(clock=3)  # type: ignore[arg-type]
    MemoryLocks().lock_tables(object(), [Item])  # type: ignore[type-var]
    MemoryLocks().lock_tables(database.session(), ["item"])  # type: ignore[list-item]
    MemoryLocks().advisory_lock(database, "key")  # type: ignore[arg-type]
    await database.session().get(Item, 1)  # type: ignore[attr-defined]
    await database.session().execute("SELECT 1")  # type: ignore[arg-type]
    session: AsyncSession = database.session()  # type: ignore[assignment]
    database.fail_next("COMMIT", 40001)  # type: ignore[arg-type]
    database.fail_next("ROLLBACK", "40001")  # type: ignore[arg-type]
    database.rows("item")  # type: ignore[arg-type]
    database.rows(Item())  # type: ignore[arg-type]
    assert [session]
