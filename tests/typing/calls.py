"""Calls of the contracts that a checker must accept, and calls that it must refuse: `# refused`.

Never run. The file calls the functions. test_typing.py makes a second file of it, which makes the
same calls through the protocols, and has mypy, pyright and ty check both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any, Literal, assert_type
from uuid import UUID

from sqlalchemy import Column, Engine, ForeignKey, MetaData, Table
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.ext.orderinglist import OrderingList
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    InstrumentedAttribute,
    Mapped,
    QueryableAttribute,
    Session,
    WriteOnlyMapped,
    aliased,
    mapped_column,
    registry,
    relationship,
)
from sqlalchemy.orm.collections import KeyFuncDict

# test_typing.py puts the protocols in the place of the next three lines.
import pgtoolset as api
from pgtoolset import LockMode, LockWait, M2MChange, RowChange, RowLockMode
from pgtoolset import RowWatcher as Watcher
from pgtoolset.types import Duration, LockModeSpelling, ManyToMany, PrimaryKeys, Related


class Base(DeclarativeBase):
    pass


class Tag(Base):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)


class Special(Tag):
    __tablename__ = "special"

    id: Mapped[int] = mapped_column(ForeignKey(Tag.id), primary_key=True)


class Bag:
    """A collection class of a user's own."""

    def __iter__(self) -> Iterator[Tag]:
        return iter(())


order_tag = Table(
    "order_tag",
    Base.metadata,
    Column("order", ForeignKey("order.id")),
    Column("tag", ForeignKey("tag.id")),
)


class Order(Base):
    __tablename__ = "order"

    id: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    numbers: Mapped[list[int]]
    tags: Mapped[list[Tag]] = relationship(secondary=order_tag)
    tag_set: Mapped[set[Tag]] = relationship(secondary=order_tag)
    by_id: Mapped[dict[int, Tag]] = relationship(secondary=order_tag)
    ordered: Mapped[OrderingList[Tag]] = relationship(secondary=order_tag)
    keyed: Mapped[KeyFuncDict[int, Tag]] = relationship(secondary=order_tag)
    sequence: Mapped[Sequence[Tag]] = relationship(secondary=order_tag, collection_class=list)
    bag: Mapped[Bag] = relationship(secondary=order_tag)
    one: Mapped[Tag] = relationship(secondary=order_tag)
    one_or_none: Mapped[Tag | None] = relationship(secondary=order_tag)
    write_only: WriteOnlyMapped[Tag] = relationship(secondary=order_tag)
    dynamic: DynamicMapped[Tag] = relationship(secondary=order_tag)
    untyped = relationship("Tag", secondary=order_tag)


@registry().mapped
class Decorated:
    """Mapped without a declarative base, so a checker sees a plain class."""

    others: Mapped[list[Decorated]] = relationship(secondary=order_tag)


class Plain:
    """Mapped elsewhere, so a checker sees a plain class."""

    balance: int


class MySession(AsyncSession):
    pass


