"""The live part of the page: one stream of events for each window, and one task that feeds all.

The task reads over one connection beside the pool, and one more for each section whose table is
locked; it ends with the last window. A `RowWatcher` wakes it when the status of an order on the
page changes, whoever has changed it; a request that writes wakes it too. Otherwise it looks once a
second.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from examples.shop.models import Order
from examples.shop.page import board
from examples.shop.page.counters import Counters
from examples.shop.page.holds import TillHolds
from examples.shop.page.lock_tree import lock_tree
from examples.shop.page.tables import SHORT_WAIT, Tables, ended
from examples.shop.page.visitors import Visitors
from examples.shop.settings import Settings
from pgtoolset import RowWatcher
from pgtoolset.errors import PgToolsetError

logger = logging.getLogger(__name__)

#: Seconds between two looks: at least, while a request writes, and otherwise.
SHORTEST, BUSY, CALM = 0.1, 0.25, 1.0
#: Seconds for a connection, and for a look: a server that hangs breaks no connection.
LONGEST_LOOK = 10.0
#: Seconds after which an idle stream sends an event, so that proxies keep it, and a window notices
#: where nothing arrives any more.
HEARTBEAT = 5.0
#: Milliseconds after which a browser that has lost its stream asks for another.
RECONNECT = "retry: 1000\n\n"


class Live:
    """What all windows show. A window that is slow gets the latest, and nothing in between."""

    def __init__(
        self,
        settings: Settings,
        observer: AsyncEngine,
        watcher: RowWatcher,
        counters: Counters,
        visitors: Visitors,
        holds: TillHolds,
    ) -> None:
        self._settings = settings
        self._observer = observer
        self._watcher = watcher
        self._counters = counters
        self._visitors = visitors
        self._holds = holds
        self._sections: dict[str, tuple[int, str]] = {}
        self._version = 0
        self._news = asyncio.Event()
        self._touched = asyncio.Event()
        self._next_look = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock_waits = False
        self.windows = 0
        self.is_closed = False

    def touch(self) -> None:
        """Something may have changed: look now."""
        self._touched.set()

    async def looked(self) -> None:
        """Wait until the windows have what is true now; at once where none is open."""
        self.touch()
        with contextlib.suppress(TimeoutError):  # PostgreSQL is away
            async with asyncio.timeout(2 * CALM):
                for _ in range(2):  # the first may have begun before
                    if self.windows:
                        await self._next_look.wait()

    def close(self) -> None:
        """End every stream."""
        self.is_closed = True
        self._news.set()

    async def wait_closed(self) -> None:
        """Wait until the task has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextlib.contextmanager
    def window(self) -> Iterator[None]:
        """Count a window until the block ends. The first starts the task, the last ends it."""
        self.windows += 1
        if self.windows == 1:
            self._sections.clear()  # what was true when the last window was closed
            self._task = asyncio.create_task(self._feed())
            self._tasks.add(self._task)
            self._task.add_done_callback(self._tasks.discard)
        self.touch()
        try:
            yield
        finally:
            self.windows -= 1
            self.touch()
            if not self.windows and self._task is not None:
                self._task.cancel()

    async def events(self) -> AsyncIterator[str]:
        """What has changed since the last event, until the application ends."""
        heartbeat = event("heartbeat", json.dumps({"every": HEARTBEAT}))
        yield RECONNECT + heartbeat
        sent = 0
        while not self.is_closed:
            news = self._news
            fresh = [
                event(name, data)
                for name, (version, data) in self._sections.items()
                if version > sent
            ]
            sent = self._version
            if fresh:
                yield "".join(fresh)
                continue
            try:
                async with asyncio.timeout(HEARTBEAT):
                    await news.wait()
            except TimeoutError:
                yield heartbeat

    def publish(self, name: str, value: object) -> None:
        """Give each window a new value of a section, where it is another than before."""
        data = json.dumps(value, default=str)
        if self._sections.get(name, (0, None))[1] != data:
            self._version += 1
            self._sections[name] = (self._version, data)
            self._news = notified(self._news)

    async def _feed(self) -> None:
        followed: dict[int, asyncio.Task[None]] = {}
        tables = Tables(self._observer, self._settings, self.touch)
        try:
            while True:
                try:
                    async with self._connected() as connection:
                        while True:
                            self._touched.clear()
                            async with asyncio.timeout(LONGEST_LOOK):
                                await self._look(connection, tables, followed)
                            self._next_look = notified(self._next_look)
                            await self._pause()
                except Exception as error:
                    if not isinstance(error, SQLAlchemyError | PgToolsetError | OSError):
                        logger.exception("The page cannot be fed")
                    self.publish("database", {"answers": False, "error": type(error).__name__})
                    await asyncio.sleep(CALM)
        finally:
            self._next_look = notified(self._next_look)
            await tables.close()
            await ended(followed)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[AsyncConnection]:
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(LONGEST_LOOK):
                connection = await stack.enter_async_context(self._observer.connect())
                await connection.execute(SHORT_WAIT)
            yield connection

    async def _look(
        self,
        connection: AsyncConnection,
        tables: Tables,
        followed: dict[int, asyncio.Task[None]],
    ) -> None:
        found = await tables.read(connection)
        if "till" in found:
            found["till"] |= self._holds.as_json()
        for name, value in found.items():
            self.publish(name, value)
        if "orders" in found:
            self._follow([order["id"] for order in found["orders"]], followed)
        self.publish("unread", tables.unread)
        locks = await lock_tree(connection, self._settings)
        self._lock_waits = bool(locks)
        self.publish("locks", locks)
        watching = await board.watcher_connections(connection, self._settings.watcher_name)
        counters = self._counters.as_json()
        self.publish("counters", {**counters, "watching": watching, "windows": self.windows})
        self.publish("tour", {"is_under_way": self._visitors.tour_is_under_way})
        self.publish("database", {"answers": True})

    async def _pause(self) -> None:
        await asyncio.sleep(SHORTEST)
        busy = self._lock_waits or self._counters.writing or self._holds.is_held
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BUSY if busy else CALM):
                await self._touched.wait()

    def _follow(self, order_ids: list[int], followed: dict[int, asyncio.Task[None]]) -> None:
        """Have the watcher announce changes of these orders, and of no others."""
        for order_id in [each for each in followed if each not in order_ids]:
            followed.pop(order_id).cancel()
        for order_id in order_ids:
            if order_id not in followed or followed[order_id].done():
                followed[order_id] = asyncio.create_task(
                    follow(self._watcher, order_id, self._counters, self.touch)
                )


def event(name: str, data: str) -> str:
    """An event of the stream."""
    return f"event: {name}\ndata: {data}\n\n"


def notified(event: asyncio.Event) -> asyncio.Event:
    """Wake all that wait for the event; return the one for the next time."""
    event.set()
    return asyncio.Event()


async def follow(
    watcher: RowWatcher, order_id: int, counters: Counters, announce: Callable[[], None]
) -> None:
    """Announce each change of the status of an order until the watcher is closed."""
    with contextlib.suppress(PgToolsetError), counters.waiter():
        async with watcher.changes(Order, order_id, columns=[Order.status]) as changes:
            async for _ in changes:
                announce()
