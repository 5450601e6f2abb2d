"""RowWatcher.wait with `until` and `baseline`: what ends the wait, and what the change shows."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, ClassVar

import asyncpg
import pytest
from sqlalchemy import ForeignKey
from sqlalchemy import inspect as inspect_instance
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgtoolset import RowNotFoundError, RowWatcher, WaitTimeoutError, wait_for_row_change
from pgtoolset.watch import _known_rows
from tests.support import Account, Item, until

pytestmark = pytest.mark.asyncpg(reason="RowWatcher")


class Base(DeclarativeBase):
    pass


class Animal(Base):
    __tablename__ = "condition_animal"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str] = mapped_column(default="")
    __mapper_args__: ClassVar = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    __tablename__ = "condition_dog"

    id: Mapped[int] = mapped_column(ForeignKey(Animal.id), primary_key=True)
    tricks: Mapped[int] = mapped_column(default=0)
    __mapper_args__: ClassVar = {"polymorphic_identity": "dog"}


@pytest.fixture(params=[_known_rows.FETCHED_ROWS, 0], ids=["fetched", "as text"])
async def watcher(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[RowWatcher]:
    """A watcher that fetches every row at every tick, and one that compares snapshots."""
    monkeypatch.setattr(_known_rows, "FETCHED_ROWS", request.param)
    async with RowWatcher(engine, interval=timedelta(milliseconds=20)) as watcher:
        yield watcher


async def started(watcher: RowWatcher, wait: Any) -> asyncio.Task[Any]:
    """Begin a wait, and return when its first tick is over."""
    task = asyncio.create_task(wait)
    await asyncio.sleep(0)
    hub: Any = watcher._hub
    await until(lambda: not any(group._members.joining for group in hub._groups.all()))
    return task


async def test_a_change_between_reading_and_waiting(
    watcher: RowWatcher, engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A change since an instance or a mapping was read is returned at once."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with AsyncSession(engine) as session:
        item = await session.get_one(Item, 1)
        await session.commit()
        await session.refresh(item)
    await other.execute("UPDATE item SET name = 'paid'")
    for baseline in (item, {"name": "new"}):
        change = await watcher.wait(Item, 1, timeout="20s", baseline=baseline)
        assert (change.kind, change.before) == ("update", {"id": 1, "name": "new"})
        assert change.after == {"id": 1, "name": "paid"}


async def test_no_change_since_the_baseline(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """A row as it was seen ends nothing; the next change does."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    with pytest.raises(WaitTimeoutError):
        await watcher.wait(Item, 1, timeout="50ms", baseline={"name": "new"})
    task = await started(watcher, watcher.wait(Item, 1, timeout=20, baseline={"name": "new"}))
    await other.execute("UPDATE item SET name = 'paid'")
    assert (await task).after == {"id": 1, "name": "paid"}


async def test_a_deletion_since_the_baseline(
    watcher: RowWatcher, other: asyncpg.Connection
) -> None:
    """A row that was seen and is gone is a deletion; without a baseline there was no row."""
    change = await watcher.wait(Item, 1, timeout=20, baseline={"name": "seen"})
    assert (change.kind, change.before, change.after) == ("delete", {"name": "seen"}, None)
    with pytest.raises(RowNotFoundError):
        await watcher.wait(Item, 1, timeout=20)


