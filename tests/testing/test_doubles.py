"""The doubles by themselves: the recording session, failures on demand, and what they refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Integer, Table, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import CursorResult, ScalarResult
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from pgtoolset import (
    LockTimeoutError,
    TransactionAbortedError,
    TransactionStateError,
    WaitTimeoutError,
    create_db_context,
    create_db_dependency,
    get_transaction,
    on_commit,
    run_transaction,
)
from pgtoolset.errors import NoDatabaseError
from pgtoolset.testing import (
    ManualClock,
    MemoryAssociations,
    MemoryDatabase,
    MemoryLocks,
    MemorySession,
    MemoryWatcher,
)
from pgtoolset.testing.doubles import MemoryRow
from tests.m2m import models
from tests.support import Item
from tests.transactions.plain_session import PlainManagedSession

SELECT = text("SELECT 1")


class Base(DeclarativeBase):
    pass


loose = Table(
    "doubles_loose",
    Base.metadata,
    Column("id", Integer, primary_key=True),
    Column("one", ForeignKey("doubles_one.id")),
    Column("many", ForeignKey("doubles_many.id")),
)


class Many(Base):
    __tablename__ = "doubles_many"

    id: Mapped[int] = mapped_column(primary_key=True)


class One(Base):
    __tablename__ = "doubles_one"

    id: Mapped[int] = mapped_column(primary_key=True)
    options: Mapped[Any] = mapped_column(Integer, default=0)
    many: Mapped[list[Many]] = relationship(secondary=loose)


@pytest.fixture
def database() -> MemoryDatabase:
    return MemoryDatabase()


@pytest.fixture
def session(database: MemoryDatabase) -> MemorySession:
    return database.session()


# What a double is not


def public(*classes: type[Any]) -> list[str]:
    return sorted({name for class_ in classes for name in dir(class_) if name[0] != "_"})


HAS = set(public(MemorySession))


@pytest.mark.parametrize("name", [each for each in public(AsyncSession) if each not in HAS])
def test_no_async_session(session: MemorySession, name: str) -> None:
    """Every attribute of an `AsyncSession` that a `MemorySession` lacks is the one error."""
    with pytest.raises(NoDatabaseError, match="pg_session") as caught:
        getattr(session, name)
    assert f"MemorySession.{name}" in str(caught.value)
    assert not hasattr(session, name)


def test_attributes_of_a_session() -> None:
    """The methods that a `MemorySession` shares with an `AsyncSession` are those of the protocols,
    and `execute`."""
    shared = HAS & set(public(AsyncSession))
    assert shared == {
        "begin",
        "begin_nested",
        "close",
        "commit",
        "execute",
        "in_transaction",
        "rollback",
    }


@pytest.mark.parametrize("name", public(CursorResult, ScalarResult))
async def test_no_result(session: MemorySession, name: str) -> None:
    """A recorded statement has no result: every attribute of one is the one error."""
    result = await session.execute(SELECT)
    with pytest.raises(NoDatabaseError, match="pg_session"):
        getattr(result, name)


USES: dict[str, Callable[[Any], Any]] = {
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "list": list,
    "item": lambda result: result[0],
    "in": lambda result: 1 in result,
    "aiter": aiter,
    "anext": anext,
}


@pytest.mark.parametrize("use", USES)
async def test_no_use_of_a_result(session: MemorySession, use: str) -> None:
    """Neither can it be iterated, awaited, counted, entered or taken for true."""
    result: Any = await session.execute(SELECT)
    with pytest.raises(NoDatabaseError, match="pg_session"):
        USES[use](result)
    with pytest.raises(NoDatabaseError):
        await result
    with pytest.raises(NoDatabaseError):
        with result:
            pass
    with pytest.raises(NoDatabaseError):
        async with result:
            pass


@pytest.mark.parametrize("name", public(AsyncSessionTransaction))
async def test_no_session_transaction(session: MemorySession, name: str) -> None:
    """The transaction that `begin` gives is ended by the session, and has no attribute."""
    transaction = await session.begin()
    with pytest.raises(NoDatabaseError, match="pg_session"):
        getattr(transaction, name)


CALLS: dict[str, Callable[[MemoryDatabase, Any], Any]] = {
    "lock_tables": lambda _, session: MemoryLocks().lock_tables(session, [Item]),
    "advisory_lock": lambda _, session: MemoryLocks().advisory_lock(session, "key"),
    "lock_rows": lambda _, session: MemoryLocks().lock_rows(session, Item, [1]),
    "list_lock_waits": lambda _, session: MemoryLocks().list_lock_waits(session),
    "wait_for_row_change": lambda database, session: MemoryWatcher(database).wait_for_row_change(
        session, Item, 1
    ),
    "m2m_add": lambda _, session: MemoryAssociations().m2m_add(
        session, models.Post(id=1), models.Post.tags, pks=[1]
    ),
    "m2m_remove": lambda _, session: MemoryAssociations().m2m_remove(
        session, models.Post(id=1), models.Post.tags, pks=[1]
    ),
    "m2m_set": lambda _, session: MemoryAssociations().m2m_set(
        session, models.Post(id=1), models.Post.tags, pks=[1]
    ),
    "m2m_add_many": lambda _, session: MemoryAssociations().m2m_add_many(
        session, models.Post.tags, [(1, 1)]
    ),
}


async def called(call: Any) -> Any:
    return await call if hasattr(call, "__await__") else call


@pytest.mark.parametrize("name", CALLS)
async def test_other_sessions(database: MemoryDatabase, name: str) -> None:
    """A session of another kind is the one error; an object that is not a session is a
    `TypeError`."""
    for other in (AsyncSession(), PlainManagedSession(set())):
        with pytest.raises(NoDatabaseError, match="pg_session"):
            await called(CALLS[name](database, other))
    for wrong in (object(), None, "postgresql://user:secret@host/db"):
        with pytest.raises(TypeError) as caught:
            await called(CALLS[name](database, wrong))
        assert "secret" not in str(caught.value)


async def test_rows_can_only_be_read(database: MemoryDatabase, session: MemorySession) -> None:
    """A row has the values that were put; any other attribute, and every assignment, is the one
    error."""
    database.put(Item, 1, {"name": "one"})
    database.put(Item, 2)
    locks: Any = MemoryLocks()
    row, bare = await locks.lock_rows(session, Item, [1, 2])
    assert isinstance(row, MemoryRow)
    assert (row.id, row.name) == (1, "one")
    for use in (
        lambda: bare.name,
        lambda: row.metadata,
        lambda: setattr(row, "name", "two"),
        lambda: delattr(row, "name"),
    ):
        with pytest.raises(NoDatabaseError, match="pg_session"):
            use()
    assert row.name == "one"
    assert repr(row) == "<MemoryRow of Item>"


async def test_unknown_values_are_not_watched(
    database: MemoryDatabase, session: MemorySession
) -> None:
    """A column that was not put, and an instance as baseline, are the one error: of neither is it
    known what the database has."""
    database.put(Item, 1)
    async with MemoryWatcher(database) as watcher:
        with pytest.raises(NoDatabaseError, match="name"):
            await watcher.wait(Item, 1, columns=["name"])
        with pytest.raises(NoDatabaseError, match="name"):
            watcher.changes(Item, 1, columns=[Item.name])
        with pytest.raises(NoDatabaseError, match="baseline"):
            await watcher.wait_for_row_change(session, Item, 1, baseline=Item(id=1, name="x"))
        database.put(Item, 1, {"name": "one"})
        waiting = asyncio.create_task(watcher.wait(Item, 1, columns=["name"]))
        await asyncio.sleep(0)
        database.put(Item, 1)
        with pytest.raises(NoDatabaseError, match="name"):
            await waiting


async def test_a_row_as_baseline(database: MemoryDatabase, session: MemorySession) -> None:
    """A row that a double returned is a baseline, as an instance is on PostgreSQL."""
    database.put(Item, 1, {"name": "one"})
    locks: Any = MemoryLocks()
    watcher = MemoryWatcher(database)
    [row] = await locks.lock_rows(session, Item, [1])
    await session.commit()
    with pytest.raises(WaitTimeoutError):
        await watcher.wait_for_row_change(session, Item, 1, baseline=row, timeout=0)
    database.put(Item, 1, {"name": "two"})
    changed = await watcher.wait_for_row_change(session, Item, 1, baseline=row, timeout=0)
    assert changed.name == "two"


async def test_associations_that_are_not_known(session: MemorySession) -> None:
    """Values of extra columns, a key that is not the primary key, and a duplicate that no
    constraint of the mapping forbids are the one error."""
    m2m = MemoryAssociations()
    with pytest.raises(NoDatabaseError, match="values"):
        await m2m.m2m_add(
            session, models.Box(id=1), models.Box.things, pks=[1], values={"note": "n"}
        )
    with pytest.raises(NoDatabaseError, match="primary key"):
        await m2m.m2m_add(session, models.User(id=1), models.User.groups, pks=[1])
    assert not session.in_transaction()
    assert await m2m.m2m_add(session, One(id=1), One.many, pks=[1]) == 1
    assert await m2m.m2m_add(session, One(id=1), One.many, pks=[1], ignore_conflicts=True) == 0
    with pytest.raises(NoDatabaseError, match="constraint"):
        await m2m.m2m_add(session, One(id=1), One.many, pks=[1])


async def test_instances_are_their_keys(database: MemoryDatabase, session: MemorySession) -> None:
    """An instance counts by its primary key; one without a key is a `ValueError`."""
    m2m = MemoryAssociations()
    with pytest.raises(ValueError, match="id is not set"):
        await m2m.m2m_add(session, models.Post(), models.Post.tags, pks=[1])
    database.put(models.Tag, 2)
    locks: Any = MemoryLocks()
    [tag] = await locks.lock_rows(session, models.Tag, [2])
    assert await m2m.m2m_add(session, models.Post(id=1), models.Post.tags, tag) == 1
    with pytest.raises(TypeError, match="Post"):
        await m2m.m2m_add(session, tag, models.Post.tags, pks=[1])
    await session.commit()
    assert database.associations(models.Post.tags) == [(1, 2)]
    assert database.associations(models.Tag.posts) == [(2, 1)]


@pytest.mark.parametrize("rel_attr", [models.Post.id, 1, "tags", None])
async def test_no_relationship(session: MemorySession, rel_attr: Any) -> None:
    """An attribute that is not a Many-to-Many relationship is a `TypeError` that says so."""
    with pytest.raises(TypeError, match="Many-to-Many"):
        await MemoryAssociations().m2m_add(session, models.Post(id=1), rel_attr, pks=[1])


# The recording session


async def test_the_log(database: MemoryDatabase) -> None:
    """The log has the levels and the statements of a session, in order, without values."""
    async with create_db_context(database.session)() as session:
        await session.execute(text("UPDATE item SET name = :name"), {"name": "secret"})
        async with get_transaction(session):
            await session.execute(select(Item.id).where(Item.name == "secret"))
        with pytest.raises(KeyError):
            async with get_transaction(session):
                raise KeyError
        await session.rollback()
        await session.execute(insert(Item).values(id=1).on_conflict_do_nothing())
    assert session.log == [
        "BEGIN",
        "UPDATE item SET name = :name",
        "SAVEPOINT",
        "SELECT item.id FROM item WHERE item.name = :name_1",
        "RELEASE",
        "SAVEPOINT",
        "ROLLBACK TO",
        "ROLLBACK",
        "BEGIN",
        session.log[9],
        "COMMIT",
        "CLOSE",
    ]
    assert session.log[9].startswith("INSERT INTO item (id")
    assert session.events[1].parameters == {"name": "secret"}
    assert session.events[3].statement is not None
    assert [event.what for event in database.log] == session.log


async def test_statements_without_sql(session: MemorySession) -> None:
    """A statement that only a dialect could spell is recorded; a string is refused."""
    await session.execute(select(func.count()))
    with pytest.raises(TypeError, match="statement"):
        await session.execute("SELECT 1")  # type: ignore[arg-type]
    assert session.log == ["BEGIN", "SELECT count(*) AS count_1"]


@pytest.mark.parametrize("how", ["block", "commit", "context", "dependency", "begin"])
async def test_callbacks(database: MemoryDatabase, how: str) -> None:
    """Callbacks run after every kind of commit, before control returns, and never after a
    rollback."""
    ran: list[Any] = []

    def register(session: MemorySession) -> None:
        on_commit(session, lambda: ran.append(session.log[-1]))

    session = database.session()
    if how == "block":
        async with get_transaction(session):
            register(session)
    elif how == "commit":
        await session.begin()
        register(session)
        await session.commit()
    elif how == "context":
        async with create_db_context(database.session)() as session:
            register(session)
            await session.commit()
            assert ran == ["COMMIT"]
            with pytest.raises(TransactionStateError):
                register(session)
    elif how == "dependency":
        async for session in create_db_dependency(database.session)():
            register(session)
    else:
        async with session.begin(), session.begin_nested():
            register(session)
    assert ran == ["COMMIT"]
    async with get_transaction(session):
        register(session)
        await session.rollback()
    assert ran == ["COMMIT"]


async def test_a_callback_that_fails(
    session: MemorySession, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback that raises is logged and does not stop the next."""
    ran = []
    async with get_transaction(session):
        on_commit(session, lambda: 1 / 0)
        on_commit(session, lambda: ran.append(1))
    assert ran == [1]
    assert "ZeroDivisionError" in caplog.text


