"""What checkers must refuse where there is no protocol: each on a line that says so.

Never run; see tests/typing/test_typing.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar, assert_type

from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import pgtoolset
from pgtoolset import (
    DeadlineExceededError,
    RowChange,
    RowWatcher,
    cleanup_tables,
    create_database,
    create_db_context,
    create_db_dependency,
    deadline,
    drop_database,
    get_transaction,
    on_commit,
    row_change_trigger,
    run_transaction,
)
from pgtoolset._native import associations, comparator
from pgtoolset.protocols import (
    AssociationRows,
    AssociationWriter,
    ChangeStream,
    RowComparator,
    SessionFactory,
    TableLocker,
    TransactionalSession,
    Watcher,
)
from pgtoolset.types import Duration, LockModeSpelling, RowLockModeSpelling

M = TypeVar("M")


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "order"

    id: Mapped[int] = mapped_column(primary_key=True)


class Special(AsyncSession):
    pass


async def sessions(session: AsyncSession, session_maker: async_sessionmaker[AsyncSession]) -> None:
    create_db_dependency()  # refused
    create_db_dependency(session_maker=session)  # refused
    create_db_context(session_maker=AsyncSession)()()  # refused
    create_db_context(session_maker, 5)  # refused
    create_db_context(session_maker, resolve_commit=session)  # refused
    create_db_dependency(session_maker, resolve_commit=[5])  # refused
    create_db_context(session_maker, settings={"app.key": None})  # refused
    create_db_context(session_maker, settings=[("app.key", "x")])  # refused
    create_db_context(session_maker, settings=lambda request: {"app.key": "x"})  # refused
    create_db_dependency(session_maker, settings=5)  # refused
    create_db_context(session_maker, require=5)  # refused
    create_db_context(session_maker, deadline=[1])  # refused
    deadline(None)  # refused
    async with deadline(1):  # refused
        pass
    DeadlineExceededError("over", spent_on="lunch", seconds=1)  # refused
    async with create_db_context(session_maker=session_maker)() as own:
        special: Special = own  # refused
        _ = special
    factory: SessionFactory[Special] = session_maker  # refused
    _ = factory


async def transactions(
    session: AsyncSession, sync: Session, session_maker: async_sessionmaker[AsyncSession]
) -> None:
    get_transaction(None)  # refused
    get_transaction(sync)  # refused
    get_transaction(session_maker)  # refused
    get_transaction(session, isolation_level="SNAPSHOT")  # refused
    get_transaction(session, durable="yes")  # refused
    get_transaction(session, True)  # refused
    get_transaction(session, resolve_commit=b"5s")  # refused
    get_transaction(session, settings="app.key=x")  # refused
    on_commit(session, "callback")  # refused
    on_commit(session, lambda one: None)  # refused

    async def work(own: AsyncSession) -> int:
        return 1

    text: str = await run_transaction(session_maker, work)  # refused
    _ = text
    await run_transaction(session_maker, work, attempts="5")  # refused
    await run_transaction(session_maker, work, resolve_commit=work)  # refused
    await run_transaction(session_maker, lambda own: 1)  # refused
    await run_transaction(session_maker, work, retry_on=work)  # refused
    await run_transaction(session_maker, work, retry_on=40001)  # refused
    await run_transaction(session_maker, work, on_retry=lambda: None)  # refused


async def watchers(session: AsyncSession, engine: AsyncEngine) -> None:
    RowWatcher(engine, 0.5)  # refused
    RowWatcher(session)  # refused
    RowWatcher(engine, notify="yes")  # refused
    RowWatcher(engine, interval=b"1s")  # refused
    RowWatcher(engine, timeout=1)  # refused
    row_change_trigger(Order())  # refused
    row_change_trigger("order")  # refused


async def databases(session: AsyncSession, sync: Session) -> None:
    await create_database("name")  # refused
    await create_database("name", "postgresql://")  # refused
    await create_database(b"name", server_url="postgresql://")  # refused
    await drop_database("name", server_url=None)  # refused
    await drop_database("name", server_url="postgresql://", force="yes")  # refused
    await cleanup_tables(session)  # refused
    await cleanup_tables(session, "base")  # refused
    await cleanup_tables(session, Order(), MetaData())  # refused
    await cleanup_tables(sync, Base)  # refused
    await cleanup_tables(session, Base, timeout=b"1s")  # refused


def names() -> None:
    pgtoolset.lock_table  # refused
    pgtoolset.__versions__  # refused
    assert_type(pgtoolset.implementation, Literal["c", "python"])
    assert_type(pgtoolset.__version__, str)
    only: Literal["python"] = pgtoolset.implementation  # refused
    version: int = pgtoolset.__version__  # refused
    spelling: LockModeSpelling = "EXCLUSIV"  # refused
    row_spelling: RowLockModeSpelling = "EXCLUSIVE"  # refused
    duration: Duration = None  # refused
    _ = (only, version, spelling, row_spelling, duration)


class NoSavepoints:
    def in_transaction(self) -> bool:
        return False

    def begin(self) -> Any: ...


class LocksWithoutMode:
    @asynccontextmanager
    async def lock_tables(
        self, session: AsyncSession, tables: Sequence[Any]
    ) -> AsyncIterator[AsyncSession]:
        yield session


class LocksOfSequences:
    @asynccontextmanager
    async def lock_tables(
        self,
        session: Any,
        tables: Sequence[Any],
        *,
        mode: str = "SHARE",
        timeout: float | timedelta | str | None = None,
        nowait: bool = False,
    ) -> AsyncIterator[Any]:
        yield session


class GeneratingWatcher:
    """A watcher whose changes are a generator, which has neither a block nor what is current."""

    async def __aenter__(self) -> GeneratingWatcher:
        return self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object, /) -> None: ...

    async def close(self) -> None: ...

    async def wait(
        self,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = None,
        timeout: float | timedelta | str | None = None,
        until: Callable[[M], bool] | None = None,
        baseline: M | Mapping[str, Any] | None = None,
    ) -> RowChange[M]:
        return RowChange(model, pk_value, None, None)

    async def changes(
        self, model: type[M], pk_value: Any, *, columns: Iterable[Any] | None = None
    ) -> AsyncIterator[RowChange[M]]:
        yield RowChange(model, pk_value, None, None)


def slots(engine: AsyncEngine, changes: AsyncIterator[RowChange[Order]]) -> None:
    session: TransactionalSession = NoSavepoints()  # refused
    locker: TableLocker = LocksWithoutMode()  # refused
    of_sequences: TableLocker = LocksOfSequences()  # refused
    watcher: Watcher = GeneratingWatcher()  # refused
    stream: ChangeStream[Order] = changes  # refused
    narrower: ChangeStream[Special] = RowWatcher(engine).changes(Order, 1)  # refused
    writer: AssociationWriter = comparator  # refused
    rows: AssociationRows = comparator  # refused
    compare: RowComparator = associations  # refused
    _ = (session, locker, of_sequences, watcher, stream, narrower, writer, rows, compare)