async def locks_of_tables(
    session: AsyncSession,
    mine: MySession,
    metadata: MetaData,
    text: str,
    spelling: LockModeSpelling,
) -> None:
    assert_type(api.lock_tables(mine, [Order]), AbstractAsyncContextManager[MySession])
    async with api.lock_tables(session=mine, tables=[Order], mode="EXCLUSIVE") as same:
        assert_type(same, MySession)
    api.lock_tables(session, [Plain, metadata.tables["order"], Order.__table__])
    api.lock_tables(session, metadata.sorted_tables)
    api.lock_tables(session, metadata.tables.values())
    api.lock_tables(session, (model for model in (Order, Tag)))
    api.lock_tables(session, {Order, Tag})
    api.lock_tables(session, [Order], mode=LockMode.SHARE, timeout=None, nowait=True)
    api.lock_tables(session, [Order], mode="ACCESS EXCLUSIVE", timeout=1)
    api.lock_tables(session, [Order], mode="access_exclusive", timeout=0.5)
    api.lock_tables(session, [Order], mode="ROW_SHARE", timeout="500ms")
    api.lock_tables(session, [Order], mode="share row exclusive", timeout=timedelta(days=60))
    api.lock_tables(session, [Order], mode=LockMode(text))
    api.lock_tables(session, [Order], mode=spelling)
    api.lock_tables(session)  # refused
    api.lock_tables(session, [Order], "EXCLUSIVE")  # refused
    api.lock_tables(session, [Order], mode=1)  # refused
    api.lock_tables(session, [Order], mode=None)  # refused
    api.lock_tables(session, [Order], mode="EXCLUSIV")  # refused
    api.lock_tables(session, [Order], mode="UPDATE")  # refused
    api.lock_tables(session, [Order], mode="SHARED")  # refused
    api.lock_tables(session, [Order], mode=RowLockMode.UPDATE)  # refused
    api.lock_tables(session, [Order], mode=text)  # refused
    api.lock_tables(session, [Order], nowait="no")  # refused
    api.lock_tables(session, [Order], nowait=None)  # refused
    api.lock_tables(session, [Order], timeout=b"5s")  # refused
    api.lock_tables(session, [Order], timeout=[5])  # refused
    api.lock_tables(session, [Order], interval=5)  # refused
    api.lock_tables(session, Order)  # refused
    api.lock_tables(session, None)  # refused
    api.lock_tables(session, "order")  # refused
    api.lock_tables(session, ["order"])  # refused
    api.lock_tables(session, [Order()])  # refused
    api.lock_tables(session, metadata.tables)  # refused
    api.lock_tables([Order], session)  # refused


async def advisory_locks(session: AsyncSession, text: str, number: int) -> None:
    assert_type(api.advisory_lock(session, "key"), AbstractAsyncContextManager[bool])
    async with api.advisory_lock(session=session, key=1, shared=True, nowait=True) as held:
        assert_type(held, bool)
    api.advisory_lock(session, (number, 2), timeout="1min")
    api.advisory_lock(session, text, timeout=timedelta(seconds=1))
    api.advisory_lock(session, "key", timeout=None)
    api.advisory_lock(session)  # refused
    api.advisory_lock(session, 1.5)  # refused
    api.advisory_lock(session, None)  # refused
    api.advisory_lock(session, b"key")  # refused
    api.advisory_lock(session, (1, 2, 3))  # refused
    api.advisory_lock(session, ("a", "b"))  # refused
    api.advisory_lock(session, [1, 2])  # refused
    api.advisory_lock(session, "key", True)  # refused
    api.advisory_lock(session, "key", shared="yes")  # refused
    api.advisory_lock(session, "key", timeout=b"1s")  # refused
    api.advisory_lock("key", session)  # refused