async def test_begin_twice(session: MemorySession) -> None:
    """A second `begin` is refused, as by an `AsyncSession`; a savepoint begins what is missing."""
    async with session.begin_nested():
        with pytest.raises(InvalidRequestError):
            await session.begin()
    assert session.log == ["BEGIN", "SAVEPOINT", "RELEASE"]
    await session.close()
    assert not session.in_transaction()


# Failures on demand


async def test_a_failure_at_begin(database: MemoryDatabase) -> None:
    """A BEGIN that fails leaves no transaction open; explicit or with the first statement."""
    database.fail_next("BEGIN", ConnectionRefusedError, times=3)
    session = database.session()
    with pytest.raises(ConnectionRefusedError):
        async with get_transaction(session):
            raise AssertionError
    with pytest.raises(ConnectionRefusedError):
        await session.execute(SELECT)
    with pytest.raises(ConnectionRefusedError):
        async with create_db_context(database.session)():
            raise AssertionError
    assert not session.in_transaction()
    assert session.log == ["BEGIN FAILED", "BEGIN FAILED"]
    await session.execute(SELECT)


@pytest.mark.parametrize("operation", ["BEGIN", "STATEMENT", "COMMIT"])
@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
async def test_retries(database: MemoryDatabase, operation: Any, sqlstate: str) -> None:
    """`run_transaction` tries again in a new session until the failures are used up."""
    database.fail_next(operation, sqlstate, times=2)
    ran: list[int] = []

    async def work(session: MemorySession) -> int:
        await session.put(Item, session.number)
        on_commit(session, lambda: ran.append(session.number))
        return session.number

    assert await run_transaction(database.session, work) == 3
    assert [row["id"] for row in database.rows(Item)] == ran == [3]
    database.fail_next(operation, sqlstate, times=2)
    with pytest.raises(DBAPIError):
        await run_transaction(database.session, work, attempts=2)


