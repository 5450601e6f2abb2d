"""Promises about transactions, locks, watching, associations and databases."""

import asyncio
import re
from contextlib import suppress
from typing import Any

from sqlalchemy import Column, ForeignKey, MetaData, Table, event, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

from tests.comparison.promises import promise
from tests.comparison.stacks import (
    AdvancedAlchemy,
    ByHand,
    FastapiToolsets,
    PgToolset,
    Stack,
    plain,
)

ASYNC = (ByHand, FastapiToolsets, AdvancedAlchemy, PgToolset)


class Base(DeclarativeBase):
    pass


item_tag = Table(
    "item_tag",
    Base.metadata,
    Column("item_id", ForeignKey("item.id"), primary_key=True),
    Column("tag_id", ForeignKey("tag.id"), primary_key=True),
)


class Tag(Base):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    tags: Mapped[list[Tag]] = relationship(secondary=item_tag)


class Order(Base):
    """A table whose name is a word of SQL."""

    __tablename__ = "order"

    id: Mapped[int] = mapped_column(primary_key=True)


def create_tables(stack: Stack, rows: int = 3) -> None:
    """Create the tables of the classes, an item, and tags."""
    with plain(stack.url) as connection:
        connection.execute(
            "CREATE TABLE tag (id int PRIMARY KEY);"
            'CREATE TABLE "order" (id int PRIMARY KEY);'
            "CREATE TABLE item_tag (item_id int REFERENCES item, tag_id int REFERENCES tag,"
            " PRIMARY KEY (item_id, tag_id));"
            "INSERT INTO item VALUES (1, 'new');"
        )
        connection.execute("INSERT INTO tag SELECT generate_series(1, %s)", [rows])


def nested(stack: Stack, session: Any) -> Any:
    """The block that a function of the stack opens for a transaction."""
    if isinstance(stack, PgToolset):
        from pgtoolset import get_transaction

        return get_transaction(session)
    if isinstance(stack, FastapiToolsets):
        from fastapi_toolsets.db import transaction

        return transaction(session)
    return session.begin()


@promise(*ASYNC, lacking="get_transaction|atomic")
async def nests(stack: Stack) -> bool:
    """The same block is a transaction outside, and a savepoint inside of another one."""
    create_tables(stack)
    try:
        async with AsyncSession(stack.engine) as session, nested(stack, session):
            session.add(Order(id=1))
            with suppress(ZeroDivisionError):
                async with nested(stack, session):
                    session.add(Order(id=2))
                    await session.flush()
                    raise ZeroDivisionError
    except SQLAlchemyError:
        return False
    with plain(stack.url) as connection:
        return connection.execute('SELECT id FROM "order"').fetchall() == [(1,)]


@promise(*ASYNC, lacking="on_commit")
async def callbacks(stack: Stack) -> bool:
    """A callback after the commit is forgotten when its savepoint is rolled back."""
    create_tables(stack)
    called: list[int] = []

    def register(session: Any, number: int) -> None:
        if isinstance(stack, PgToolset):
            from pgtoolset import on_commit

            on_commit(session, lambda: called.append(number))
        else:
            event.listen(
                session.sync_session, "after_commit", lambda _: called.append(number), once=True
            )

    if isinstance(stack, FastapiToolsets):
        return await events(stack)
    async with AsyncSession(stack.engine) as session, session.begin():
        register(session, 1)
        with suppress(ZeroDivisionError):
            async with session.begin_nested():
                await session.execute(text("SELECT 1"))
                register(session, 2)
                raise ZeroDivisionError
    return called == [1]


async def events(stack: FastapiToolsets) -> bool:
    """Its callbacks belong to rows, in sessions of a class of its own."""
    from fastapi_toolsets.models import EventSession, ModelEvent, listens_for

    called: list[int] = []
    listens_for(Order, [ModelEvent.CREATE])(lambda order, *_: called.append(order.id))
    async with EventSession(stack.engine, expire_on_commit=False) as session:
        session.add(Order(id=1))
        with suppress(ZeroDivisionError):
            async with session.begin_nested():
                session.add(Order(id=2))
                await session.flush()
                raise ZeroDivisionError
        await session.commit()
    return called == [1]