async def locks_of_rows(
    session: AsyncSession,
    text: str,
    names: Iterable[str],
    ids: Iterable[int],
    uuids: Iterable[UUID],
    pairs: Iterable[tuple[int, str]],
    anything: Iterable[Any],
    words: Collection[str],
    keys: PrimaryKeys,
) -> None:
    assert_type(await api.lock_rows(session, Order, [1, 2]), Sequence[Order])
    await api.lock_rows(session=session, model=Order, pks={1, 2}, mode=RowLockMode.SHARE)
    await api.lock_rows(session, Order, (1, 2), mode="NO_KEY_UPDATE", timeout="1s")
    await api.lock_rows(session, Order, [], mode="key share", timeout=timedelta(seconds=1))
    await api.lock_rows(session, Order, [1], mode=RowLockMode(text), skip_locked=True)
    await api.lock_rows(session, Order, ["a", "b"], nowait=True)
    await api.lock_rows(session, Order, ["a", 1])
    await api.lock_rows(session, Order, [(1, "a"), (2, "b")])
    await api.lock_rows(session, Order, [{"id": 1}])
    await api.lock_rows(session, Order, ids)
    await api.lock_rows(session, Order, uuids)
    await api.lock_rows(session, Order, pairs)
    await api.lock_rows(session, Order, anything)
    await api.lock_rows(session, Order, words)
    await api.lock_rows(session, Order, keys)
    await api.lock_rows(session, Order, range(3))
    await api.lock_rows(session, Order, (name for name in names))
    await api.lock_rows(session, Order, map(str, ids))
    await api.lock_rows(session, Plain, [1])
    numbers: Sequence[int] = await api.lock_rows(session, Order, [1])  # refused
    await api.lock_rows(session, Order)  # refused
    await api.lock_rows(session, Order(), [1])  # refused
    await api.lock_rows(session, "order", [1])  # refused
    await api.lock_rows(session, order_tag, [1])  # refused
    await api.lock_rows(session, Order, 1)  # refused
    await api.lock_rows(session, Order, None)  # refused
    await api.lock_rows(session, Order, "abc")  # refused
    await api.lock_rows(session, Order, text)  # refused
    await api.lock_rows(session, Order, names)  # refused
    await api.lock_rows(session, Order, Order())  # refused
    await api.lock_rows(session, Order, [1], "UPDATE")  # refused
    await api.lock_rows(session, Order, [1], mode="EXCLUSIVE")  # refused
    await api.lock_rows(session, Order, [1], mode="UPDAT")  # refused
    await api.lock_rows(session, Order, [1], mode=LockMode.SHARE)  # refused
    await api.lock_rows(session, Order, [1], mode=text)  # refused
    await api.lock_rows(session, Order, [1], skip_locked=1.5)  # refused
    await api.lock_rows(session, Order, [1], nowait="no")  # refused
    await api.lock_rows(session, Order, [1], timeout=b"1s")  # refused
    _ = numbers


async def waits(session: AsyncSession, connection: AsyncConnection, engine: AsyncEngine) -> None:
    assert_type(await api.list_lock_waits(connection), Sequence[LockWait])
    assert_type(await api.list_lock_waits(connection_or_session=session), Sequence[LockWait])
    assert_type(await api.list_lock_waits(engine), Sequence[LockWait])
    await api.list_lock_waits()  # refused
    await api.list_lock_waits("postgresql://")  # refused
    await api.list_lock_waits(None)  # refused


async def what_is_no_session(
    sync: Session,
    sync_engine: Engine,
    engine: AsyncEngine,
    connection: AsyncConnection,
    maker: async_sessionmaker[AsyncSession],
    scoped: async_scoped_session[AsyncSession],
    order: Order,
    tag: Tag,
) -> None:
    api.lock_tables(sync, [Order])  # refused
    api.lock_tables(maker, [Order])  # refused
    api.lock_tables(None, [Order])  # refused
    api.lock_tables(object(), [Order])  # refused
    api.advisory_lock(sync, "key")  # refused
    api.advisory_lock(connection, "key")  # refused
    api.advisory_lock(scoped, "key")  # refused
    await api.lock_rows(sync, Order, [1])  # refused
    await api.lock_rows(engine, Order, [1])  # refused
    await api.lock_rows(maker, Order, [1])  # refused
    await api.list_lock_waits(sync)  # refused
    await api.list_lock_waits(sync_engine)  # refused
    await api.wait_for_row_change(sync, Order, 1)  # refused
    await api.wait_for_row_change(engine, Order, 1)  # refused
    await api.m2m_add(sync, order, Order.tags, tag)  # refused
    await api.m2m_add(connection, order, Order.tags, tag)  # refused
    await api.m2m_remove(engine, order, Order.tags, tag)  # refused
    await api.m2m_set(scoped, order, Order.tags, tag)  # refused
    await api.m2m_set(None, order, Order.tags, tag)  # refused
    await api.m2m_add_many(maker, Order.tags, [(order, tag)])  # refused


