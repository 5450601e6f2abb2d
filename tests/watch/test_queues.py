"""Crowds of waiters: the order of their polls, and what they leave to the pool."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import JSON, String, TypeDecorator, event
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, registry
from sqlalchemy.pool import NullPool, StaticPool
from sqlalchemy.util import await_only

from pgtoolset import RowDeletedError, RowNotFoundError, WaitTimeoutError, wait_for_row_change
from pgtoolset.watch import _batches, _queues
from tests.pgbouncer import WITHOUT_CACHES
from tests.support import Account, Item, at_best, examples, interrupt_everywhere, plain_url, until
from tests.watch.crowd import Polls, every_connection, queued, shares_of, small

pytestmark = pytest.mark.usefixtures("engine")


#: As an engine is made for a pooler of transactions, where each look is a transaction.
POOLER = {"connect_args": WITHOUT_CACHES}


class Base(DeclarativeBase):
    pass


class Picky(TypeDecorator[str]):
    impl = String
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        if value == "bad":
            raise ZeroDivisionError(value)
        return value


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[Any] = mapped_column(JSON, nullable=True)
    text: Mapped[str] = mapped_column(Picky, default="")


@pytest.fixture
async def notes(engine: AsyncEngine) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    try:
        yield
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)


async def paid(engine: AsyncEngine, key: int, model: Any = Item, **options: Any) -> str:
    """Wait in a session of one's own until the name is another than the empty one."""
    async with AsyncSession(engine) as session:
        given: dict[str, Any] = {
            "baseline": {"name": ""},
            "interval": 0.05,
            "timeout": 60,
            **options,
        }
        name: str = (await wait_for_row_change(session, model, key, **given)).name
        return name


def models(count: int) -> list[Any]:
    """Classes that are mapped to the one table, and each waited for in a line of its own."""
    return [
        type(f"Item{n}", (registry().generate_base(),), {"__table__": Item.__table__})
        for n in range(count)
    ]


async def items(other: asyncpg.Connection, count: int) -> None:
    await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(1, $1) AS n", count)


@pytest.mark.parametrize(("size", "users"), [(1, 1), (2, 1), (2, 4)])
async def test_a_crowd_and_somebody_else(
    database_url: str, other: asyncpg.Connection, size: int, users: int
) -> None:
    """Hundreds of waiters see their changes; other users of the pool wait for two polls."""
    await items(other, 400)
    async with small(database_url, size) as engine:
        polls = Polls(engine)
        tasks = [asyncio.create_task(paid(engine, key)) for key in range(1, 401)]
        await until(lambda: len(polls.sizes) > 2)
        waited: list[int] = []

        async def somebody_else() -> None:
            for _ in range(10):
                asked = len(polls.turns)
                async with engine.connect():
                    waited.append(len(polls.turns) - asked - 1)  # one was its own
                    await asyncio.sleep(0)
                await asyncio.sleep(0.02)

        async with asyncio.timeout(60):
            await asyncio.gather(*(somebody_else() for _ in range(users)))
            # Two polls, and of each other user the turn before and the one after.
            assert max(waited) <= 2 + 2 * (users - 1)
            assert not any(task.done() for task in tasks)
            await other.execute("UPDATE item SET name = 'paid'")
            assert set(await asyncio.gather(*tasks)) == {"paid"}


async def test_who_waits_for_the_pool_comes_first(
    database_url: str, other: asyncpg.Connection
) -> None:
    """A connection that a poll returns goes to a user of the pool before the next poll."""
    await items(other, 1)
    one, two = models(2)
    async with small(database_url, 1) as engine:
        served: list[str] = []
        tasks: list[asyncio.Task[str]] = []

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def slow(*_: Any) -> None:
            served.append("poll")
            await_only(asyncio.sleep(0.1))

        @event.listens_for(engine.sync_engine, "checkin")
        def due(*_: Any) -> None:
            if len(tasks) == 1:
                tasks.append(asyncio.create_task(paid(engine, 1, two)))

        tasks.append(asyncio.create_task(paid(engine, 1, one)))
        await until(lambda: len(served) == 1)
        async with engine.connect():
            served.append("somebody else")
        await other.execute("UPDATE item SET name = 'paid'")
        assert set(await asyncio.gather(*tasks)) == {"paid"}
        assert served[:3] == ["poll", "somebody else", "poll"]


