"""A cancellation in whose place a driver raises an error of its own, as where the network ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    create_async_engine,
)

from pgtoolset import RowWatcher, wait_for_row_change
from pgtoolset.watch import _hub
from tests.support import Item


class Network:
    """A database that cannot be reached: each connection waits until it is cancelled, and the first
    one makes an error of that.

    Attributes:
        connecting: set when a connection waits.
        attempts: the number of connections so far.
        engine: an engine whose connections wait.
    """

    def __init__(self, url: str) -> None:
        self.connecting = asyncio.Event()
        self.attempts = 0
        self.engine = create_async_engine(url, async_creator=self._connect)

    async def _connect(self) -> Any:
        self.attempts += 1
        self.connecting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if self.attempts > 1:
                raise
            raise ConnectionError("the network ended at the same moment") from None


@pytest.fixture
async def network(database_url: str) -> AsyncIterator[Network]:
    network = Network(database_url)
    yield network
    await network.engine.dispose()


async def in_wait_for_row_change(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await wait_for_row_change(session, Item, 1, timeout=60)


LOOPS = [in_wait_for_row_change]


@pytest.mark.parametrize("loop", LOOPS)
async def test_loops(network: Network, loop: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    """A loop that tries again after an error ends with the cancellation that became one."""
    task = asyncio.ensure_future(loop(network.engine))
    await network.connecting.wait()
    task.cancel()
    await asyncio.wait([task], timeout=30)
    was_cancelled = task.cancelled()
    task.cancel()
    await asyncio.wait([task])
    assert was_cancelled and network.attempts == 1


@pytest.mark.parametrize("loop", LOOPS)
async def test_timeouts(network: Network, loop: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    """A timeout of the caller around such a loop raises `TimeoutError`."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(30), asyncio.timeout(0.05):
            await loop(network.engine)
    assert network.attempts == 1


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_watcher(
    network: Network, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watcher that connects again ends with one cancellation, which became an error."""
    monkeypatch.setattr(_hub, "CLOSE_RETRY", 3600.0)
    async with asyncio.timeout(30):
        async with RowWatcher(engine, interval=0.05) as watcher:
            hub: Any = watcher._hub
            hub._engine = network.engine
            await hub._first_link.close()
            hub._wake.set()
            await network.connecting.wait()
