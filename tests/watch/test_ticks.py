"""What happens within a tick of a RowWatcher, and between two of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pgtoolset import RowNotFoundError, RowWatcher, WaitTimeoutError, row_change_trigger
from pgtoolset._postgres import link
from pgtoolset.watch import _hub, _yielding
from pgtoolset.watch._groups import Group
from pgtoolset.watch._subscriptions import Waiter
from tests.proxy import Proxy
from tests.support import Account, Item, interrupt_everywhere, plain_url, until

pytestmark = pytest.mark.asyncpg(reason="RowWatcher")

MANY = 10_000


async def joined(watcher: RowWatcher) -> None:
    """Wait until every subscription has had its first tick."""
    hub: Any = watcher._hub
    await asyncio.sleep(0)
    await until(lambda: not any(group._members.joining for group in hub._groups.all()))


class Turns:
    """How many of some futures are done from one turn of the event loop to the next."""

    def __init__(self, count: list[int]) -> None:
        self._count = count
        self.most = 0

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        async def watch() -> None:
            last = 0
            while True:
                self.most = max(self.most, self._count[0] - last)
                last = self._count[0]
                await asyncio.sleep(0)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@pytest.mark.parametrize("rows", [1, MANY])
async def test_slices(
    engine: AsyncEngine, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """10,000 waiters are served in slices, between which other tasks run."""
    monkeypatch.setattr(_yielding, "YIELD_AFTER", -1.0)  # whatever the clock of this machine says
    await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(1, $1) AS n", rows)
    count = [0]
    turns = Turns(count)
    for name in ("start", "changed"):
        original = getattr(Waiter, name)

        def counted(self: Any, *arguments: Any, original: Any = original) -> None:
            count[0] += 1
            original(self, *arguments)

        monkeypatch.setattr(Waiter, name, counted)
    async with RowWatcher(engine, interval=0.1) as watcher, turns.watched():
        tasks = [
            asyncio.create_task(watcher.wait(Item, n % rows + 1, timeout=60)) for n in range(MANY)
        ]
        await joined(watcher)
        assert count[0] == MANY
        await other.execute("UPDATE item SET name = 'paid'")
        assert {change.kind for change in await asyncio.gather(*tasks)} == {"update"}
    assert count[0] == 2 * MANY
    assert turns.most <= _yielding.SLICE_SIZE


async def test_statistics_of_another_time(
    engine: AsyncEngine, other: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """A table that the planner takes for nearly empty is polled in time."""
    await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(1, $1) AS n", MANY)
    await other.execute("DELETE FROM item")
    await other.execute("INSERT INTO item SELECT n, '' FROM unnest(ARRAY[3, 1, 5, 2, 4]) AS n")
    await other.execute("ANALYZE item")
    await other.execute("INSERT INTO item SELECT n, '' FROM generate_series(6, $1) AS n", MANY)
    async with RowWatcher(engine, interval=0.05) as watcher:
        tasks = [asyncio.create_task(watcher.wait(Item, n, timeout=60)) for n in range(1, MANY + 1)]
        await joined(watcher)
        await asyncio.sleep(1)  # then the plan is one that PostgreSQL keeps
        await other.execute("UPDATE item SET name = 'paid'")
        assert {change.kind for change in await asyncio.gather(*tasks)} == {"update"}
    assert [record.getMessage() for record in caplog.records] == []
    await other.execute("ANALYZE item")


async def test_waiters_that_come_and_go_during_a_tick(
    engine: AsyncEngine, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiter that comes during a tick starts from a later one; one that leaves is skipped."""
    fetch = link.Link.fetch
    found, go_on = asyncio.Event(), asyncio.Event()
    go_on.set()

    async def fetch_and_wait(self: link.Link, *arguments: Any) -> list[Any]:
        rows = await fetch(self, *arguments)
        found.set()
        await go_on.wait()
        return rows

    monkeypatch.setattr(link.Link, "fetch", fetch_and_wait)
    await other.execute("INSERT INTO item VALUES (1, 'new'), (2, 'new')")
    async with RowWatcher(engine, interval=0.05) as watcher:
        stays, goes = (asyncio.create_task(watcher.wait(Item, 1, timeout=30)) for _ in range(2))
        leaves_a_row = asyncio.create_task(watcher.wait(Item, 2, timeout=30))
        await joined(watcher)
        await other.execute("UPDATE item SET name = 'paid'")
        go_on.clear()
        found.clear()
        async with asyncio.timeout(30):
            await found.wait()
        comes = asyncio.create_task(watcher.wait(Item, 1, timeout=30))
        finds_none = asyncio.create_task(watcher.wait(Item, 3, timeout=30))
        stream = watcher.changes(Item, 2)
        await asyncio.sleep(0)
        goes.cancel()
        leaves_a_row.cancel()
        await asyncio.wait([goes, leaves_a_row])
        go_on.set()
        change = await stays
        assert (change.before, change.after) == (
            {"id": 1, "name": "new"},
            {"id": 1, "name": "paid"},
        )
        with pytest.raises(RowNotFoundError):
            await finds_none
        await joined(watcher)
        await other.execute("UPDATE item SET name = 'sent'")
        change = await comes
        assert (change.before, change.after) == (
            {"id": 1, "name": "paid"},
            {"id": 1, "name": "sent"},
        )
        async with asyncio.timeout(30):
            assert (await anext(stream)).after == {"id": 2, "name": "sent"}
        assert goes.cancelled()