async def test_half_of_the_pool(database_url: str, other: asyncpg.Connection) -> None:
    """However many models are waited for, polls have half of the pool's connections at most."""
    await items(other, 1)
    async with small(database_url, 4) as engine:
        most = 0

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def slow(*_: Any) -> None:
            nonlocal most
            most = max(most, engine.pool.checkedout())  # type: ignore[attr-defined]
            await_only(asyncio.sleep(0.01))

        tasks = [asyncio.create_task(paid(engine, 1, model, interval=0.01)) for model in models(12)]
        await asyncio.sleep(0.3)
        await other.execute("UPDATE item SET name = 'paid'")
        assert set(await asyncio.gather(*tasks)) == {"paid"}
        assert most == 2


async def test_one_statement_for_many(database_url: str, other: asyncpg.Connection) -> None:
    """Waiters for rows of one model share statements, a few times in an interval."""
    await items(other, 300)
    async with small(database_url, 2) as engine:
        tasks = []
        for key in range(1, 301):  # whenever they have begun
            tasks.append(asyncio.create_task(paid(engine, key, interval=0.5)))
            await asyncio.sleep(0.003)
        polls = Polls(engine)
        start = time.monotonic()
        await asyncio.sleep(2.5)
        await other.execute("UPDATE item SET name = 'paid'")
        assert set(await asyncio.gather(*tasks)) == {"paid"}
        intervals = 1 + (time.monotonic() - start) / 0.5
        assert len(polls.sizes) <= 3 * _queues.POLL_TIMES * intervals


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_a_pool_that_is_exhausted(
    database_url: str, other: asyncpg.Connection, in_transaction: bool
) -> None:
    """The pool's timeout does not end a wait; a session that has begun and holds no connection is
    in nobody's way."""
    await items(other, 20)

    async def wait(key: int) -> str:
        async with AsyncSession(engine) as session:
            if in_transaction:
                await session.begin()
            options: Any = {"baseline": {"name": ""}, "interval": 0.02, "timeout": 60}
            return (await wait_for_row_change(session, Item, key, **options)).name

    async with small(database_url, 1, pool_timeout=0.1) as engine:
        async with every_connection(engine):
            tasks = [asyncio.create_task(wait(key)) for key in range(1, 21)]
            await asyncio.sleep(0.5)
            assert not any(task.done() for task in tasks)
        await other.execute("UPDATE item SET name = 'paid'")
        assert set(await asyncio.gather(*tasks)) == {"paid"}


@pytest.mark.parametrize("model", [Item, Account])
async def test_a_session_that_holds_the_last_connection(
    database_url: str, other: asyncpg.Connection, model: Any
) -> None:
    """A session that holds the last connection gets the error of the pool, in any queue."""
    await items(other, 80)
    await other.execute("INSERT INTO account VALUES (1, 0)")
    async with small(database_url, 1, pool_timeout=0.2) as engine, AsyncSession(engine) as session:
        await session.get(Item, 1)
        tasks = [asyncio.create_task(paid(engine, key)) for key in range(1, 81)]
        await until(lambda: queued() == 80)
        async with asyncio.timeout(30):
            with pytest.raises(PoolTimeoutError):
                await wait_for_row_change(session, model, 1, interval=0.02)
        assert not any(task.done() for task in tasks)
        await session.rollback()
        await other.execute("UPDATE item SET name = 'paid'")
        assert set(await asyncio.gather(*tasks)) == {"paid"}


