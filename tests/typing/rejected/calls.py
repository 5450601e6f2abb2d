"""Calls that type checkers must refuse, each on a line that says so. Never run; see
tests/typing/test_typing.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import Column, Engine, ForeignKey, Table
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from pgtoolset import (
    RowChange,
    RowWatcher,
    advisory_lock,
    create_database,
    create_db_context,
    create_db_dependency,
    get_transaction,
    list_lock_waits,
    lock_rows,
    lock_tables,
    m2m_add,
    m2m_add_many,
    m2m_remove,
    m2m_set,
    on_commit,
    run_transaction,
    wait_for_row_change,
)
from pgtoolset._native import associations, comparator
from pgtoolset.protocols import (
    AssociationRows,
    AssociationWriter,
    RowComparator,
    SessionFactory,
    TableLocker,
    TransactionalSession,
)


class Base(DeclarativeBase):
    pass


order_tag = Table(
    "order_tag",
    Base.metadata,
    Column("order", ForeignKey("order.id")),
    Column("tag", ForeignKey("tag.id")),
)


class Tag(Base):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)


class Order(Base):
    __tablename__ = "order"

    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    tags: Mapped[list[Tag]] = relationship(secondary=order_tag)
    tag_set: Mapped[set[Tag]] = relationship(secondary=order_tag)
    by_id: Mapped[dict[int, Tag]] = relationship(secondary=order_tag)


class Special(AsyncSession):
    pass


async def sessions(session: AsyncSession, session_maker: async_sessionmaker[AsyncSession]) -> None:
    create_db_dependency()  # rejected
    create_db_dependency(session_maker=session)  # rejected
    create_db_context(session_maker=AsyncSession)()()  # rejected
    async with create_db_context(session_maker=session_maker)() as own:
        special: Special = own  # rejected
        print(special)
    factory: SessionFactory[Special] = session_maker  # rejected
    print(factory)


async def transactions(
    session: AsyncSession, session_maker: async_sessionmaker[AsyncSession]
) -> None:
    get_transaction(None)  # rejected
    get_transaction(session, isolation_level="SNAPSHOT")  # rejected
    get_transaction(session, durable="yes")  # rejected
    get_transaction(session, True)  # rejected
    on_commit(session, "callback")  # rejected
    on_commit(session, lambda one: None)  # rejected

    async def work(own: AsyncSession) -> int:
        return 1

    text: str = await run_transaction(session_maker, work)  # rejected
    print(text)
    await run_transaction(session_maker, work, attempts="5")  # rejected
    await run_transaction(session_maker, lambda own: 1)  # rejected


async def locks(session: AsyncSession) -> None:
    lock_tables(session)  # rejected
    lock_tables(session, [Order], "EXCLUSIVE")  # rejected
    lock_tables(session, [Order], mode=1)  # rejected
    lock_tables(session, [Order], nowait="no")  # rejected
    lock_tables(session, Order)  # rejected
    lock_tables(session, "order")  # rejected
    lock_tables(session, ["order"])  # rejected
    lock_tables(session, [Order()])  # rejected
    advisory_lock(session, 1.5)  # rejected
    advisory_lock(session, (1, 2, 3))  # rejected
    orders: Sequence[str] = await lock_rows(session, Order, [1])  # rejected
    print(orders)


async def what_is_no_session(
    sync: Session, sync_engine: Engine, engine: AsyncEngine, connection: AsyncConnection
) -> None:
    lock_tables(sync, [Order])  # rejected
    advisory_lock(sync, "key")  # rejected
    advisory_lock(connection, "key")  # rejected
    advisory_lock("key", sync)  # rejected
    await lock_rows(sync, Order, [1])  # rejected
    await lock_rows(engine, Order, [1])  # rejected
    await list_lock_waits(sync)  # rejected
    await list_lock_waits(sync_engine)  # rejected
    await list_lock_waits("postgresql://")  # rejected


async def watching(session: AsyncSession, engine: AsyncEngine) -> None:
    name: str = await wait_for_row_change(session, Order, 1)  # rejected
    await wait_for_row_change(session, Order, 1, until=lambda order: order.missing)  # rejected
    await wait_for_row_change(session, Order, 1, interval=b"1s")  # rejected
    RowWatcher(engine, 0.5)  # rejected
    RowWatcher(session)  # rejected
    async with RowWatcher(engine) as watcher:
        change: RowChange[Base] | str = await watcher.wait(Order, 1, columns=1)  # rejected
        async for row in watcher.changes(Order, 1):
            row.after["status"]  # rejected
            row.kind = "insert"  # rejected
    print(name, change)


async def many_to_many(session: AsyncSession, order: Order, tag: Tag) -> None:
    await m2m_add(order, order, Order.tags)  # rejected
    await m2m_add(session, order, Order.tags, keep_existing=True)  # rejected
    added: str = await m2m_add(session, order, Order.tags, pks=[1])  # rejected
    await m2m_add(session, order, Order.tags, pks=1)  # rejected
    (await m2m_set(session, order, Order.tags)).changed  # rejected
    print(added)


async def what_is_no_relationship(session: AsyncSession, order: Order, tag: Tag) -> None:
    await m2m_add(session, order, "tags", tag)  # rejected
    await m2m_add(session, order, order.tags, tag)  # rejected
    await m2m_add(session, order, Order.status, tag)  # rejected
    await m2m_add(session, Order.tags, order, tag)  # rejected
    await m2m_remove(session, order, order_tag, tag)  # rejected
    await m2m_set(session, order, Order.id)  # rejected
    await m2m_set(session, order, Tag, tag)  # rejected
    await m2m_add_many(session, "tags", [(order, tag)])  # rejected
    await m2m_add_many(session, Order.status, [(order, tag)])  # rejected


async def of_another_class(session: AsyncSession, order: Order, tag: Tag) -> None:
    await m2m_add(session, order, Order.tags, order)  # rejected
    await m2m_add(session, order, Order.tags, tag, order)  # rejected
    await m2m_add(session, order, Order.tags, [tag])  # rejected
    await m2m_add(session, order, Order.tags, 1)  # rejected
    await m2m_remove(session, order, Order.tag_set, order)  # rejected
    await m2m_set(session, order, Order.by_id, order)  # rejected
    await m2m_set(session, order, Order.tags, None)  # rejected
    await m2m_add_many(session, Order.tags, (order, tag))  # rejected
    await m2m_add_many(session, Order.tags, [(order, tag, 1)])  # rejected


async def databases() -> None:
    await create_database("name")  # rejected
    await create_database("name", "postgresql://")  # rejected


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


def slots() -> None:
    session: TransactionalSession = NoSavepoints()  # rejected
    locker: TableLocker = LocksWithoutMode()  # rejected
    writer: AssociationWriter = comparator  # rejected
    rows: AssociationRows = comparator  # rejected
    compare: RowComparator = associations  # rejected
    print(session, locker, writer, rows, compare)
