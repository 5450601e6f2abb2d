"""`WatcherLooked`: the looks of a `RowWatcher`, and how far it is behind."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pgtoolset import RowWatcher
from pgtoolset.observe import WatcherLooked, subscribe
from tests.observe.conftest import Events
from tests.proxy import Proxy
from tests.support import Account, Item, sqlalchemy_url, until

pytestmark = pytest.mark.asyncpg(reason="RowWatcher")


def gathered(events: Events, looks: list[WatcherLooked]) -> list[WatcherLooked]:
    """Add the new looks to those before."""
    looks += events.of(WatcherLooked)
    return looks


async def test_looks(engine: AsyncEngine, events: Events, other: asyncpg.Connection) -> None:
    """Each look at rows is one event, with its waiters and its groups; none without waiters."""
    await other.execute("INSERT INTO item (id, name) VALUES (1, ''), (2, '')")
    await other.execute("INSERT INTO account (id, balance) VALUES (1, 0)")
    async with RowWatcher(engine, interval=0.05) as watcher:
        tasks = [
            asyncio.create_task(watcher.wait(Item, 1)),
            asyncio.create_task(watcher.wait(Item, 1)),
            asyncio.create_task(watcher.wait(Item, 2)),
            asyncio.create_task(watcher.wait(Account, 1)),
        ]
        looks: list[WatcherLooked] = []
        await until(lambda: len(gathered(events, looks)) >= 3)
        assert {(each.waiters, each.groups, each.failed) for each in looks} == {(4, 2, False)}
        for each in looks:
            assert 0 < each.seconds <= each.lag
            assert 0 <= each.late
        await other.execute("UPDATE item SET name = 'new'; UPDATE account SET balance = 1")
        await asyncio.gather(*tasks)
    await asyncio.sleep(0)
    assert all(not each.failed for each in events.of(WatcherLooked))


async def test_late(engine: AsyncEngine, events: Events, other: asyncpg.Connection) -> None:
    """A look that had to wait for the event loop says by how much; a first waiter is not late,
    however long the watcher had nothing to look at."""
    await other.execute("INSERT INTO item (id, name) VALUES (1, '')")
    loop = asyncio.get_running_loop()
    looks: list[WatcherLooked] = []
    async with RowWatcher(engine, interval=0.02) as watcher:
        opened_at = loop.time()
        await asyncio.sleep(0.1)
        task = asyncio.create_task(watcher.wait(Item, 1))
        await until(lambda: bool(gathered(events, looks)))
        assert looks[0].late <= looks[0].lag <= loop.time() - opened_at - 0.1
        blocked_until = loop.time() + 0.2
        while loop.time() < blocked_until:
            pass
        await until(lambda: any(each.late > 0.1 for each in gathered(events, looks)))
        assert max(each.lag for each in looks) >= max(each.late for each in looks)
        task.cancel()


async def test_failed(engine: AsyncEngine, database_url: str, other: asyncpg.Connection) -> None:
    """While the server cannot be reached each attempt is a look that has failed, and the lag
    grows; afterwards it is small again."""
    await other.execute("INSERT INTO item (id, name) VALUES (1, '')")
    events = Events()
    looks: list[WatcherLooked] = []

    def failed() -> list[WatcherLooked]:
        return [each for each in gathered(events, looks) if each.failed]

    async with Proxy.to(database_url) as proxy:
        distant = create_async_engine(sqlalchemy_url(proxy.url))
        subscribe(distant, events.append)
        async with RowWatcher(distant, interval=0.02) as watcher:
            task = asyncio.create_task(watcher.wait(Item, 1))
            await until(lambda: bool(gathered(events, looks)))
            proxy.refusing = True
            proxy.drop()
            await until(lambda: len(failed()) >= 3)
            proxy.refusing = False
            await until(lambda: not any(each.failed for each in gathered(events, looks)[-2:]))
            lags = [each.lag for each in failed()]
            assert lags == sorted(lags)
            assert {each.waiters for each in failed()} == {1}
            back = looks[looks.index(failed()[-1]) + 1]
            assert back.lag > lags[-1] > looks[-1].lag
            task.cancel()
        await distant.dispose()


async def test_locked(engine: AsyncEngine, events: Events, other: asyncpg.Connection) -> None:
    """A look at a table that is locked has failed, and the other group of that look has not."""
    await other.execute("INSERT INTO item (id, name) VALUES (1, '')")
    await other.execute("INSERT INTO account (id, balance) VALUES (1, 0)")
    async with RowWatcher(engine, interval=0.02) as watcher:
        tasks = [
            asyncio.create_task(watcher.wait(Item, 1)),
            asyncio.create_task(watcher.wait(Account, 1)),
        ]
        await until(lambda: bool(events.of(WatcherLooked)))
        async with other.transaction():
            await other.execute("LOCK TABLE item")
            looks: list[WatcherLooked] = []
            await until(lambda: any(each.groups == 1 for each in gathered(events, looks)))
            await other.execute("UPDATE account SET balance = 1")
        assert any(each.failed for each in looks)
        await tasks[1]
        await other.execute("UPDATE item SET name = 'new'")
        await tasks[0]


async def test_own_connection(engine: AsyncEngine, events: Events) -> None:
    """The connection of a watcher is outside of the pool: its observers see none of it."""
    async with engine.connect():
        pass
    events.clear()
    async with RowWatcher(engine):
        pass
    assert events == []
