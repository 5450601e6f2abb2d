"""wait_for_row_change and the session's own transaction: what it has written stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Delete, Insert, Update, delete, select, text, update
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from pgtoolset import RowDeletedError, WaitTimeoutError, get_transaction, wait_for_row_change
from pgtoolset.watch import _own
from tests.support import examples


class Base(DeclarativeBase):
    pass


class Job(Base):
    __tablename__ = "own_job"

    id: Mapped[int] = mapped_column(primary_key=True)
    attempts: Mapped[int] = mapped_column(default=0)
    status: Mapped[str] = mapped_column(default="new")
    note: Mapped[str] = mapped_column(default="")


LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


@pytest.fixture
async def jobs(engine: AsyncEngine) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text("INSERT INTO own_job VALUES (1, 0, 'new', '')"))
    yield
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


@pytest.fixture
async def session(jobs: None, engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session:
        yield session


async def done(session: AsyncSession) -> Job:
    """Wait for what holds already, as a job does that finds itself finished."""
    return await wait_for_row_change(session, Job, 1, until=lambda job: True, timeout=30)


async def by_attribute(session: AsyncSession, job: Job) -> None:
    job.attempts += 1
    await session.flush()


async def by_autoflush(session: AsyncSession, job: Job) -> None:
    job.attempts += 1
    await session.scalar(select(Job.attempts))


async def by_orm_update(session: AsyncSession, job: Job) -> None:
    await session.execute(update(Job).where(Job.id == 1).values(attempts=Job.attempts + 1))


async def by_orm_update_fetched(session: AsyncSession, job: Job) -> None:
    await session.execute(
        update(Job).where(Job.id == 1).values(attempts=1),
        execution_options={"synchronize_session": "fetch"},
    )


async def in_a_savepoint(session: AsyncSession, job: Job) -> None:
    async with get_transaction(session):
        job.attempts += 1


async def by_core(session: AsyncSession, job: Job) -> None:
    await session.execute(update(Job.__table__).values(attempts=1))  # type: ignore[arg-type]


async def by_text(session: AsyncSession, job: Job) -> None:
    await session.execute(text("UPDATE own_job SET attempts = 1"))


async def by_connection(session: AsyncSession, job: Job) -> None:
    connection = await session.connection()
    await connection.execute(text("UPDATE own_job SET attempts = 1"))


Write = Callable[[AsyncSession, Job], Awaitable[None]]
BY_ORM = [by_attribute, by_autoflush, by_orm_update, by_orm_update_fetched, in_a_savepoint]
BY_HAND = [by_core, by_text, by_connection]
WRITES = [("READ COMMITTED", write) for write in BY_ORM + BY_HAND]
WRITES += [(level, write) for level in LEVELS[1:] for write in BY_ORM]


@pytest.mark.parametrize(("level", "write"), WRITES)
async def test_written(session: AsyncSession, level: str, write: Write) -> None:
    """A row that the open transaction has written keeps what was written, and is stored so."""
    await session.connection(execution_options={"isolation_level": level})
    job = await session.get_one(Job, 1)
    await write(session, job)
    assert await done(session) is job
    assert job.attempts == 1
    assert job not in session.dirty
    job.status = "done"
    await session.commit()
    async with AsyncSession(session.bind) as fresh:
        assert (await fresh.get_one(Job, 1)).attempts == 1


async def test_written_and_forgotten(session: AsyncSession) -> None:
    """Also where the application has dropped the instance in between."""
    (await session.get_one(Job, 1)).attempts = 5
    await session.flush()
    session.expunge_all()
    assert (await done(session)).attempts == 5


async def test_written_and_expired(session: AsyncSession) -> None:
    """Expired values are loaded as the transaction has them."""
    job = await session.get_one(Job, 1)
    job.attempts = 5
    await session.flush()
    session.expire(job)
    await done(session)
    assert job.attempts == 5


async def test_written_and_pending(session: AsyncSession) -> None:
    """What is not flushed yet stays beside what is."""
    job = await session.get_one(Job, 1)
    job.attempts = 5
    await session.flush()
    job.note = "pending"
    await done(session)
    assert (job.attempts, job.note, job in session.dirty) == (5, "pending", True)


async def test_rolled_back(session: AsyncSession) -> None:
    """What a savepoint has undone is not kept."""
    job = await session.get_one(Job, 1)
    savepoint = await session.begin_nested()
    job.attempts = 5
    await session.flush()
    await savepoint.rollback()
    await done(session)
    assert job.attempts == 0


async def delete_pending(session: AsyncSession, job: Job) -> None:
    await session.delete(job)
    await session.flush()


async def delete_by_orm(session: AsyncSession, job: Job) -> None:
    await session.execute(delete(Job).where(Job.id == 1))


async def delete_in_a_savepoint(session: AsyncSession, job: Job) -> None:
    async with get_transaction(session):
        await session.delete(job)


async def change_the_key(session: AsyncSession, job: Job) -> None:
    job.id = 2
    await session.flush()


async def delete_by_text(session: AsyncSession, job: Job) -> None:
    await session.execute(text("DELETE FROM own_job"))


DELETES = [delete_pending, delete_by_orm, delete_in_a_savepoint, change_the_key]


@pytest.mark.parametrize(
    ("level", "write"),
    [(level, write) for level in LEVELS for write in DELETES] + [(LEVELS[0], delete_by_text)],
)
async def test_deleted(session: AsyncSession, level: str, write: Write) -> None:
    """A row that the open transaction has deleted is deleted, and no second object appears."""
    await session.connection(execution_options={"isolation_level": level})
    job = await session.get_one(Job, 1)
    await write(session, job)
    before = set(session.identity_map.keys())
    with pytest.raises(RowDeletedError):
        await done(session)
    assert set(session.identity_map.keys()) == before
    await session.rollback()
    assert (await session.get_one(Job, 1)).attempts == 0


@pytest.mark.parametrize("level", LEVELS)
async def test_not_written(session: AsyncSession, other: asyncpg.Connection, level: str) -> None:
    """A row that another transaction has changed is seen at each isolation level, even where the
    session's transaction has written other rows."""
    await session.connection(execution_options={"isolation_level": level})
    job = await session.get_one(Job, 1)
    session.add(Job(id=7))
    await session.flush()
    await other.execute("UPDATE own_job SET status = 'paid' WHERE id = 1")
    assert (await done(session)).status == "paid"
    assert job.status == "paid"
    await session.rollback()