async def waiting(
    session: AsyncSession,
    tag: Tag,
    duration: Duration,
    seen: Mapping[str, Any],
    attributes: Iterable[QueryableAttribute[Any]],
    names: list[str],
) -> None:
    order = await api.wait_for_row_change(session, Order, 1)
    assert_type(order, Order)
    await api.wait_for_row_change(
        session=session,
        model=Order,
        pk_value=1,
        columns=[Order.status, "id"],
        interval=1.0,
        timeout=30,
    )
    await api.wait_for_row_change(session, Order, (1,), interval="500ms", timeout="1min")
    await api.wait_for_row_change(session, Order, {"id": 1}, interval=timedelta(1), timeout=None)
    await api.wait_for_row_change(session, Order, 1, interval=duration, timeout=timedelta(days=60))
    await api.wait_for_row_change(session, Order, 1, columns=(Order.status, Order.id))
    await api.wait_for_row_change(session, Order, 1, columns=attributes, baseline=seen)
    await api.wait_for_row_change(session, Order, 1, columns=names, baseline={"status": "new"})
    await api.wait_for_row_change(session, Order, 1, columns=None, until=None, baseline=None)
    await api.wait_for_row_change(session, Order, 1, baseline=order)
    await api.wait_for_row_change(session, Order, 1, until=lambda row: row.status == "paid")
    await api.wait_for_row_change(session, Plain, 1, columns=["balance"])
    assert_type(await api.wait_for_row_change(session, Tag, 1, baseline=Special()), Tag)
    name: str = await api.wait_for_row_change(session, Order, 1)  # refused
    await api.wait_for_row_change(session, Order)  # refused
    await api.wait_for_row_change(session, Order(), 1)  # refused
    await api.wait_for_row_change(session, order_tag, 1)  # refused
    await api.wait_for_row_change(session, "order", 1)  # refused
    await api.wait_for_row_change(session, Order, 1, ["status"])  # refused
    await api.wait_for_row_change(session, Order, 1, columns=3)  # refused
    await api.wait_for_row_change(session, Order, 1, columns=Order.status)  # refused by pyright, ty
    await api.wait_for_row_change(session, Order, 1, columns=[1])  # refused
    await api.wait_for_row_change(session, Order, 1, columns=[Order])  # refused
    await api.wait_for_row_change(session, Order, 1, columns=[order_tag.c.tag])  # refused
    await api.wait_for_row_change(session, Order, 1, interval=None)  # refused
    await api.wait_for_row_change(session, Order, 1, interval=b"1s")  # refused
    await api.wait_for_row_change(session, Order, 1, timeout=[1])  # refused
    await api.wait_for_row_change(session, Order, 1, until=True)  # refused
    await api.wait_for_row_change(session, Order, 1, until=lambda: True)  # refused
    await api.wait_for_row_change(session, Order, 1, until=lambda row: row.missing)  # refused
    # Of two classes a checker infers what they have in common, so the mistake shows at the result.
    other: Order = await api.wait_for_row_change(session, Order, 1, baseline=tag)  # refused
    (await api.wait_for_row_change(session, Order, 1, baseline=tag)).status  # refused
    (await api.wait_for_row_change(session, Order, 1, baseline=5)).status  # refused
    _ = (name, other)


