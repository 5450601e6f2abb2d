"""What the page reads of the tables, also while another session has locked some of them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from examples.shop.page import board
from examples.shop.settings import Settings

Read = Callable[[AsyncConnection], Awaitable[Any]]

#: The parts of the page that come from tables, each with its query.
SECTIONS: dict[str, Read] = {
    "orders": board.orders,
    "products": board.products,
    "till": board.till,
}

#: How long the common connection waits for a lock. Only ACCESS EXCLUSIVE makes a SELECT wait.
SHORT_WAIT = text("SET lock_timeout = '100ms'")
RENAME = text("SELECT pg_catalog.set_config('application_name', :name, false)")
LOCK_NOT_AVAILABLE = "55P03"


class Tables:
    """Reads each section over a common connection. A section whose table is locked leaves it to a
    connection of its own, which waits: so the others go on, and the lock tree has the wait.

    Parameters:
        announce: called when a section that had to wait can be read.
    """

    def __init__(
        self, observer: AsyncEngine, settings: Settings, announce: Callable[[], None]
    ) -> None:
        self._observer = observer
        self._name = settings.reader_name
        self._announce = announce
        self._waiting: dict[str, asyncio.Task[None]] = {}

    @property
    def unread(self) -> list[str]:
        """The sections that wait for a lock."""
        return sorted(name for name, task in self._waiting.items() if not task.done())

    async def read(self, connection: AsyncConnection) -> dict[str, Any]:
        """The sections that can be read now. `connection` is one on which `SHORT_WAIT` was run."""
        found = {}
        for name, read in SECTIONS.items():
            if name in self.unread:
                continue
            try:
                found[name] = await read(connection)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
                    raise
                self._wait_for(name)
        return found

    async def close(self) -> None:
        """Wait for no lock any more."""
        await ended(self._waiting)

    def _wait_for(self, name: str) -> None:
        task = self._waiting[name] = asyncio.create_task(self._wait(SECTIONS[name]))
        task.add_done_callback(self._note_end)

    async def _wait(self, read: Read) -> None:
        async with self._observer.connect() as connection:
            await connection.execute(RENAME, {"name": self._name})
            await read(connection)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        # An error here has the next look too, which says so.
        if not task.cancelled() and task.exception() is None:
            self._announce()


async def ended(tasks: dict[Any, asyncio.Task[None]]) -> None:
    """Cancel tasks, wait for their end and forget them."""
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    tasks.clear()