async def test_the_last_poll_keeps_its_place(
    database_url: str, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiter with a long queue before its last poll is served nevertheless."""
    monkeypatch.setattr(_batches, "BATCH_SIZE", 1)
    await items(other, 60)
    await other.execute("UPDATE item SET name = 'paid'")
    async with small(database_url, 1) as engine:
        event.listen(
            engine.sync_engine, "before_cursor_execute", lambda *_: await_only(asyncio.sleep(0.03))
        )

        async def attempt() -> bool:
            start = time.monotonic()
            try:
                names = await asyncio.gather(
                    *(paid(engine, key, timeout=0) for key in range(1, 61))
                )
            except WaitTimeoutError:
                return False  # the queue stood still
            assert set(names) == {"paid"}
            assert time.monotonic() - start > _batches.LAST_POLL_TIMEOUT  # or nothing was shown
            return True

        await at_best(attempt)


async def test_a_queue_without_progress(database_url: str, other: asyncpg.Connection) -> None:
    """Without progress of the queue, a wait ends soon after its timeout."""
    await items(other, 40)
    async with small(database_url, 1) as engine:
        async with every_connection(engine):
            start = time.monotonic()
            waits = [paid(engine, key, timeout=0.1) for key in range(1, 41)]
            errors = await asyncio.gather(*waits, return_exceptions=True)
            assert time.monotonic() - start < 0.1 + _batches.LAST_POLL_TIMEOUT + 5
            assert {type(error) for error in errors} == {WaitTimeoutError}
            assert all("no connection" in str(error) for error in errors)


async def test_a_locked_table(database_url: str, other: asyncpg.Connection) -> None:
    """Waiters for a locked table hold one connection, and delay no other table."""
    await items(other, 20)
    await other.execute("INSERT INTO account SELECT n, 0 FROM generate_series(1, 20) AS n")

    async def balance(key: int) -> int:
        async with AsyncSession(engine) as session:
            options: Any = {"baseline": {"balance": 0}, "interval": 0.05, "timeout": 60}
            return (await wait_for_row_change(session, Account, key, **options)).balance

    async with small(database_url, 4) as engine:
        polls = Polls(engine)
        async with other.transaction():
            await other.execute("LOCK TABLE account IN ACCESS EXCLUSIVE MODE")
            accounts = [asyncio.create_task(balance(key)) for key in range(1, 21)]
            await until(lambda: len(polls.sizes) > 0)
            tasks = [asyncio.create_task(paid(engine, key)) for key in range(1, 21)]
            connection = await asyncpg.connect(plain_url(database_url))
            await connection.execute("UPDATE item SET name = 'paid'")
            await connection.close()
            async with asyncio.timeout(5):  # less than the patience with a statement
                assert set(await asyncio.gather(*tasks)) == {"paid"}
            assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]
            await other.execute("UPDATE account SET balance = 1")
        assert set(await asyncio.gather(*accounts)) == {1}


async def test_cancelled_everywhere_in_company(
    database_url: str, other: asyncpg.Connection
) -> None:
    """A waiter that is cancelled, leading or led, takes nothing from the others."""
    await items(other, 9)
    async with small(database_url, 1) as engine:
        others = [asyncio.create_task(paid(engine, key, interval=0.01)) for key in range(1, 9)]

        async def work(n: int) -> None:
            with pytest.raises(WaitTimeoutError):
                await paid(engine, 9, interval=0.01, timeout=0.02)

        async def check(n: int) -> None:
            polls = Polls(engine)
            await until(lambda: len(polls.sizes) > 2)
            assert not any(task.done() for task in others)

        assert await interrupt_everywhere(work, check) > 1
        await other.execute("UPDATE item SET name = 'paid'")
        async with asyncio.timeout(20):
            assert set(await asyncio.gather(*others)) == {"paid"}


async def test_a_leader_that_is_cancelled(database_url: str, other: asyncpg.Connection) -> None:
    """The next waiter polls for the others of a cancelled one, without an interval."""
    await items(other, 5)
    async with small(database_url, 1) as engine:
        tasks = []
        async with every_connection(engine):
            for key in range(1, 6):
                tasks.append(asyncio.create_task(paid(engine, key, interval=60)))
                await until(lambda key=key: queued() == key)  # type: ignore[misc]
            locked = other.transaction()
            await locked.start()
            await other.execute("LOCK TABLE item IN ACCESS EXCLUSIVE MODE")
        for leader in tasks[:2]:
            await asyncio.sleep(0.1)
            leader.cancel()
            await asyncio.wait([leader])
        await other.execute("UPDATE item SET name = 'paid'")
        await locked.commit()
        async with asyncio.timeout(20):
            assert set(await asyncio.gather(*tasks[2:])) == {"paid"}


@pytest.mark.usefixtures("notes")
async def test_values_are_not_shared(database_url: str, other: asyncpg.Connection) -> None:
    """Two waiters for one row get values of their own, which they may change."""
    await other.execute("INSERT INTO note VALUES (1, '{\"a\": 1}', '')")

    async def document(session: AsyncSession) -> Any:
        options: Any = {"baseline": {"data": None}, "columns": ["data"], "interval": 60}
        return (await wait_for_row_change(session, Note, 1, **options)).data

    async with (
        small(database_url, 1) as engine,
        AsyncSession(engine) as one,
        AsyncSession(engine) as two,
    ):
        async with every_connection(engine):
            tasks = [asyncio.create_task(document(session)) for session in (one, two)]
            await until(lambda: queued() == 2)
        first, second = await asyncio.gather(*tasks)
    assert first == second == {"a": 1}
    assert first is not second


async def test_predicates_see_instances_of_their_own(
    database_url: str, other: asyncpg.Connection
) -> None:
    """What the predicate of one does to the row that it is shown is not seen by that of another."""
    await items(other, 1)
    shown: list[Item] = []

    def see(item: Item) -> bool:
        shown.append(item)
        return True

    async with small(database_url, 1) as engine:
        async with every_connection(engine):
            tasks = [asyncio.create_task(paid(engine, 1, until=see)) for _ in range(3)]
            await until(lambda: queued() == 3)
        await asyncio.gather(*tasks)
    assert len({id(item) for item in shown}) == 3


@pytest.mark.usefixtures("notes")
@pytest.mark.parametrize("options", [{}, POOLER], ids=["", "pooler"])
async def test_errors_are_not_shared(
    database_url: str, other: asyncpg.Connection, options: dict[str, Any]
) -> None:
    """An unreadable, a missing and a deleted row fail their own waiters only."""
    await other.execute("INSERT INTO note VALUES (1, NULL, 'good'), (2, NULL, 'bad')")

    async def wait(key: int, **more: Any) -> Any:
        async with AsyncSession(engine) as session:
            return (
                await wait_for_row_change(session, Note, key, columns=["text"], interval=60, **more)
            ).text

    async with small(database_url, 1, **options) as engine:
        async with every_connection(engine):
            waits = [
                wait(1, baseline={"text": ""}),
                wait(2),
                wait(3),
                wait(3, baseline={"text": ""}),
            ]
            tasks = [asyncio.create_task(each) for each in waits]
            await until(lambda: queued() == 4)
        good, bad, missing, deleted = await asyncio.gather(*tasks, return_exceptions=True)
    assert good == "good"
    assert isinstance(bad, ZeroDivisionError)
    assert type(missing) is RowNotFoundError
    assert type(deleted) is RowDeletedError


@pytest.mark.parametrize(
    "options",
    [
        {"poolclass": NullPool},
        {"poolclass": StaticPool},
        {"pool_size": 0},
        {"pool_timeout": None},
        POOLER,
    ],
)
async def test_pools(database_url: str, other: asyncpg.Connection, options: Any) -> None:
    """Pools of other kinds: one without a limit is not made to open hundreds, a single connection
    is taken in turn."""
    await items(other, 100)
    kinds = models(8)
    engine = create_async_engine(database_url, **options)
    try:
        tasks = [asyncio.create_task(paid(engine, key, kinds[key % 8])) for key in range(1, 101)]
        await asyncio.sleep(0.3)
        assert (
            await other.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%item.id%'"
            )
            < 10
        )
        await other.execute("UPDATE item SET name = 'paid'")
        async with asyncio.timeout(30):
            assert set(await asyncio.gather(*tasks)) == {"paid"}
    finally:
        await engine.dispose()


async def test_several_event_loops(database_url: str, other: asyncpg.Connection) -> None:
    """The waiters of each event loop have turns of their own."""
    await items(other, 30)
    engine = create_async_engine(database_url, poolclass=NullPool)
    # SQLAlchemy initializes a dialect on the engine's first connection, under a lock of threads
    # that two event loops cannot share.
    async with engine.connect():
        pass
    names: list[str] = []

    async def wait() -> None:
        names.extend(await asyncio.gather(*(paid(engine, key) for key in range(1, 31))))

    threads = [threading.Thread(target=lambda: asyncio.run(wait())) for _ in range(2)]
    for thread in threads:
        thread.start()
    await until(lambda: len(shares_of(engine)) == 2)
    await other.execute("UPDATE item SET name = 'paid'")
    await until(lambda: not any(thread.is_alive() for thread in threads), 30)
    assert names == ["paid"] * 60


async def test_nothing_is_left(database_url: str, other: asyncpg.Connection) -> None:
    """When the last waiter has gone, so have lines and turns; the next one starts anew."""
    await items(other, 10)
    async with small(database_url, 1) as engine:
        for _ in range(2):
            tasks = [asyncio.create_task(paid(engine, key)) for key in range(1, 11)]
            await until(lambda: len(shares_of(engine)) == 1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            del task, tasks
            await asyncio.sleep(0)
            gc.collect()
            assert not shares_of(engine)


waiters = st.lists(
    st.tuples(
        st.integers(1, 4),  # the row
        st.sampled_from(["first look", "baseline", "until"]),
        st.sampled_from([None, 0.03, 60]),  # the timeout
        st.one_of(st.none(), st.integers(0, 20)),  # cancelled after so many turns of the event loop
    ),
    max_size=20,
)


@given(crowd=waiters, size=st.integers(1, 3), batch=st.integers(1, 5), busy=st.booleans())
@settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_crowd(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    crowd: list[Any],
    size: int,
    batch: int,
    busy: bool,
) -> None:
    """Every waiter with enough time sees the change, and no queue is left behind."""
    monkeypatch.setattr(_batches, "BATCH_SIZE", batch)

    async def wait(engine: AsyncEngine, key: int, how: str, timeout: float | None) -> str:
        options: dict[str, Any] = {
            "first look": {},
            "baseline": {"baseline": {"name": ""}},
            "until": {"until": lambda item: item.name == "paid"},
        }[how]
        async with AsyncSession(engine) as session:
            item = await wait_for_row_change(
                session, Item, key, interval=0.01, timeout=timeout, **options
            )
            return item.name

    async def run(engine: AsyncEngine, writer: asyncpg.Connection) -> None:
        await writer.execute(
            "DELETE FROM item; INSERT INTO item SELECT n, '' FROM generate_series(1, 4) AS n"
        )
        tasks = [
            asyncio.create_task(wait(engine, key, how, timeout)) for key, how, timeout, _ in crowd
        ]
        leaving = {n: turns for n, (*_, turns) in enumerate(crowd) if turns is not None}

        async def leave() -> None:
            for turn in range(21):
                for n, turns in leaving.items():
                    if turns == turn:
                        tasks[n].cancel()
                await asyncio.sleep(0)

        if busy:
            async with every_connection(engine):
                await leave()
        else:
            await leave()
        # A first look that comes after the change has nothing to compare with.
        polls = Polls(engine)
        await until(lambda: len(polls.sizes) > 3 * len(crowd) or all(task.done() for task in tasks))
        await writer.execute("UPDATE item SET name = 'paid'")
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for n, (result, (_, _, timeout, _)) in enumerate(zip(results, crowd, strict=True)):
            if isinstance(result, asyncio.CancelledError):
                assert n in leaving
            elif isinstance(result, WaitTimeoutError):
                assert timeout == 0.03
            else:
                assert result == "paid"
        await until(lambda: queued() == 0)

    async def main() -> None:
        writer = await asyncpg.connect(plain_url(database_url))
        try:
            async with asyncio.timeout(60), small(database_url, size) as engine:
                await run(engine, writer)
            await writer.execute("DELETE FROM item")
        finally:
            await writer.close()

    asyncio.run(main())