async def test_a_failure_at_commit(database: MemoryDatabase) -> None:
    """A COMMIT that fails stores nothing and runs no callback; until a rollback the session can do
    nothing."""
    error = TimeoutError("no answer")
    database.fail_next("COMMIT", error)
    session = database.session()
    with pytest.raises(TransactionAbortedError) as caught:
        async with get_transaction(session):
            await session.put(Item, 1)
            on_commit(session, lambda: pytest.fail("ran"))
            with pytest.raises(TimeoutError):
                await session.commit()
            assert session.in_transaction()
            with pytest.raises(InvalidRequestError):
                await session.execute(SELECT)
    assert caught.value.__cause__ is error
    assert not session.in_transaction()
    assert database.rows(Item) == []
    assert session.log == ["BEGIN", "PUT Item 1", "COMMIT FAILED", "ROLLBACK"]


@pytest.mark.parametrize(
    ("sqlstate", "class_"), [("23505", IntegrityError), ("42P01", ProgrammingError)]
)
async def test_errors_of_the_database(
    database: MemoryDatabase, sqlstate: str, class_: type[DBAPIError]
) -> None:
    """A SQLSTATE is the error that SQLAlchemy raises for it; a swallowed one aborts the
    transaction. Fields that a double does not know are the one error."""
    database.fail_next("STATEMENT", sqlstate)
    with pytest.raises(TransactionAbortedError) as aborted:
        async with create_db_context(database.session)() as session:
            with pytest.raises(class_) as caught:
                await session.execute(SELECT)
            with pytest.raises(DBAPIError) as refused:
                await session.execute(SELECT)
    assert aborted.value.sqlstate == sqlstate
    assert refused.value.orig is not None
    assert refused.value.orig.sqlstate == "25P02"  # type: ignore[attr-defined]
    driver: Any = caught.value.orig
    assert (driver.sqlstate, driver.pgcode) == (sqlstate, sqlstate)
    with pytest.raises(NoDatabaseError, match="pg_session"):
        driver.constraint_name  # noqa: B018


