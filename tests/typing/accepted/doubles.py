"""Checked by mypy and pyright, never run: the doubles satisfy the protocols, and contract classes
take a user's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, TypeVar, assert_type

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped

from pgtoolset import (
    LockMode,
    LockWait,
    RowChange,
    RowLockMode,
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


class OwnLocks:
    """A double of a user's own: it needs the values that it returns, and nothing else of ours."""

    @asynccontextmanager
    async def lock_tables(
        self,
        session: S,
        tables: Sequence[Any],
        *,
        mode: LockMode | str = LockMode.SHARE,
        timeout: float | timedelta | str | None = None,
        nowait: bool = False,
    ) -> AsyncIterator[S]:
        yield session

    @asynccontextmanager
    async def advisory_lock(
        self,
        session: Any,
        key: int | tuple[int, int] | str,
        *,
        shared: bool = False,
        nowait: bool = False,
        timeout: float | timedelta | str | None = None,
    ) -> AsyncIterator[bool]:
        yield True

    async def lock_rows(
        self,
        session: Any,
        model: type[M],
        pks: Iterable[Any],
        *,
        mode: RowLockMode | str = RowLockMode.UPDATE,
        skip_locked: bool = False,
        nowait: bool = False,
        timeout: float | timedelta | str | None = None,
    ) -> Sequence[M]:
        return []

    async def list_lock_waits(self, connection_or_session: Any) -> Sequence[LockWait]:
        return []


own_table_locker: TableLocker = OwnLocks()
own_advisory_locker: AdvisoryLocker = OwnLocks()
own_row_locker: RowLocker = OwnLocks()
own_observer: LockObserver = OwnLocks()


class OwnWatcher:
    """The same for those who wait for rows."""

    async def __aenter__(self) -> OwnWatcher:
        return self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object, /) -> None: ...

    async def wait(
        self,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = None,
        timeout: float | timedelta | None = None,
    ) -> RowChange[M]:
        return RowChange(model, pk_value, None, None)

    async def changes(
        self, model: type[M], pk_value: Any, *, columns: Iterable[Any] | None = None
    ) -> AsyncIterator[RowChange[M]]:
        yield RowChange(model, pk_value, None, None)

    async def wait_for_row_change(
        self,
        session: Any,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = None,
        interval: float | timedelta = 1,
        timeout: float | timedelta | None = None,
        until: Callable[[M], bool] | None = None,
        baseline: M | Mapping[str, Any] | None = None,
    ) -> M:
        return model()


own_watcher: Watcher = OwnWatcher()
own_waiter: ChangeWaiter = OwnWatcher()


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