@pytest.mark.parametrize("notify", [False, True])
async def test_cancelled_everywhere(
    engine: AsyncEngine, other: asyncpg.Connection, notify: bool
) -> None:
    """A cancellation at any suspension of opening, waiting and closing leaves neither task nor
    connection behind."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with engine.connect():  # see the test of that name for `wait_for_row_change`
        pass
    tasks = asyncio.all_tasks()

    async def connections() -> int:
        return await other.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tests'"
        )

    before = await connections()

    async def work(n: int) -> None:
        async with RowWatcher(engine, interval=0.02, notify=notify) as watcher:
            async with watcher.changes(Item, 1):
                with pytest.raises(WaitTimeoutError):
                    await watcher.wait(Item, 1, timeout=0.05)

    async def nothing_left() -> bool:
        return await connections() == before and asyncio.all_tasks() == tasks

    async def check(n: int) -> None:
        await until(nothing_left)

    assert await interrupt_everywhere(work, check) >= 5


async def test_a_locked_table(
    engine: AsyncEngine,
    database_url: str,
    other: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exclusively locked table delays its own waiters only, who are served afterwards."""
    monkeypatch.setattr(link, "STATEMENT_TIMEOUT", 0.2)
    await other.execute("INSERT INTO item VALUES (1, 'new'); INSERT INTO account VALUES (1, 0)")
    async with RowWatcher(engine, interval=0.05) as watcher:
        locked = asyncio.create_task(watcher.wait(Item, 1, timeout=30))
        late = asyncio.create_task(watcher.wait(Item, 1, timeout=0.5))
        free = asyncio.create_task(watcher.wait(Account, 1, timeout=30))
        await joined(watcher)
        async with other.transaction():
            await other.execute("LOCK TABLE item IN ACCESS EXCLUSIVE MODE")
            await other.execute("UPDATE item SET name = 'paid'")
            second = await asyncpg.connect(plain_url(database_url))
            try:
                await second.execute("UPDATE account SET balance = 1")
            finally:
                await second.close()
            async with asyncio.timeout(30):
                assert (await free).kind == "update"
                with pytest.raises(WaitTimeoutError):
                    await late
            assert not locked.done()
        assert (await locked).after == {"id": 1, "name": "paid"}