async def test_errors_that_are_not_the_databases(database: MemoryDatabase) -> None:
    """An error that is not a `DBAPIError` aborts nothing."""
    database.fail_next("STATEMENT", OSError("of the client"))
    async with create_db_context(database.session)() as session:
        with pytest.raises(OSError, match="client"):
            await session.put(Item, 1)
        await session.put(Item, 2)
    assert [row["id"] for row in database.rows(Item)] == [2]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("ROLLBACK", "40001"), ValueError),
        (("COMMIT", "4000"), ValueError),
        (("COMMIT", "postgresql://user:secret@host/db"), ValueError),
        (("COMMIT", 40001), TypeError),
        (("COMMIT", int), TypeError),
    ],
)
def test_bad_failures(
    database: MemoryDatabase, arguments: tuple[Any, Any], error: type[Exception]
) -> None:
    """A failure that cannot happen is refused."""
    with pytest.raises(error) as caught:
        database.fail_next(*arguments)
    assert "secret" not in str(caught.value)
    for times in (0, True, 1.5):
        with pytest.raises((TypeError, ValueError), match="times"):
            database.fail_next("COMMIT", "40001", times=times)  # type: ignore[arg-type]


# Rows


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((int, 1), TypeError),
        ((Item, "one"), TypeError),
        ((Item, 2**40), ValueError),
        ((Item, None), ValueError),
        ((Item, 1, {"no such": 1}), ValueError),
        ((Item, 1, {"id": 1}), ValueError),
        ((Item, 1, [1]), TypeError),
    ],
)
async def test_bad_rows(
    database: MemoryDatabase, arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    """A row that the class cannot have is refused before a transaction begins."""
    session = database.session()
    with pytest.raises(error):
        database.put(*arguments)
    with pytest.raises(error):
        await session.put(*arguments)
    assert not session.in_transaction()


async def test_values_are_copied(database: MemoryDatabase, session: MemorySession) -> None:
    """A list inside a value is not shared with the test, another reader, or a savepoint."""
    given: dict[str, Any] = {"options": [1]}
    database.put(One, 1, given)
    given["options"].append(2)
    database.rows(One)[0]["options"].append(3)
    locks: Any = MemoryLocks()
    [row] = await locks.lock_rows(session, One, [1])
    row.options.append(4)
    assert database.rows(One) == [{"id": 1, "options": [1]}]


async def test_classes_of_one_table(database: MemoryDatabase, session: MemorySession) -> None:
    """Classes that share a table by inheritance share its rows: a lock of one is a lock of the
    other."""
    database.put(models.Taxi, 1)
    locks: Any = MemoryLocks()
    assert len(await locks.lock_rows(session, models.Car, [1])) == 1
    with pytest.raises(LockTimeoutError):
        await locks.lock_rows(database.session(), models.Taxi, [1], nowait=True)
    database.put(models.Car, 2)
    assert await locks.lock_rows(session, models.Taxi, [2]) == []


# Time and waiting


async def test_timeouts_by_a_clock() -> None:
    """With a `ManualClock` a timeout takes no time; locks are given in the order of the waiters."""
    clock = ManualClock()
    database, locks = MemoryDatabase(clock=clock), MemoryLocks()
    got: list[int] = []

    async def wait(timeout: str) -> None:
        session = database.session()
        async with locks.lock_tables(session, [Item], mode="EXCLUSIVE", timeout=timeout):
            got.append(session.number)

    holder = database.session()
    async with locks.lock_tables(holder, [Item], mode="EXCLUSIVE"):
        tasks = [asyncio.create_task(wait(timeout)) for timeout in ("5s", "1min", "1h")]
        await clock.advance(5)
        with pytest.raises(LockTimeoutError) as caught:
            await tasks[0]
        assert [blocker.pid for blocker in caught.value.blockers] == [holder.number]
        waits = await locks.list_lock_waits(database)
        assert [(each.pid, list(each.blocked_by)) for each in waits] == [(3, [1]), (4, [1, 3])]
    await asyncio.gather(*tasks[1:])
    assert got == [3, 4]
    assert await locks.list_lock_waits(holder) == []


async def test_a_deadlock(database: MemoryDatabase) -> None:
    """Two sessions that wait for each other: the second is refused, and `run_transaction` tries it
    again."""
    for number in (1, 2):
        database.put(Item, number)
    locks = MemoryLocks()
    both = asyncio.Barrier(2)
    attempts: list[int] = []

    def work(keys: list[int]) -> Any:
        async def run(session: MemorySession) -> None:
            attempts.append(session.number)
            await locks.lock_rows(session, Item, keys[:1])
            if len(attempts) <= 2:
                await both.wait()
            await locks.lock_rows(session, Item, keys[1:])

        return run_transaction(database.session, run)

    await asyncio.gather(work([1, 2]), work([2, 1]))
    assert len(attempts) == 3


async def test_a_waiter_that_is_cancelled(database: MemoryDatabase) -> None:
    """A cancelled waiter leaves no lock and no place in the queue."""
    locks = MemoryLocks()
    holder = database.session()

    async def wait() -> None:
        async with locks.advisory_lock(database.session(), "key"):
            raise AssertionError

    async with locks.advisory_lock(holder, "key"):
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await locks.list_lock_waits(database) == []
    async with locks.advisory_lock(database.session(), "key", nowait=True) as taken:
        assert taken
