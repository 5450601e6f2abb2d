"""wait_for_row_change: what it sees, what it leaves alone, and when it gives up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, ClassVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import ForeignKey, MetaData, String, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.orm.exc import StaleDataError

from pgtoolset import RowDeletedError, RowNotFoundError, WaitTimeoutError, wait_for_row_change
from pgtoolset.watch import _polls, conditions
from tests.proxy import Proxy
from tests.support import Account, Item, interrupt_everywhere, until


class Base(DeclarativeBase):
    metadata = MetaData(schema="waiting room")


class Owner(Base):
    __tablename__ = "owner"

    id: Mapped[int] = mapped_column(primary_key=True)


class Animal(Base):
    __tablename__ = "animal"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str]
    label: Mapped[str] = mapped_column("name of it")
    owner_id: Mapped[int | None] = mapped_column(ForeignKey(Owner.id))
    owner: Mapped[Owner | None] = relationship(lazy="raise")
    notes: Mapped[str] = mapped_column(default="", deferred=True)
    __mapper_args__: ClassVar = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    __tablename__ = "dog"

    id: Mapped[UUID] = mapped_column(ForeignKey(Animal.id), primary_key=True)
    tricks: Mapped[int] = mapped_column(default=0)
    __mapper_args__: ClassVar = {"polymorphic_identity": "dog"}


class Seat(Base):
    __tablename__ = "seat"

    row: Mapped[str] = mapped_column(String(2), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    taken: Mapped[bool] = mapped_column(default=False)
    version: Mapped[int] = mapped_column(default=1)
    __mapper_args__: ClassVar = {"version_id_col": version}


@pytest.fixture
async def room(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    async with engine.begin() as connection:
        await connection.execute(text('CREATE SCHEMA "waiting room"'))
        await connection.run_sync(Base.metadata.create_all)
    try:
        yield engine
    finally:
        async with engine.begin() as connection:
            await connection.execute(text('DROP SCHEMA "waiting room" CASCADE'))


@pytest.fixture
async def session(
    room: AsyncEngine, session_maker: async_sessionmaker[AsyncSession]
) -> AsyncIterator[AsyncSession]:
    """Closed before the schema is dropped, which would wait for it."""
    async with session_maker() as session:
        yield session


@asynccontextmanager
async def later(
    other: asyncpg.Connection, *statements: str, seconds: float = 0.1, waiters: int = 1
) -> AsyncIterator[None]:
    """Run statements on another connection, a while after the first polls of the block."""
    looked: set[int] = set()
    is_met = conditions.Condition.is_met

    def counted(condition: conditions.Condition, row: Any) -> bool:
        looked.add(id(condition))
        return is_met(condition, row)

    async def run() -> None:
        # Before the first look nobody knows what there was, and a change is none.
        await until(lambda: len(looked) >= waiters)
        await asyncio.sleep(seconds)
        for statement in statements:
            await other.execute(statement)

    task = asyncio.create_task(run())
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conditions.Condition, "is_met", counted)
            yield
    finally:
        await task


async def test_returns_the_row(
    engine: AsyncEngine, session: AsyncSession, other: asyncpg.Connection
) -> None:
    """The new row comes as an instance in the caller's session, and no connection is kept."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with later(other, "UPDATE item SET name = 'paid'"):
        item = await wait_for_row_change(
            session=session, model=Item, pk_value=1, columns=[Item.name], interval=0.02, timeout=30
        )
    assert item.name == "paid"
    assert item in session
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert not session.dirty