async def watching(watcher: Watcher, order: Order, duration: Duration) -> None:
    async with watcher as same:
        assert_type(same, Watcher)
    change = await watcher.wait(Order, 1)
    assert_type(change, RowChange[Order])
    assert_type(change.model, type[Order])
    wider: RowChange[Base] = change
    await watcher.wait(model=Order, pk_value=1, columns=[Order.status, "id"], timeout="500ms")
    await watcher.wait(Order, {"id": 1}, timeout=timedelta(seconds=1))
    await watcher.wait(Order, (1,), columns=None, timeout=duration)
    await watcher.wait(Order, 1, until=lambda row: row.status == "paid", baseline=order)
    await watcher.wait(Order, 1, until=None, baseline={"status": "new"}, timeout=None)
    async with watcher.changes(Order, 1, columns=[Order.status]) as changes:
        assert_type(changes.current, Mapping[str, Any] | None)
        async for each in changes:
            assert_type(each, RowChange[Order])
        await changes.aclose()
    async for each in watcher.changes(model=Order, pk_value=1, columns=None):
        assert_type(each.kind, Literal["insert", "update", "delete"])
    assert_type(await watcher.close(), None)
    await watcher.wait(Order)  # refused
    await watcher.wait(Order(), 1)  # refused
    await watcher.wait("order", 1)  # refused
    await watcher.wait(Order, 1, ["status"])  # refused
    await watcher.wait(Order, 1, columns=1)  # refused
    await watcher.wait(Order, 1, columns=[Order])  # refused
    await watcher.wait(Order, 1, timeout=b"1s")  # refused
    await watcher.wait(Order, 1, interval=1)  # refused
    await watcher.wait(Order, 1, until=lambda row: row.missing)  # refused
    await watcher.wait(Order, 1, until=True)  # refused
    watcher.changes(Order)  # refused
    watcher.changes(Order(), 1)  # refused
    watcher.changes(Order, 1, columns=3)  # refused
    watcher.changes(Order, 1, timeout=3)  # refused
    await watcher.changes(Order, 1)  # refused
    for never in watcher.changes(Order, 1):  # refused
        _ = never
    async for row in watcher.changes(Order, 1):
        row.after["status"]  # refused
        row.kind = "insert"  # refused
        row.model = Order  # refused
    narrower: RowChange[Special] = await watcher.wait(Tag, 1)  # refused
    watcher.changes(Order, 1).current = None  # refused
    _ = (narrower, wider)


async def associations(
    session: AsyncSession, order: Order, tag: Tag, special: Special, decorated: Decorated, text: str
) -> None:
    assert_type(await api.m2m_add(session, order, Order.tags, tag, tag, pks=[1]), int)
    await api.m2m_add(session=session, instance=order, rel_attr=Order.tags, pks=(1, 2))
    await api.m2m_add(session, order, Order.tags, ignore_conflicts=True, values={"position": 1})
    assert_type(await api.m2m_remove(session, order, Order.tags, tag, pks=(1, 2)), int)
    change = await api.m2m_set(session, order, Order.tags, keep_existing=True, values=None)
    assert_type(change, M2MChange)
    assert_type(change.added, int)
    links = [(order, 1), (2, tag)]
    assert_type(await api.m2m_add_many(session, Order.tags, links), int)
    await api.m2m_add_many(session, Order.tags, ((order, key) for key in range(3)))
    await api.m2m_add_many(session, rel_attr=Order.tags, links=[], ignore_conflicts=True, values={})
    await api.m2m_add(session, order, Order.tags, tag, special)
    await api.m2m_add(session, order, Order.tags, *[special], *order.tags)
    await api.m2m_add(session, order, Order.tag_set, tag, special)
    await api.m2m_add(session, order, Order.by_id, tag, special)
    await api.m2m_add(session, order, Order.ordered, tag, special)
    await api.m2m_add(session, order, Order.keyed, tag, special)
    await api.m2m_add(session, order, Order.sequence, tag, special)
    await api.m2m_add(session, order, Order.bag, tag, special)
    await api.m2m_add(session, order, Order.one, tag)
    await api.m2m_add(session, order, Order.one_or_none, tag)
    await api.m2m_add(session, order, Order.write_only, tag)
    await api.m2m_add(session, order, Order.dynamic, tag)
    await api.m2m_add(session, order, Order.untyped, tag)
    await api.m2m_add(session, order, Order.tags.of_type(Special), special)
    await api.m2m_add(session, order, aliased(Order).tags, tag)
    await api.m2m_add(session, decorated, Decorated.others, decorated)
    await api.m2m_add(order, order, Order.tags)  # refused
    await api.m2m_add(session, order)  # refused
    await api.m2m_remove(order, Order.tags, tag)  # refused
    await api.m2m_add(session, order, Order.tags, keep_existing=True)  # refused
    await api.m2m_add(session, order, Order.tags, ignore_conflicts="yes")  # refused
    text = await api.m2m_add(session, order, Order.tags, pks=[1])  # refused
    await api.m2m_add(session, order, Order.tags, pks=1)  # refused
    await api.m2m_add(session, order, Order.tags, pks="12")  # refused
    await api.m2m_add(session, order, Order.tags, pks=text)  # refused
    await api.m2m_remove(session, order, Order.tags, pks="12")  # refused
    await api.m2m_remove(session, order, Order.tags, ignore_conflicts=True)  # refused
    await api.m2m_set(session, order, Order.tags, pks="12")  # refused
    await api.m2m_set(session, order, Order.tags, values=[1])  # refused
    await api.m2m_set(session, order, Order.tags, keep_existing=None)  # refused
    await api.m2m_add(session, order, Order.tags, values={1: 1})  # refused
    (await api.m2m_set(session, order, Order.tags)).changed  # refused
    await api.m2m_add_many(session, Order.tags, (order, tag))  # refused
    await api.m2m_add_many(session, Order.tags, [(order, tag, 1)])  # refused
    await api.m2m_add_many(session, Order.tags, [1])  # refused
    await api.m2m_add_many(session, Order.tags, "ab")  # refused
    await api.m2m_add_many(session, order, Order.tags, [(order, tag)])  # refused