@promise(PgToolset, lacking=r"(run|retry)_\w*transaction\w*|\w*serialization_failure\w*")
async def retries(stack: Stack) -> bool:
    """A transaction runs again after a serialization failure."""
    from pgtoolset import run_transaction

    create_tables(stack)
    both_have_read = asyncio.Barrier(2)
    runs = 0

    async def work(session: AsyncSession) -> None:
        nonlocal runs
        runs += 1
        item = await session.get_one(Item, 1)
        if runs <= 2:
            await both_have_read.wait()
        item.name = f"{item.name}+"

    serializable = {"isolation_level": "SERIALIZABLE"}
    await asyncio.gather(
        *(run_transaction(stack.session_maker, work, **serializable) for _ in range(2))
    )
    with plain(stack.url) as connection:
        return connection.execute("SELECT name FROM item").fetchone() == ("new++",) and runs == 3


def table_lock(stack: Stack, session: Any, table: type[Base]) -> Any:
    """The block of the stack that locks a table."""
    if isinstance(stack, PgToolset):
        from pgtoolset import lock_tables

        return lock_tables(session, [table], mode="EXCLUSIVE", timeout="100ms")
    from fastapi_toolsets.db import LockMode

    return stack.database.lock_tables(
        [table], session=session, mode=LockMode.EXCLUSIVE, timeout="100ms"
    )


LOCKS = r"lock_tables?|table_lock|LockMode"


@promise(FastapiToolsets, PgToolset, lacking=LOCKS)
async def any_table(stack: Stack) -> bool:
    """A lock on a table whose name is a word of SQL."""
    create_tables(stack)
    try:
        async with stack.unit() as session, table_lock(stack, session, Order):
            return True
    except SQLAlchemyError:
        return False


class Part(Base):
    """A table for locks, with a name that needs no quotes."""

    __tablename__ = "part"

    id: Mapped[int] = mapped_column(primary_key=True)


@promise(FastapiToolsets, PgToolset, lacking=LOCKS)
async def restores(stack: Stack) -> bool:
    """After a table lock, lock_timeout has its earlier value."""
    async with stack.unit() as session, table_lock(stack, session, Part):
        return await session.scalar(text("SHOW lock_timeout")) == "0"


@promise(FastapiToolsets, PgToolset, lacking=LOCKS)
async def names_blockers(stack: Stack) -> bool:
    """The error of a table lock that timed out names the session in the way."""
    with plain(stack.url) as blocker:
        pid = blocker.info.backend_pid
        with blocker.transaction():
            blocker.execute("LOCK TABLE part")
            try:
                async with stack.unit() as session, table_lock(stack, session, Part):
                    raise AssertionError("the table was locked twice")
            except Exception as error:
                return re.search(rf"\b{pid}\b", str(error)) is not None


def wait(stack: Stack, session: Any, **options: Any) -> Any:
    """The stack's wait for a change of the item."""
    if isinstance(stack, PgToolset):
        from pgtoolset import wait_for_row_change
    else:
        from fastapi_toolsets.db import wait_for_row_change
    return wait_for_row_change(session, Item, 1, **options)


WATCHING = r"wait_for_\w*(row|change)\w*|\w*RowWatcher|watch_rows?"


@promise(FastapiToolsets, PgToolset, lacking=WATCHING)
async def no_connection(stack: Stack) -> bool:
    """A wait for a row holds no connection between its looks, and sees the change."""
    create_tables(stack)
    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        task = asyncio.create_task(wait(stack, session, interval=0.2, timeout=20))
        free = 0
        for _ in range(20):
            await asyncio.sleep(0.02)
            free += stack.checked_out() == 0
        with plain(stack.url) as connection:
            connection.execute("UPDATE item SET name = 'paid'")
        return (await task).name == "paid" and free > 0


@promise(FastapiToolsets, PgToolset, lacking=WATCHING)
async def last_look(stack: Stack) -> bool:
    """A wait whose interval is longer than its timeout still sees a change."""
    create_tables(stack)
    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        task = asyncio.create_task(wait(stack, session, interval=30, timeout=2))
        await asyncio.sleep(0.5)
        with plain(stack.url) as connection:
            connection.execute("UPDATE item SET name = 'paid'")
        try:
            return (await task).name == "paid"
        except TimeoutError:
            return False