async def test_the_instance_of_the_session(
    session: AsyncSession, other: asyncpg.Connection
) -> None:
    """An instance that the session has is the one that is returned, expired or not."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    item = await session.get(Item, 1)
    assert item is not None
    await session.rollback()  # has expired it
    async with later(other, "UPDATE item SET name = 'paid'"):
        assert (
            await wait_for_row_change(session, Item, {"id": 1}, interval=0.02, timeout=30) is item
        )
    assert item.name == "paid"


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_sees_through_every_isolation_level(
    session: AsyncSession, other: asyncpg.Connection, level: Any
) -> None:
    """A snapshot of the caller's does not hide the change, and is not given up for it."""
    await other.execute("INSERT INTO item VALUES (1, 'new'), (2, 'kept')")
    await session.connection(execution_options={"isolation_level": level})
    item = await session.get(Item, 1)
    await session.execute(text("UPDATE item SET name = 'mine' WHERE id = 2"))
    async with later(other, "UPDATE item SET name = 'paid' WHERE id = 1"):
        changed = await wait_for_row_change(session, Item, 1, interval=0.02, timeout=30)
    assert changed is item
    assert changed.name == "paid"
    stored = await session.scalar(text("SELECT name FROM item WHERE id = 1"))
    assert stored == ("paid" if level == "READ COMMITTED" else "new")
    assert await session.scalar(text("SELECT name FROM item WHERE id = 2")) == "mine"
    await session.commit()


async def test_pending_work_is_kept(
    session: AsyncSession, room: AsyncEngine, other: asyncpg.Connection
) -> None:
    """Unflushed changes of the row, new and deleted objects are as they were; the rest of the row
    is fresh."""
    await other.execute("INSERT INTO account VALUES (1, 10)")
    id_ = uuid4()
    await other.execute('INSERT INTO "waiting room".owner VALUES (1), (2)')
    await other.execute(
        "INSERT INTO \"waiting room\".animal VALUES ($1, 'animal', 'a', 1, '')", id_
    )
    animal = await session.get(Animal, id_)
    account = await session.get(Account, 1)
    assert animal is not None
    assert account is not None
    animal.label = "pending"
    session.add(Item(id=5))
    await session.delete(account)
    async with later(other, 'UPDATE "waiting room".animal SET "name of it" = \'b\', owner_id = 2'):
        assert await wait_for_row_change(session, Animal, id_, interval=0.02, timeout=30) is animal
    assert (animal.label, animal.owner_id) == ("pending", 2)
    assert set(session.dirty) == {animal}
    assert len(session.new) == 1
    assert account in session.deleted
    await session.commit()
    assert await other.fetchval('SELECT "name of it" FROM "waiting room".animal') == "pending"


async def test_flushed_work_is_no_change(session: AsyncSession, other: asyncpg.Connection) -> None:
    """What the session has flushed and not committed neither ends the wait nor hides the row."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    item = await session.get(Item, 1)
    assert item is not None
    item.name = "mine"
    await session.flush()
    with pytest.raises(WaitTimeoutError):
        await wait_for_row_change(session, Item, 1, interval=0.02, timeout=0.1)
    assert item.name == "mine"
    await session.commit()
    assert await other.fetchval("SELECT name FROM item") == "mine"


async def test_a_stale_version_stays_stale(
    session: AsyncSession, room: AsyncEngine, other: asyncpg.Connection
) -> None:
    """What is pending on an old version of the row still meets the optimistic lock when it is
    flushed."""
    await other.execute("INSERT INTO \"waiting room\".seat VALUES ('A', 1, false, 1)")
    seat = await session.get(Seat, ("A", 1))
    assert seat is not None
    seat.taken = True
    async with later(other, 'UPDATE "waiting room".seat SET version = 2'):
        await wait_for_row_change(session, Seat, ("A", 1), interval=0.02, timeout=30)
    with pytest.raises(StaleDataError):
        await session.flush()
    await session.rollback()


async def test_loaded_relationships_do_not_lie(
    session: AsyncSession, room: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A loaded many-to-one whose key has changed is expired; one whose key has not is left
    alone."""
    id_ = uuid4()
    await other.execute('INSERT INTO "waiting room".owner VALUES (1), (2)')
    await other.execute(
        "INSERT INTO \"waiting room\".animal VALUES ($1, 'animal', 'a', 1, '')", id_
    )
    animal = await session.get(Animal, id_)
    assert animal is not None
    await session.refresh(animal, ["owner"])
    async with later(other, 'UPDATE "waiting room".animal SET "name of it" = \'b\''):
        await wait_for_row_change(session, Animal, id_, interval=0.02, timeout=30)
    assert "owner" in vars(animal)
    async with later(other, 'UPDATE "waiting room".animal SET owner_id = 2'):
        await wait_for_row_change(session, Animal, id_, interval=0.02, timeout=30)
    assert "owner" not in vars(animal)
    await session.refresh(animal, ["owner"])
    assert animal.owner is not None
    assert animal.owner.id == 2


