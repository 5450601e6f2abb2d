"""`subscribe`: what observers may do, and what stays of them."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import create_db_context, get_transaction, protocols
from pgtoolset.observe import Event, Observer, TransactionEnded, subscribe
from pgtoolset.protocols import DatabaseContext
from tests.observe.conftest import Events
from tests.support import DRIVERNAME

Context = DatabaseContext[AsyncSession]
SELECT = text("SELECT 1")


async def work(db_context: Context) -> None:
    async with db_context() as session:
        await session.execute(SELECT)


async def test_several(engine: AsyncEngine, db_context: Context) -> None:
    """Each subscription is called, also of the same observer, until its own end; that can be
    called twice."""
    first, second = Events(), Events()
    stops = [subscribe(engine, each.append) for each in (first, second, second)]
    await work(db_context)
    assert (len(first.ends()), len(second.ends())) == (1, 2)
    stops[1]()
    stops[1]()
    await work(db_context)
    assert (len(first.ends()), len(second.ends())) == (1, 1)
    for stop in stops:
        stop()
    first.clear()
    second.clear()
    await work(db_context)
    assert first == second == []


async def test_below(engine: AsyncEngine, db_context: Context) -> None:
    """The `sync_engine` and an engine with other options have the observers of the engine."""
    events = Events()
    stops = [
        subscribe(engine.sync_engine, events.append),
        subscribe(engine.execution_options(logging_token="a"), events.append),
    ]
    await work(db_context)
    assert len(events.ends()) == 2
    for stop in stops:
        stop()


async def test_while_a_transaction_runs(engine: AsyncEngine, db_context: Context) -> None:
    """A transaction that has begun before the subscription is not reported, nor is one that ends
    after it; the next ones on the same connection are."""
    events = Events()
    async with engine.connect() as connection, AsyncSession(connection) as session:
        async with get_transaction(session):
            await session.execute(SELECT)
            stop = subscribe(engine, events.append)
        assert events.ends() == []
        async with get_transaction(session):
            await session.execute(SELECT)
        assert len(events.ends()) == 1
        async with get_transaction(session):
            await session.execute(SELECT)
            stop()
            await session.execute(SELECT)
            stop = subscribe(engine, events.append)
        assert events.ends() == []
        async with get_transaction(session):
            await session.execute(SELECT)
            stop()
        async with get_transaction(session):
            stop = subscribe(engine, events.append)
            await session.execute(SELECT)
        [ended] = events.of(TransactionEnded)
        assert ended.seconds < 5
        stop()


async def test_in_the_middle_of_a_transaction(engine: AsyncEngine, db_context: Context) -> None:
    """An observer is told of the transactions that begin after it has come, whoever was there
    before, and whatever is executed afterwards."""
    first, second = Events(), Events()
    async with db_context() as session:
        await session.execute(SELECT)
        stops = [subscribe(engine, first.append)]
        await session.execute(SELECT)
    assert first.ends() == []
    async with db_context() as session:
        await session.execute(SELECT)
        stops.append(subscribe(engine, second.append))
        await session.execute(SELECT)
    assert (len(first.ends()), second.ends()) == (1, [])
    async with db_context() as session:
        await session.execute(SELECT)
        stops[0]()
        await session.execute(SELECT)
    assert (first.ends(), len(second.ends())) == ([], 1)
    stops[1]()


async def test_wrapped_by_another_tool(engine: AsyncEngine, db_context: Context) -> None:
    """A tool that wraps the same methods of the dialect keeps its wrapper, and a later observer
    is told once."""
    events, calls = Events(), []
    stop = subscribe(engine, events.append)
    dialect: Any = engine.dialect
    theirs = dialect.do_commit

    def do_commit(connection: Any) -> None:
        calls.append(connection)
        theirs(connection)

    dialect.do_commit = do_commit
    await work(db_context)
    stop()
    await work(db_context)
    assert len(events.ends()) == 1
    stop = subscribe(engine, events.append)
    await work(db_context)
    assert len(events.ends()) == 1
    assert len(calls) == 3
    stop()


class Interrupted(BaseException):
    """An error that is no `Exception`."""


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, Interrupted])
async def test_an_observer_that_raises(
    engine: AsyncEngine,
    db_context: Context,
    events: Events,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    """An observer that raises is logged; the transaction is stored, and the next one is called."""

    def failing(event: Event) -> None:
        raise error("a fault of the observer")

    stops = [subscribe(engine, failing), subscribe(engine, events.append)]
    stops.append(subscribe(engine, failing))
    with caplog.at_level(logging.ERROR, "pgtoolset"):
        await work(db_context)
        await asyncio.sleep(0)
    for stop in stops:
        stop()
    assert events.ends() == [("committed", None)] * 2
    messages = {record.getMessage() for record in caplog.records}
    assert len(caplog.records) == 4
    assert any("failing has failed on a TransactionEnded" in each for each in messages)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_observer_that_ends_the_program(database_url: str, error: type[BaseException]) -> None:
    """`KeyboardInterrupt` and `SystemExit` end the event loop, after the COMMIT."""
    events = Events()
    is_stored = False

    def ending(event: Event) -> None:
        if isinstance(event, TransactionEnded):
            raise error

    async def main() -> None:
        nonlocal is_stored
        engine = create_async_engine(database_url)
        subscribe(engine, ending)
        subscribe(engine, events.append)
        try:
            async with create_db_context(async_sessionmaker(engine))() as session:
                await session.execute(SELECT)
            is_stored = True
            await asyncio.sleep(60)
        finally:
            await engine.dispose()

    with pytest.raises(error):
        asyncio.run(main())
    assert is_stored
    assert events.ends() == [("committed", None)]


async def test_an_observer_that_unsubscribes(engine: AsyncEngine, db_context: Context) -> None:
    """An observer may end its own subscription, and that of the next one, as it is called."""
    events = Events()
    stops: list[Callable[[], None]] = []

    def once(event: Event) -> None:
        for stop in stops:
            stop()

    stops += [subscribe(engine, once), subscribe(engine, events.append)]
    await work(db_context)
    assert events == []


async def test_nothing_is_kept(database_url: str) -> None:
    """A forgotten engine is collected with its observers; an observer that has unsubscribed is
    collected while its engine lives."""

    class Watching:
        def __init__(self, engine: AsyncEngine) -> None:
            self.engine = engine

        def __call__(self, event: Event, /) -> None:
            pass

    async def use() -> tuple[weakref.ref[Any], weakref.ref[Any], Callable[[], None]]:
        engine = create_async_engine(database_url)
        observer = Watching(engine)
        stop = subscribe(engine, observer)
        await work(create_db_context(async_sessionmaker(engine)))
        await engine.dispose()
        return weakref.ref(engine.sync_engine), weakref.ref(observer), stop

    engine, observer, stop = await use()
    gc.collect()
    assert engine() is None
    assert observer() is None
    stop()

    living = create_async_engine(database_url)
    watching = Watching(living)
    stop = subscribe(living, watching)
    reference = weakref.ref(watching)
    del watching
    gc.collect()
    assert reference() is not None
    stop()
    gc.collect()
    assert reference() is None
    stop()
    await living.dispose()


def test_async_observer() -> None:
    """An observer that would have to be awaited is refused."""
    engine = create_async_engine(f"{DRIVERNAME}://user@127.0.0.1:9/nowhere")

    async def observer(event: Event) -> None: ...

    class Callable_:
        async def __call__(self, event: Event) -> None: ...

    for each in (observer, Callable_()):
        with pytest.raises(TypeError, match="observer must be a plain function of one event"):
            subscribe(engine, each)
    with pytest.raises(TypeError, match="engine must be an AsyncEngine"):
        subscribe(async_sessionmaker(engine), print)  # type: ignore[arg-type]


def test_events_are_values() -> None:
    """Events are frozen and slotted, and `Observer` is one of the protocols."""
    kinds = get_args(Event)
    assert len(kinds) == 6
    for kind in kinds:
        assert not hasattr(kind, "__dict__") or "__slots__" in vars(kind)
        event = kind(*[None for _ in fields(kind)])
        with pytest.raises(FrozenInstanceError):
            setattr(event, fields(kind)[0].name, 1)
    assert protocols.Observer is Observer


async def test_an_observer_on_its_own_engine(database_url: str) -> None:
    """What an observer does on its engine does not call it again, also in the call of another one;
    a task that it has started is an event as any other, when the call is over."""
    engine = create_async_engine(database_url, pool_size=3, max_overflow=0, pool_timeout=0.1)
    is_over = asyncio.Event()
    calls: list[str] = []
    tasks: list[asyncio.Task[None]] = []
    db_context = create_db_context(async_sessionmaker(engine))

    async def later() -> None:
        await is_over.wait()
        await work(db_context)

    def observer(name: str) -> Observer:
        def using(event: Event) -> None:
            calls.append(name)
            with engine.sync_engine.connect() as connection:
                connection.execute(SELECT)
            if name == "first" and not tasks:
                tasks.append(asyncio.create_task(later()))

        return using

    ends = [subscribe(engine, observer(name)) for name in ("first", "second")]
    try:
        await work(db_context)
        # For each of the two events, the waits of both observers are told to the other one.
        assert sorted(calls) == 4 * ["first"] + 4 * ["second"]
        calls.clear()
        is_over.set()
        await asyncio.gather(*tasks)
        assert sorted(calls) == 4 * ["first"] + 4 * ["second"]
    finally:
        for end in ends:
            end()
        await engine.dispose()