async def test_the_groups_of_a_locked_table(
    engine: AsyncEngine,
    database_url: str,
    other: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A locked table gives the connection back to the others at once, and one of its groups waits
    for all of them."""
    refused: list[Any] = []
    tick = Group.tick

    async def noted(group: Group, *arguments: Any, **options: Any) -> None:
        try:
            await tick(group, *arguments, **options)
        except Exception as error:
            refused.append(error)
            raise

    monkeypatch.setattr(Group, "tick", noted)
    await other.execute("INSERT INTO item VALUES (1, 'new'); INSERT INTO account VALUES (1, 0)")
    second = await asyncpg.connect(plain_url(database_url))
    try:
        async with RowWatcher(engine, interval=0.02) as watcher:
            columns = [["id"], ["name"], ["id", "name"]]
            locked = [asyncio.create_task(watcher.wait(Item, 1, columns=each)) for each in columns]
            await joined(watcher)
            async with watcher.changes(Account, 1) as changes, other.transaction():
                await other.execute("LOCK TABLE item IN ACCESS EXCLUSIVE MODE")
                await until(lambda: len(refused) > 2)
                for balance in range(1, 20):
                    await second.execute("UPDATE account SET balance = $1", balance)
                    async with asyncio.timeout(30):
                        assert (await anext(changes)).after == {"id": 1, "balance": balance}
                pauses = [group.not_before for group in watcher._hub._groups.all()]  # type: ignore[union-attr]
                assert len(set(pauses)) == 2  # those of the locked table are alike
                await other.execute("UPDATE item SET name = 'paid'")
            assert (await locked[1]).after == {"name": "paid"}
            assert (await locked[2]).after == {"id": 1, "name": "paid"}
            locked[0].cancel()
    finally:
        await second.close()
    assert {error.sqlstate for error in refused} == {"55P03"}


@pytest.mark.usefixtures("engine")
async def test_heartbeat(
    database_url: str, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is half-open is noticed long before the next tick, and what it did not tell
    is found."""
    monkeypatch.setattr(link, "STATEMENT_TIMEOUT", 0.2)
    monkeypatch.setattr(_hub, "HEARTBEAT", 0.1)
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    async with Proxy.to(database_url) as proxy:
        engine = create_async_engine(proxy.url)
        try:
            async with engine.begin() as connection:
                for ddl in row_change_trigger(Item):
                    await connection.execute(ddl)
            async with RowWatcher(engine, interval=3600, notify=True) as watcher:
                waiter = asyncio.create_task(watcher.wait(Item, 1, timeout=60))
                await joined(watcher)
                connections = proxy.accepted
                await asyncio.sleep(0.5)
                assert proxy.accepted == connections, "a heartbeat that is answered changes nothing"
                proxy.frozen = True
                await other.execute("UPDATE item SET name = 'paid'")
                await until(lambda: proxy.accepted > connections)
                proxy.frozen = False
                async with asyncio.timeout(20):
                    assert (await waiter).kind == "update"
        finally:
            await engine.dispose()
            for event in ("insert", "update", "delete", "truncate"):
                await other.execute(f"DROP TRIGGER pgtoolset_{event} ON item")


async def test_closing_when_a_cancellation_is_lost(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watcher closes although a library that it awaits has swallowed the cancellation."""
    monkeypatch.setattr(_hub, "CLOSE_RETRY", 0.05)
    swallowed = asyncio.Event()
    sleep = _hub.Hub._sleep

    async def swallow(self: _hub.Hub, *arguments: Any) -> None:
        try:
            await sleep(self, *arguments)
        except asyncio.CancelledError:
            if swallowed.is_set():
                raise
            swallowed.set()

    monkeypatch.setattr(_hub.Hub, "_sleep", swallow)
    async with asyncio.timeout(20):
        async with RowWatcher(engine, interval=0.05) as watcher:
            await until(lambda: watcher._hub is not None and watcher._hub._is_connected)
            await asyncio.sleep(0)
    assert swallowed.is_set()