async def test_inheritance_and_deferred_columns(
    session: AsyncSession, room: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A row of a subclass comes as one; columns of either table, and deferred ones, are watched."""
    id_ = uuid4()
    await other.execute(
        "INSERT INTO \"waiting room\".animal VALUES ($1, 'dog', 'a', NULL, '')", id_
    )
    await other.execute('INSERT INTO "waiting room".dog VALUES ($1, 0)', id_)
    async with later(other, 'UPDATE "waiting room".dog SET tricks = 3'):
        dog = await wait_for_row_change(
            session, Dog, str(id_), columns=["tricks"], interval=0.02, timeout=30
        )
    assert dog.tricks == 3
    async with later(other, "UPDATE \"waiting room\".animal SET notes = 'loud'"):
        same = await wait_for_row_change(
            session, Animal, id_, columns=[Animal.notes], interval=0.02, timeout=30
        )
    assert same is dog
    assert dog.notes == "loud"


async def test_other_columns_do_not_count(
    session: AsyncSession, room: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A change of a column that is not watched does not end the wait."""
    await other.execute("INSERT INTO \"waiting room\".seat VALUES ('A', 1, false, 1)")
    async with later(other, 'UPDATE "waiting room".seat SET version = 2', seconds=0.05):
        with pytest.raises(WaitTimeoutError):
            await wait_for_row_change(
                session, Seat, ("A", 1), columns=[Seat.taken], interval=0.02, timeout=0.3
            )


async def test_baseline(session: AsyncSession, other: asyncpg.Connection) -> None:
    """A change between reading and waiting is returned at once, for an instance and for a
    mapping."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    item = await session.get(Item, 1)
    await session.commit()
    await other.execute("UPDATE item SET name = 'paid'")
    start = time.monotonic()
    changed = await wait_for_row_change(session, Item, 1, baseline=item, interval=5, timeout=9)
    assert changed.name == "paid"
    await wait_for_row_change(session, Item, 1, baseline={"name": "new"}, interval=5, timeout=9)
    assert time.monotonic() - start < 4
    changed.name = "unflushed"
    with pytest.raises(WaitTimeoutError):  # what the database had is what was seen
        await wait_for_row_change(session, Item, 1, baseline=changed, interval=5, timeout=0)
    await session.rollback()


async def test_until(session: AsyncSession, other: asyncpg.Connection) -> None:
    """With a predicate only a row for which it holds ends the wait, at once where it does
    already."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    start = time.monotonic()
    await wait_for_row_change(session, Item, 1, until=lambda item: item.name == "new", interval=5)
    assert time.monotonic() - start < 4
    async with later(
        other,
        "UPDATE item SET name = 'sent'",
        "SELECT pg_sleep(0.1)",
        "UPDATE item SET name = 'paid'",
    ):
        item = await wait_for_row_change(
            session, Item, 1, until=lambda item: item.name == "paid", interval=0.02, timeout=30
        )
    assert item.name == "paid"


async def test_missing_and_deleted(session: AsyncSession, other: asyncpg.Connection) -> None:
    """No row is a RowNotFoundError; one that was there, or that the caller has seen, a
    RowDeletedError."""
    with pytest.raises(RowNotFoundError) as missing:
        await wait_for_row_change(session, Item, 1, timeout=1)
    assert not isinstance(missing.value, RowDeletedError)
    with pytest.raises(RowDeletedError):
        await wait_for_row_change(session, Item, 1, baseline={"name": "seen"}, timeout=1)
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with later(other, "DELETE FROM item"):
        with pytest.raises(RowDeletedError):
            await wait_for_row_change(session, Item, 1, interval=0.02, timeout=30)


async def test_last_poll_at_the_deadline(session: AsyncSession, other: asyncpg.Connection) -> None:
    """An interval longer than the timeout still detects, when the time is up and not before or long
    after."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    start = time.monotonic()
    async with later(other, "UPDATE item SET name = 'paid'"):
        await wait_for_row_change(
            session, Item, 1, interval=timedelta(seconds=60), timeout=timedelta(seconds=0.4)
        )
    assert 0.4 <= time.monotonic() - start < 3


async def test_holds_no_connection_while_it_sleeps(
    engine: AsyncEngine, session: AsyncSession, other: asyncpg.Connection
) -> None:
    """Between polls the pool has every connection: more waiters than connections are served."""
    await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(1, 40) AS n")
    sessions = [AsyncSession(engine) for _ in range(40)]
    try:
        async with later(other, "UPDATE item SET name = 'paid'", waiters=40):
            tasks = [
                asyncio.create_task(
                    wait_for_row_change(each, Item, number, interval=0.3, timeout=60)
                )
                for number, each in enumerate(sessions, 1)
            ]
            await until(lambda: engine.pool.checkedout() == 0)  # type: ignore[attr-defined]
            items = await asyncio.gather(*tasks)
        assert {item.name for item in items} == {"paid"}
    finally:
        for each in sessions:
            await each.close()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("patience", [0.05, 10])
async def test_pool_of_one(
    database_url: str, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """A caller that holds the only connection gets the error of the pool, after its timeout."""
    monkeypatch.setattr(_polls, "STATEMENT_TIMEOUT", patience)
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=0.2)
    try:
        async with AsyncSession(engine) as session:
            await session.get(Item, 1)
            with pytest.raises(PoolTimeoutError):
                await wait_for_row_change(session, Item, 1, interval=0.02)
            await session.rollback()
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(session, Item, 1, interval=0.02, timeout=0.1)
    finally:
        await engine.dispose()


async def test_single_connection(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """A session bound to one connection polls over it, and leaves its transaction as it was."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with engine.connect() as connection:
        async with AsyncSession(connection) as session:
            async with later(other, "UPDATE item SET name = 'paid'"):
                item = await wait_for_row_change(session, Item, 1, interval=0.02, timeout=30)
            assert item.name == "paid"
            assert not connection.in_transaction()
            await session.execute(text("INSERT INTO item VALUES (2, 'mine')"))
            async with later(other, "UPDATE item SET name = 'sent' WHERE id = 1"):
                item = await wait_for_row_change(session, Item, 1, interval=0.02, timeout=30)
            assert item.name == "sent"
            assert await other.fetchval("SELECT count(*) FROM item") == 1
            await session.commit()
    assert await other.fetchval("SELECT count(*) FROM item") == 2


@pytest.mark.usefixtures("engine")
async def test_lost_connections_are_replaced(database_url: str, other: asyncpg.Connection) -> None:
    """A network that is cut, refuses or freezes between polls delays the answer only."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(proxy.url)
        try:
            async with AsyncSession(engine) as session:
                task = asyncio.create_task(
                    wait_for_row_change(session, Item, 1, interval=0.05, timeout=60)
                )
                # It has looked: the first connection of an engine also initializes its dialect.
                await until(lambda: engine.pool.checkedin() == 1)  # type: ignore[attr-defined]
                proxy.drop()
                proxy.refusing = True
                await asyncio.sleep(0.3)
                await other.execute("UPDATE item SET name = 'paid'")
                await asyncio.sleep(0.1)
                assert not task.done()
                proxy.refusing = False
                assert (await task).name == "paid"
        finally:
            await engine.dispose()


@pytest.mark.usefixtures("engine")
async def test_a_silent_network(
    database_url: str, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll without an answer is given up, and so is a connection that never opens."""
    monkeypatch.setattr(_polls, "STATEMENT_TIMEOUT", 0.3)
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(proxy.url, pool_timeout=0.3)
        try:
            async with AsyncSession(engine) as session:
                task = asyncio.create_task(
                    wait_for_row_change(session, Item, 1, interval=0.02, timeout=60)
                )
                await until(lambda: engine.pool.checkedin() == 1)  # type: ignore[attr-defined]
                connections = proxy.accepted
                proxy.frozen = True
                await other.execute("UPDATE item SET name = 'paid'")
                await until(lambda: proxy.accepted > connections)
                proxy.frozen = False
                async with asyncio.timeout(20):
                    assert (await task).name == "paid"
        finally:
            await engine.dispose()


@pytest.mark.usefixtures("engine")
async def test_lost_until_the_deadline(database_url: str, other: asyncpg.Connection) -> None:
    """Where no connection comes back the wait ends in time, and says why."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with Proxy.to(database_url) as proxy:
        proxy.refusing = True
        engine = create_async_engine(proxy.url)
        try:
            async with AsyncSession(engine) as session:
                start = time.monotonic()
                with pytest.raises(WaitTimeoutError, match="no connection"):
                    await wait_for_row_change(session, Item, 1, interval=0.05, timeout=0.3)
                assert 0.3 <= time.monotonic() - start < 5
        finally:
            await engine.dispose()


async def test_cancelled_everywhere(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """A cancellation at any suspension ends the wait and leaves no connection checked out or
    open."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    # Not on the engine's very first connection: older SQLAlchemys strand one whose `connect` event
    # is cancelled, and the first one's asks the server for its version.
    # https://github.com/sqlalchemy/sqlalchemy/issues/13548
    async with engine.connect():
        pass

    async def work(n: int) -> None:
        async with AsyncSession(engine) as session:
            with pytest.raises(WaitTimeoutError):
                await wait_for_row_change(session, Item, 1, interval=0.01, timeout=0.02)

    async def check(n: int) -> None:
        await until(lambda: engine.pool.checkedout() == 0)  # type: ignore[attr-defined]

    assert await interrupt_everywhere(work, check) > 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"interval": 0}, ValueError),
        ({"interval": float("nan")}, ValueError),
        ({"interval": "1"}, ValueError),
        ({"interval": True}, TypeError),
        ({"timeout": -1}, ValueError),
        ({"timeout": float("inf")}, ValueError),
        ({"columns": []}, ValueError),
        ({"columns": "name"}, TypeError),
        ({"columns": [Item.name, "nome"]}, ValueError),
        ({"columns": [Account.balance]}, ValueError),
        ({"columns": [3]}, TypeError),
        ({"model": object}, TypeError),
        ({"model": Item(id=1)}, TypeError),
        ({"pk_value": None}, ValueError),
        ({"pk_value": (1, 2)}, ValueError),
        ({"pk_value": {"key": 1}}, ValueError),
        ({"pk_value": "1"}, TypeError),
        ({"pk_value": True}, TypeError),
        ({"pk_value": 2**31}, ValueError),
        ({"model": Animal, "pk_value": "no uuid"}, ValueError),
        ({"model": Seat, "pk_value": "A"}, TypeError),
        ({"model": Seat, "pk_value": ("A\x00", 1)}, ValueError),
        ({"until": 3}, TypeError),
        ({"baseline": 3}, TypeError),
        ({"baseline": {"nome": 1}}, ValueError),
        ({"baseline": {}}, ValueError),
        ({"session": object()}, TypeError),
    ],
)
async def test_bad_arguments(
    session: AsyncSession, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """A bad interval, timeout, column, key, predicate or baseline is an error before any SQL."""
    given = {"session": session, "model": Item, "pk_value": 1, **arguments}
    with pytest.raises(error):
        await wait_for_row_change(**given)
    assert not session.in_transaction()