async def what_is_no_relationship(session: AsyncSession, order: Order, tag: Tag) -> None:
    await api.m2m_add(session, order, "tags", tag)  # refused
    await api.m2m_add(session, order, order.tags, tag)  # refused
    await api.m2m_add(session, order, Order.status, tag)  # refused
    await api.m2m_add(session, order, Order.numbers, tag)  # refused
    await api.m2m_add(session, Order.tags, order, tag)  # refused
    await api.m2m_remove(session, order, order_tag, tag)  # refused
    await api.m2m_remove(session, order, None, tag)  # refused
    await api.m2m_set(session, order, Order.id)  # refused
    await api.m2m_set(session, order, Tag, tag)  # refused
    await api.m2m_add_many(session, "tags", [(order, tag)])  # refused
    await api.m2m_add_many(session, Order.status, [(order, tag)])  # refused


async def of_another_class(session: AsyncSession, order: Order, tag: Tag) -> None:
    await api.m2m_add(session, order, Order.tags, order)  # refused
    await api.m2m_add(session, order, Order.tags, tag, order)  # refused
    await api.m2m_add(session, order, Order.tags, Tag)  # refused
    await api.m2m_add(session, order, Order.tags, [tag])  # refused
    await api.m2m_add(session, order, Order.tags, 1)  # refused
    await api.m2m_add(session, order, Order.ordered, order)  # refused
    await api.m2m_remove(session, order, Order.tag_set, order)  # refused
    await api.m2m_remove(session, order, Order.keyed, order)  # refused
    await api.m2m_set(session, order, Order.by_id, order)  # refused
    await api.m2m_set(session, order, Order.tags, None)  # refused


async def through_functions_of_a_users(
    session: AsyncSession,
    order: Order,
    anything: InstrumentedAttribute[Any],
    typed: ManyToMany[Related],
    related: Related,
    some: Iterable[Any],
    model: type[Related],
) -> Related:
    await api.m2m_add(session, order, anything, *some)
    await api.m2m_add(session, order, typed, related)
    for row in await api.lock_rows(session, model, some):
        return row
    return await api.wait_for_row_change(session, model, 1, baseline=related, until=bool)