async def test_a_failed_transaction(session: AsyncSession, other: asyncpg.Connection) -> None:
    """A transaction that has failed cannot be asked, and stores nothing: what is committed
    counts."""
    await session.get_one(Job, 1)
    with pytest.raises(Exception, match="division by zero"):
        await session.execute(text("SELECT 1 / 0"))
    await other.execute("UPDATE own_job SET status = 'paid'")
    assert (await done(session)).status == "paid"
    await session.rollback()


async def test_a_change_between_the_two_looks(
    session: AsyncSession, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that another transaction commits between the poll and the last look is not taken for
    the session's own: the row is the one that met the predicate."""
    await session.execute(text("SELECT 1"))
    read = _own.OwnRow.instead_of

    async def later(own: Any, *arguments: Any) -> Any:
        await other.execute("UPDATE own_job SET status = 'gone on'")
        return await read(own, *arguments)

    await other.execute("UPDATE own_job SET status = 'paid'")
    monkeypatch.setattr(_own.OwnRow, "instead_of", later)
    job = await wait_for_row_change(session, Job, 1, until=lambda job: job.status == "paid")
    assert job.status == "paid"


async def test_cancelled_at_the_last_look(
    session: AsyncSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation during the look through the session's transaction leaves that usable, and
    arrives afterwards."""
    job = await session.get_one(Job, 1)
    job.attempts = 5
    await session.flush()
    read = _own.OwnRow._read
    task: asyncio.Task[Job]

    def cancelled(own: Any, *arguments: Any) -> Any:
        asyncio.get_running_loop().call_soon(task.cancel)
        return read(own, *arguments)

    monkeypatch.setattr(_own.OwnRow, "_read", cancelled)

    async def work() -> Job:
        await done(session)
        return await asyncio.Future()

    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError):
        await task
    await session.commit()
    assert (await session.get_one(Job, 1)).attempts == 5


class Routing(Session):
    """Writes go to one engine, reads to another."""

    def __init__(self, engine: AsyncEngine, **options: Any) -> None:
        super().__init__(**options)
        self.reads = engine.sync_engine.execution_options(role="reads")
        self.writes = engine.sync_engine.execution_options(role="writes")

    def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Any:
        if self._flushing or isinstance(clause, Insert | Update | Delete):
            return self.writes
        return self.reads


@pytest.mark.usefixtures("jobs")
async def test_routed_writes(engine: AsyncEngine) -> None:
    """What was flushed over the connection for writes stays, although polls go to the readers."""
    async with AsyncSession(sync_session_class=Routing, engine=engine) as session:
        job = await session.get_one(Job, 1)
        await by_attribute(session, job)
        assert (await done(session)).attempts == 1
        await session.rollback()


# The property: whatever a transaction has done, a wait returns what the transaction's own SELECT
# would show of a row that it has written, and what is committed of any other.
STEPS = st.lists(
    st.sampled_from(["set", "flush", "update", "core", "savepoint", "rollback", "elsewhere"]),
    max_size=6,
)


@settings(
    max_examples=examples(20),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS)
async def test_property(
    jobs: None, engine: AsyncEngine, other: asyncpg.Connection, steps: list[str]
) -> None:
    """After any steps under READ COMMITTED a wait leaves the instance as a refresh would make it,
    but for what is not flushed."""
    await other.execute("UPDATE own_job SET attempts = 0, status = 'new', note = ''")
    async with AsyncSession(engine, autoflush=False) as session:
        job = await session.get_one(Job, 1)
        is_locked = False
        savepoints: list[Any] = []
        for number, step in enumerate(steps, 1):
            if step == "set":
                job.note = f"{number}"
            elif step == "flush":
                is_locked = is_locked or job in session.dirty
                await session.flush()
            elif step == "update":
                await session.execute(update(Job).values(attempts=number))
                is_locked = True
            elif step == "core":
                await session.execute(text(f"UPDATE own_job SET attempts = {number}"))
                is_locked = True
            elif step == "savepoint":
                is_locked = is_locked or job in session.dirty  # it flushes
                savepoints.append(await session.begin_nested())
            elif step == "rollback" and savepoints:
                await savepoints.pop().rollback()
            elif step == "elsewhere" and not is_locked:
                await other.execute(f"UPDATE own_job SET status = '{number}'")
        pending = job.note if job in session.dirty else None
        assert await done(session) is job
        seen = (job.attempts, job.status, job.note)
        shown = (await session.execute(select(Job.attempts, Job.status, Job.note))).one()
        assert seen == (shown.attempts, shown.status, shown.note if pending is None else pending)
        await session.rollback()


@pytest.mark.parametrize(
    ("error", "is_hidden"),
    [
        (OSError("the server is away"), True),
        (TimeoutError("the pool is exhausted"), True),
        (PendingRollbackError("the connection is lost"), True),
        (asyncpg.TooManyConnectionsError("no slot is left"), True),
        (WaitTimeoutError("out of time"), True),
        (AttributeError("a fault of the program"), False),
        (KeyError("a fault of the program"), False),
    ],
)
async def test_second_look_that_fails(error: Exception, is_hidden: bool) -> None:
    """A second look that the database fails keeps the session's own row; other errors propagate."""

    async def look_again() -> Any:
        raise error

    if is_hidden:
        assert await _own._is_still(Job(id=1), look_again)
    else:
        with pytest.raises(type(error)):
            await _own._is_still(Job(id=1), look_again)