async def test_until(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """Only a row for which the predicate holds ends the wait, and it sees columns not watched."""
    await other.execute("INSERT INTO account VALUES (1, 0)")
    seen: list[int] = []

    def rich(account: Account) -> bool:
        seen.append(account.balance)
        assert inspect_instance(account).detached
        return account.balance >= 20

    wait = watcher.wait(Account, 1, columns=[Account.id], timeout=20, until=rich)
    task = await started(watcher, wait)
    for balance in (10, 20):
        await other.execute("UPDATE account SET balance = $1", balance)
        await until(lambda balance=balance: balance in seen)  # type: ignore[misc]
    change = await task
    assert (change.kind, change.before, change.after) == ("update", {"id": 1}, {"id": 1})
    assert seen == [0, 10, 20]


async def test_until_holds_already(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """A predicate that holds at the first tick ends the wait at once, whatever the baseline."""
    await other.execute("INSERT INTO item VALUES (1, 'paid')")
    change = await watcher.wait(
        Item, 1, timeout=20, until=lambda item: item.name == "paid", baseline={"name": "paid"}
    )
    assert change.before == change.after == {"id": 1, "name": "paid"}
    with pytest.raises(WaitTimeoutError):
        await watcher.wait(
            Item, 1, timeout=0.05, until=lambda item: False, baseline={"name": "other"}
        )


async def test_a_deletion_ends_every_wait(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """A deletion is a change, and no predicate is asked about it."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    wait = watcher.wait(Item, 1, timeout=20, until=lambda item: item.name == "paid")
    task = await started(watcher, wait)
    await other.execute("DELETE FROM item")
    assert (await task).kind == "delete"


async def test_predicates_that_fail(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """An error of a predicate ends its own wait alone, whatever it is."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")

    def raising(error: BaseException) -> Any:
        def predicate(item: Item) -> bool:
            raise error

        return predicate

    sound = await started(watcher, watcher.wait(Item, 1, timeout=20))
    for error, expected in (
        (ZeroDivisionError("mine"), ZeroDivisionError),
        (asyncio.CancelledError(), asyncio.CancelledError),
        (StopIteration(), RuntimeError),
    ):
        with pytest.raises(expected):
            await watcher.wait(Item, 1, timeout=20, until=raising(error))
    await other.execute("UPDATE item SET name = 'paid'")
    assert (await sound).kind == "update"


async def test_the_context_of_the_caller(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """A predicate sees the context variables of the waiter, and not those of the watcher."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="")
    tenant.set("mine")
    assert await watcher.wait(Item, 1, timeout=20, until=lambda _: tenant.get() == "mine")


async def test_a_row_of_a_subclass(
    watcher: RowWatcher, engine: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A predicate receives an instance of the subclass that the row is of."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    try:
        await other.execute("INSERT INTO condition_animal VALUES (1, 'dog', 'Rex')")
        await other.execute("INSERT INTO condition_dog VALUES (1, 3)")
        for model in (Animal, Dog):
            assert await watcher.wait(
                model, 1, timeout=20, until=lambda row: type(row) is Dog and row.name == "Rex"
            )
        assert await watcher.wait(Dog, 1, timeout=20, until=lambda dog: dog.tricks == 3)
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"until": 3}, TypeError, "until"),
        ({"until": asyncio.sleep}, TypeError, "until"),
        ({"baseline": 3}, TypeError, "baseline"),
        ({"baseline": Account(id=1)}, TypeError, "baseline"),
        ({"baseline": {"nome": 1}}, ValueError, "baseline"),
        ({"baseline": {}}, ValueError, "baseline"),
        ({"baseline": {"id": 1}, "columns": ["name"]}, ValueError, "baseline"),
        ({"timeout": "soon"}, ValueError, "timeout"),
        ({"timeout": -1}, ValueError, "timeout"),
        ({"pk_value": 1.5}, TypeError, "pk_value"),
        ({"pk_value": True}, TypeError, "pk_value"),
        ({"pk_value": 2**40}, ValueError, "pk_value"),
        ({"columns": "name"}, TypeError, "columns"),
        ({"model": Account(id=1)}, TypeError, "model"),
    ],
)
async def test_bad_arguments(
    engine: AsyncEngine, arguments: dict[str, Any], error: type[Exception], name: str
) -> None:
    """A wrong argument of either way to wait is named, before any SQL."""
    given = {"model": Item, "pk_value": 1, **arguments}
    watcher = RowWatcher(engine)  # not entered, so it could send nothing
    with pytest.raises(error, match=f"^{name}"):
        await watcher.wait(**given)
    async with AsyncSession(engine) as session:
        with pytest.raises(error, match=f"^{name}"):
            await wait_for_row_change(session, **given)
    assert engine.pool.checkedin() == 0  # type: ignore[attr-defined]
