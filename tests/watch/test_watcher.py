"""RowWatcher: the changes that it delivers, and the failures that it survives."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import String, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from pgtoolset import (
    RowNotFoundError,
    RowWatcher,
    WaitTimeoutError,
    WatcherClosedError,
    WatchFailedError,
    row_change_trigger,
)
from pgtoolset._postgres import link
from pgtoolset.testing import EmbeddedServer
from pgtoolset.watch import _known_rows
from tests.proxy import Proxy
from tests.support import Account, Item, connect_args, until
from tests.support import Base as SupportBase


class Base(DeclarativeBase):
    pass


class Place(Base):
    __tablename__ = 'watched "place"'

    row: Mapped[str] = mapped_column(String(2), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[float | None]
    note: Mapped[str] = mapped_column("a note", default="")


@pytest.fixture
async def places(engine: AsyncEngine) -> AsyncIterator[AsyncEngine]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    try:
        yield engine
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)


@pytest.fixture(params=[_known_rows.FETCHED_ROWS, 0], ids=["fetched", "as text"])
async def watcher(
    places: AsyncEngine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[RowWatcher]:
    """A watcher that fetches every row at every tick, and one that compares snapshots."""
    monkeypatch.setattr(_known_rows, "FETCHED_ROWS", request.param)
    async with RowWatcher(places, interval=0.05) as watcher:
        yield watcher


async def connections(other: asyncpg.Connection) -> int:
    """How many connections the engines of the tests have."""
    return await other.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tests'"
    )


async def settled(watcher: RowWatcher) -> None:
    """Wait until every subscription has joined."""
    hub: Any = watcher._hub
    await until(lambda: not any(group._members.joining for group in hub._groups.all()))


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_update_and_delete(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """A waiter gets the row before and after; a deletion is a change."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    task = asyncio.create_task(watcher.wait(Item, 1, columns=[Item.name], timeout=30))
    await asyncio.sleep(0)
    await settled(watcher)
    await other.execute("UPDATE item SET name = 'paid'")
    change = await task
    assert (change.model, change.pk, change.kind) == (Item, 1, "update")
    assert (change.before, change.after) == ({"name": "new"}, {"name": "paid"})
    task = asyncio.create_task(watcher.wait(Item, 1, timeout=30))
    await asyncio.sleep(0)
    await settled(watcher)
    await other.execute("DELETE FROM item")
    change = await task
    assert (change.kind, change.before, change.after) == ("delete", {"id": 1, "name": "paid"}, None)


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_missing_row(watcher: RowWatcher) -> None:
    """Waiting for a row that does not exist is a RowNotFoundError."""
    with pytest.raises(RowNotFoundError):
        await watcher.wait(Item, 1, timeout=30)


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_a_change_before_the_call_is_none(
    watcher: RowWatcher, other: asyncpg.Connection
) -> None:
    """A new waiter starts from a poll of its own, although others have seen an older row."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    first = asyncio.create_task(watcher.wait(Item, 1, timeout=30))
    await asyncio.sleep(0)
    await settled(watcher)
    await other.execute("UPDATE item SET name = 'paid'")
    with pytest.raises(WaitTimeoutError):
        await watcher.wait(Item, 1, timeout=0.2)
    assert (await first).after == {"id": 1, "name": "paid"}


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_composite_keys_and_columns_in_any_mix(
    watcher: RowWatcher, other: asyncpg.Connection
) -> None:
    """Tables, composite keys and sets of columns are watched together; NaN is no change and key
    parts pair up."""
    await other.execute(
        'INSERT INTO "watched ""place""" '
        "VALUES ('A', 1, 'NaN', ''), ('A', 2, 1, ''), ('B', 1, NULL, '')"
    )
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    waits = [
        watcher.wait(Place, ("A", 1), columns=["price"], timeout=30),
        watcher.wait(Place, {"number": 1, "row": "B"}, timeout=30),
        watcher.wait(Place, ("A", 2), columns=[Place.note], timeout=0.4),
        watcher.wait(Place, ("A", 1), columns=[Place.note], timeout=0.4),
        watcher.wait(Item, 1, timeout=30),
        watcher.wait(Place, ("B", 2), timeout=30),
    ]
    tasks = [asyncio.create_task(each) for each in waits]
    await asyncio.sleep(0)
    await settled(watcher)
    await other.execute('UPDATE "watched ""place""" SET price = 2 WHERE number <> 2')
    await other.execute("UPDATE item SET name = 'paid'")
    one, two, three, four, five, six = await asyncio.gather(*tasks, return_exceptions=True)
    assert repr(one.before) == "mappingproxy({'price': nan})"
    assert one.after == {"price": 2.0}
    assert two.after == {"row": "B", "number": 1, "price": 2.0, "note": ""}
    assert two.pk == ("B", 1)
    assert isinstance(three, WaitTimeoutError)
    assert isinstance(four, WaitTimeoutError)
    assert five.after == {"id": 1, "name": "paid"}
    assert isinstance(six, RowNotFoundError)


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_changes(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """A stream tells of the insertion, updates and deletion of its row, each from where the last
    one ended."""
    async with watcher.changes(Item, 1) as changes:
        assert changes.current is None
        await other.execute("INSERT INTO item VALUES (1, 'a')")
        assert (await anext(changes)).kind == "insert"
        await other.execute("UPDATE item SET name = 'b'")
        change = await anext(changes)
        assert (change.before, change.after) == ({"id": 1, "name": "a"}, {"id": 1, "name": "b"})
        assert changes.current == change.after
        await other.execute("DELETE FROM item")
        assert (await anext(changes)).kind == "delete"


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_slow_consumer(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """A slow consumer gets the latest state in one change, and none where it was undone."""
    await other.execute("INSERT INTO item VALUES (1, 'a'), (2, '')")
    async with watcher.changes(Item, 1) as changes, watcher.changes(Item, 2) as ticks:
        for name in "bcd":
            await other.execute("UPDATE item SET name = $1", name)
            await anext(ticks)
        change = await anext(changes)
        assert (change.before, change.after) == ({"id": 1, "name": "a"}, {"id": 1, "name": "d"})
        for name in "ed":
            await other.execute("UPDATE item SET name = $1", name)
            await anext(ticks)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(changes)
        await other.execute("UPDATE item SET name = 'f'")
        change = await anext(changes)  # the cancelled one has lost nothing
        assert (change.before, change.after) == ({"id": 1, "name": "d"}, {"id": 1, "name": "f"})


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_nothing_is_left_behind(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """Waiters that are cancelled, time out or are done, and streams that are dropped, are
    forgotten."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    hub: Any = watcher._hub
    task = asyncio.create_task(watcher.wait(Item, 1))
    await asyncio.sleep(0)
    await settled(watcher)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not hub._groups
    with pytest.raises(WaitTimeoutError):
        await watcher.wait(Item, 1, timeout=0.01)
    assert not hub._groups
    stream = watcher.changes(Item, 1)
    assert hub._groups
    del stream
    gc.collect()
    await until(lambda: not hub._groups)


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_a_broken_group_fails_alone(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """A dropped table fails its own waiters; other and later waiters are served."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    await other.execute('INSERT INTO "watched ""place""" VALUES (\'A\', 1, 1, \'\')')
    broken = asyncio.create_task(watcher.wait(Place, ("A", 1), timeout=30))
    stream = watcher.changes(Place, ("A", 2))
    whole = asyncio.create_task(watcher.wait(Item, 1, timeout=30))
    await asyncio.sleep(0)
    await settled(watcher)
    await other.execute('DROP TABLE "watched ""place"""')
    with pytest.raises(WatchFailedError) as failed:
        await broken
    assert failed.value.sqlstate == "42P01"
    with pytest.raises(WatchFailedError):
        await anext(stream)
    assert not whole.done()
    await other.execute("UPDATE item SET name = 'paid'")
    assert (await whole).kind == "update"
    await other.execute(
        'CREATE TABLE "watched ""place""" (row varchar(2), number int, price float, "a note" text, '
        "PRIMARY KEY (row, number))"
    )
    with pytest.raises(RowNotFoundError):
        await watcher.wait(Place, ("A", 1), timeout=30)


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_a_long_key_is_not_cut(watcher: RowWatcher, other: asyncpg.Connection) -> None:
    """A key that is longer than its column finds nothing, and not the row whose key is its
    beginning."""
    await other.execute('INSERT INTO "watched ""place""" VALUES (\'AB\', 1, 1, \'\')')
    with pytest.raises(RowNotFoundError):
        await watcher.wait(Place, ("ABC", 1), timeout=30)


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_closing(places: AsyncEngine, other: asyncpg.Connection) -> None:
    """Closing ends every waiter, closes the connection, and is final."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    before = await connections(other)
    watcher = RowWatcher(places, interval=0.05)
    with pytest.raises(WatcherClosedError):
        await watcher.wait(Item, 1)
    async with watcher:
        assert places.pool.checkedout() == 0  # type: ignore[attr-defined]
        task = asyncio.create_task(watcher.wait(Item, 1))
        stream = watcher.changes(Item, 1)
        await asyncio.sleep(0.2)
    with pytest.raises(WatcherClosedError):
        await task
    with pytest.raises(WatcherClosedError):
        await anext(stream)
    with pytest.raises(WatcherClosedError):
        watcher.changes(Item, 1)
    with pytest.raises(WatcherClosedError):
        async with watcher:
            pass
    await watcher.close()

    async def gone() -> bool:
        return await connections(other) == before

    await until(gone)


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_the_last_poll(places: AsyncEngine, other: asyncpg.Connection) -> None:
    """A waiter whose time is up before the next tick gets a last poll."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with RowWatcher(places, interval=60) as watcher:
        task = asyncio.create_task(watcher.wait(Item, 1, timeout=0.4))
        await asyncio.sleep(0)
        await settled(watcher)
        await other.execute("UPDATE item SET name = 'paid'")
        assert (await task).kind == "update"


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_ten_thousand_waiters(places: AsyncEngine, other: asyncpg.Connection) -> None:
    """Ten thousand waiters on as many rows share one connection, and all are served."""
    await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(1, 10000) AS n")
    await places.dispose()
    async with RowWatcher(places, interval=0.2) as watcher:
        tasks = [
            asyncio.create_task(watcher.wait(Item, n, columns=["name"], timeout=60))
            for n in range(1, 10001)
        ]
        await asyncio.sleep(0)
        await settled(watcher)
        assert await connections(other) == 1
        await other.execute("UPDATE item SET name = 'paid' WHERE id % 2 = 0")
        await other.execute("DELETE FROM item WHERE id % 2 = 1")
        changes = await asyncio.gather(*tasks)
        assert await connections(other) == 1
    assert [change.kind for change in changes] == ["delete", "update"] * 5000
    assert [change.pk for change in changes] == list(range(1, 10001))


WAITERS = 500


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("fault", ["terminate", "drop", "freeze", "slow"])
async def test_faults(
    database_url: str, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The backend terminated, the network cut, half-open or slow while 500 wait: all are served,
    and nothing that happened meanwhile is missed."""
    monkeypatch.setattr(link, "STATEMENT_TIMEOUT", 0.3)
    await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(1, 500) AS n")
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(proxy.url, connect_args=connect_args(application_name="tests"))
        try:
            async with RowWatcher(engine, interval=0.05) as watcher:
                tasks = [
                    asyncio.create_task(watcher.wait(Item, n, timeout=30))
                    for n in range(1, WAITERS + 1)
                ]
                await asyncio.sleep(0)
                await settled(watcher)
                if fault == "terminate":
                    await other.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE application_name = 'tests'"
                    )
                elif fault == "drop":
                    proxy.refusing = True
                    proxy.drop()
                elif fault == "freeze":
                    proxy.frozen = True
                else:
                    proxy.delay = 0.05
                await other.execute("UPDATE item SET name = 'paid'")
                await asyncio.sleep(0.3)
                proxy.refusing = proxy.frozen = False
                proxy.delay = 0
                changes = await asyncio.gather(*tasks)
                assert {
                    (change.kind, change.after["name"]) for change in changes if change.after
                } == {("update", "paid")}
                assert len(changes) == WAITERS
        finally:
            await engine.dispose()


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_restart() -> None:
    """The server restarted as by a crash while 500 wait: all are served."""
    server = EmbeddedServer()
    await asyncio.to_thread(server.start)
    engine = create_async_engine(server.url())
    try:
        async with engine.begin() as connection:
            await connection.run_sync(SupportBase.metadata.create_all)
            await connection.execute(
                text("INSERT INTO item SELECT n, '' FROM generate_series(1, 500) AS n")
            )
        async with RowWatcher(engine, interval=0.05) as watcher:
            tasks = [
                asyncio.create_task(watcher.wait(Item, n, timeout=60))
                for n in range(1, WAITERS + 1)
            ]
            await asyncio.sleep(0)
            await settled(watcher)
            await asyncio.to_thread(server.restart, immediate=True)
            await engine.dispose()
            async with engine.begin() as connection:
                await connection.execute(text("UPDATE item SET name = 'paid'"))
            assert {change.kind for change in await asyncio.gather(*tasks)} == {"update"}
    finally:
        await engine.dispose()
        await asyncio.to_thread(server.stop)


@pytest.fixture
async def triggers(places: AsyncEngine) -> AsyncIterator[None]:
    models = (Item, Place)
    async with places.begin() as connection:
        for model in models:
            for _ in range(2):  # twice is no error
                for ddl in row_change_trigger(model):
                    await connection.execute(ddl)
    try:
        yield
    finally:
        async with places.begin() as connection:
            for event in ("insert", "update", "delete", "truncate"):
                await connection.execute(text(f"DROP TRIGGER pgtoolset_{event} ON item"))


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.usefixtures("triggers")
async def test_notifications_wake(places: AsyncEngine, other: asyncpg.Connection) -> None:
    """With triggers a change arrives long before the next tick: named keys, a statement too large
    to name them, and TRUNCATE."""
    await other.execute('INSERT INTO "watched ""place""" VALUES (\'é\', 1, 1, \'\')')
    async with RowWatcher(places, interval=60, notify=True) as watcher:
        start = time.monotonic()
        async with watcher.changes(Item, 7) as changes, watcher.changes(Place, ("é", 1)) as place:
            await other.execute("INSERT INTO item VALUES (7, 'new')")
            assert (await anext(changes)).kind == "insert"
            await other.execute(
                "INSERT INTO item SELECT n, '' FROM generate_series(10, 20000) AS n"
            )
            await other.execute("UPDATE item SET name = 'all'")
            assert (await anext(changes)).kind == "update"
            await other.execute("TRUNCATE item CASCADE")
            assert (await anext(changes)).kind == "delete"
            await other.execute('UPDATE "watched ""place""" SET number = 2')
            assert (await anext(place)).kind == "delete"
        assert time.monotonic() - start < 30


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_a_server_that_does_not_listen(
    engine: AsyncEngine,
    other: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where LISTEN is refused, as by a standby, changes are seen by polling, and the log says
    so."""

    async def refuse(*_: Any) -> None:
        raise asyncpg.ReadOnlySQLTransactionError("cannot execute LISTEN during recovery")

    monkeypatch.setattr(asyncpg.Connection, "add_listener", refuse)
    await other.execute("INSERT INTO item VALUES (1, 'new'); INSERT INTO account VALUES (1, 0)")
    async with RowWatcher(engine, interval=0.05, notify=True) as watcher:
        waiters = [
            asyncio.create_task(watcher.wait(model, 1, timeout=10)) for model in (Item, Account)
        ]
        await asyncio.sleep(0)
        await settled(watcher)
        await other.execute("UPDATE item SET name = 'paid'; UPDATE account SET balance = 1")
        assert [change.kind for change in await asyncio.gather(*waiters)] == ["update", "update"]
    assert caplog.text.count("during recovery") == 1


async def test_triggers_of_half_a_module(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """The DDL is available before related classes exist, and can run with the table."""

    class Own(DeclarativeBase):
        pass

    class Early(Own):
        __tablename__ = "early"

        id: Mapped[int] = mapped_column(primary_key=True)
        late: Mapped[Any] = relationship("Late", uselist=False)

    for ddl in row_change_trigger(Early):
        event.listen(Early.__table__, "after_create", ddl)
    async with engine.begin() as connection:
        await connection.run_sync(Own.metadata.create_all)
    try:
        triggers = await other.fetchval(
            "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'early'::regclass"
        )
        assert triggers == 4
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Own.metadata.drop_all)


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.usefixtures("triggers")
async def test_foreign_and_lost_notifications(
    places: AsyncEngine, other: asyncpg.Connection
) -> None:
    """Foreign payloads do no harm, and without a trigger a change costs one interval."""
    from pgtoolset._postgres.notifications import channel_in

    channel = channel_in(Item.__table__, "public")  # type: ignore[arg-type]
    await other.execute("INSERT INTO account VALUES (1, 1)")
    async with RowWatcher(places, interval=0.05, notify=True) as watcher:
        async with watcher.changes(Item, 1) as changes, watcher.changes(Account, 1) as untriggered:
            for payload in (
                "",
                "{",
                "[[2]]",
                '[["x", null]]',
                "[1]",
                "[[1], [1], [1]]",
                '{"a": 1}',
                "[[[1]]]",
            ):
                await other.execute("SELECT pg_notify($1, $2)", channel, payload)
            await other.execute("INSERT INTO item VALUES (1, 'new')")
            assert (await anext(changes)).kind == "insert"
            await other.execute("UPDATE account SET balance = 2")
            assert (await anext(untriggered)).kind == "update"


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"interval": 0}, ValueError),
        ({"notify": 1}, TypeError),
        ({"engine": "postgresql://"}, TypeError),
    ],
)
async def test_bad_arguments(
    engine: AsyncEngine, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """A bad engine, interval or flag is refused when the watcher is made."""
    given = {"engine": engine, **arguments}
    with pytest.raises(error):
        RowWatcher(**given)
    with pytest.raises(TypeError):
        row_change_trigger(object)


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_closed_before_its_first_tick(engine: AsyncEngine, other: asyncpg.Connection) -> None:
    """A watcher that is closed as soon as it is open has closed its connection."""
    async with RowWatcher(engine):
        pass

    async def gone() -> bool:
        return await connections(other) == 0

    await until(gone)
    gc.collect()  # a connection that nobody has closed would be a warning, and so an error