@promise(FastapiToolsets, PgToolset, lacking=WATCHING)
async def waiters(stack: Stack) -> bool:
    """A hundred waiters need one connection between them."""
    create_tables(stack)
    backends = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    backends += " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    tasks: list[asyncio.Task[Any]] = []

    async def with_watcher(connection: Any) -> int:
        from pgtoolset import RowWatcher

        async with RowWatcher(stack.engine, interval=0.1) as watcher:
            waits = (watcher.wait(Item, 1, timeout=60) for _ in range(100))
            tasks.extend(asyncio.create_task(wait) for wait in waits)
            return await most_backends(connection)

    async def each_for_itself(connection: Any) -> int:
        sessions = [AsyncSession(stack.engine) for _ in range(100)]
        waits = (wait(stack, session, interval=0.1, timeout=60) for session in sessions)
        tasks.extend(asyncio.create_task(wait) for wait in waits)
        return await most_backends(connection)

    async def most_backends(connection: Any) -> int:
        most = 0
        for _ in range(20):
            await asyncio.sleep(0.05)
            most = max(most, connection.execute(backends).fetchone()[0])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return most

    with plain(stack.url) as connection:
        if isinstance(stack, PgToolset):
            return await with_watcher(connection) == 1
        return await each_for_itself(connection) == 1


async def associate(stack: Stack, session: Any, item: Any, tags: list[Any]) -> None:
    """Add tags to an item, as the stack does it."""
    if isinstance(stack, PgToolset):
        from pgtoolset import m2m_add

        await m2m_add(session, item, Item.tags, *tags)
    elif isinstance(stack, FastapiToolsets):
        from fastapi_toolsets.db import m2m_add

        await m2m_add(session, item, Item.tags, *tags)
    else:
        item.tags.extend(tags)
        await session.flush()


@promise(*ASYNC, lacking=r"m2m_\w+|\w*many_to_many\w*")
async def without_loading(stack: Stack) -> bool:
    """Tags are added to an item whose collection was never loaded, in async code."""
    create_tables(stack)
    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        item = await session.get_one(Item, 1)
        tags = list(await session.scalars(select(Tag)))
        try:
            await associate(stack, session, item, tags)
        except SQLAlchemyError:
            return False
        return len((await session.scalars(select(item_tag.c.tag_id))).all()) == 3


@promise(*ASYNC, lacking=r"m2m_\w+|\w*many_to_many\w*")
async def never_stale(stack: Stack) -> bool:
    """A collection that was loaded before shows the added tags, or is expired."""
    create_tables(stack)
    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        loaded = select(Item).options(selectinload(Item.tags))
        item = (await session.scalars(loaded)).one()
        await associate(stack, session, item, list(await session.scalars(select(Tag))))
        return len((await session.scalars(loaded)).one().tags) == 3


@promise(*ASYNC, lacking=r"m2m_\w+|\w*many_to_many\w*")
async def any_number(stack: Stack) -> bool:
    """Twenty thousand tags are added at once."""
    create_tables(stack, rows=20_000)
    async with AsyncSession(stack.engine, expire_on_commit=False) as session:
        loaded = select(Item).options(selectinload(Item.tags))
        item = (await session.scalars(loaded)).one()
        tags = list(await session.scalars(select(Tag)))
        try:
            await associate(stack, session, item, tags)
        except SQLAlchemyError:
            return False
        return True


@promise(FastapiToolsets, PgToolset, lacking="create_worker_database|cleanup_tables")
async def worker_databases(stack: Stack) -> bool:
    """The database of a test worker is dropped after a failure in its block."""
    if isinstance(stack, PgToolset):
        from pgtoolset.testing import create_worker_database
    else:
        from fastapi_toolsets.pytest import create_worker_database
    with suppress(ZeroDivisionError):
        async with create_worker_database(
            stack.url,
            prefix="other",
            server_url=stack.url.replace("/comparison_test_db", "/postgres"),
        ):
            raise ZeroDivisionError
    with plain(stack.url) as connection:
        left = "SELECT count(*) FROM pg_database WHERE datname LIKE 'other%'"
        count = connection.execute(left).fetchone()[0]
        connection.execute("DROP DATABASE IF EXISTS other_test_db")
        return count == 0


@promise(FastapiToolsets, PgToolset, lacking="create_worker_database|cleanup_tables")
async def schemas(stack: Stack) -> bool:
    """Tables in a schema are emptied too."""
    if isinstance(stack, PgToolset):
        from pgtoolset import cleanup_tables
    else:
        from fastapi_toolsets.db.testing import cleanup_tables

    class Other(DeclarativeBase):
        metadata = MetaData(schema="shop")

    Table("till", Other.metadata, Column("id", primary_key=True))
    with plain(stack.url) as connection:
        connection.execute("CREATE SCHEMA shop; CREATE TABLE shop.till AS SELECT 1 AS id")
        try:
            async with AsyncSession(stack.engine) as session:
                await cleanup_tables(session, Other)
        except SQLAlchemyError:
            return False
        return connection.execute("SELECT count(*) FROM shop.till").fetchone() == (0,)
