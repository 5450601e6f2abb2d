"""A connection of a watcher's own, outside any transaction and outside the pool, that knows when it
is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Self

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.sqlstates import sqlstate_of

__all__ = ["Busy", "Link", "LinkLost", "is_about_data", "is_passing"]

logger = logging.getLogger("pgtoolset")

#: Seconds that a statement may take, a connection may take to open, and a heartbeat may take to be
#: answered.
PATIENCE = 5.0

#: Seconds of silence after which a connection that only listens is asked for a sign of life.
HEARTBEAT = 20.0

#: Connection exceptions, and what a server says that shuts down, has shut down or does not start
#: yet.
_LOST = ("08", "57P")

#: Resources, locks, rollbacks, a cancelled statement: the same statement may succeed a moment
#: later.
_PASSING = ("40", "53", "55", "57014")


class LinkLost(Exception):
    """The connection is gone; the next one starts anew."""


class Busy(Exception):
    """The server is there, but did not answer the statement in time: mostly a table is locked."""


class Link:
    """One connection."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._heard: Callable[[str, str], None] | None = None
        self._channels: set[str] = set()

    @classmethod
    async def open(cls, engine: AsyncEngine) -> Self:
        """A new connection with everything that the engine gives to its own, and none of the pool's
        places taken."""
        pool = engine.sync_engine.pool.recreate()
        async with asyncio.timeout(2 * PATIENCE):
            fairy: Any = await greenlet_spawn(pool.connect)
        driver = fairy.driver_connection
        fairy.detach()
        return cls(driver)

    async def fetch(self, statement: str, *arguments: Sequence[Any]) -> list[Any]:
        """The rows of a statement, in an implicit transaction of its own.

        Raises `LinkLost` and `Busy`; every other error is the driver's.
        """
        try:
            rows: list[Any] = await self._driver.fetch(statement, *arguments, timeout=PATIENCE)
            return rows
        except TimeoutError:
            await self.check()
            raise Busy(
                f"PostgreSQL did not answer within {PATIENCE} s; a lock on the table may be in the way, or "
                "statistics from a time when it was nearly empty, which ANALYZE renews"
            ) from None
        except Exception as error:
            self._raise_if_lost(error)
            raise

    async def check(self) -> None:
        """Raise `LinkLost` where the server does not answer at all. A half-open connection is told
        by nothing else."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self._driver.fetch("SELECT 1")
        except TimeoutError as error:
            self._driver.terminate()
            raise LinkLost(f"the server did not answer a heartbeat within {PATIENCE} s") from error
        except Exception as error:
            self._raise_if_lost(error)
            raise

    async def listen(self, channels: Sequence[str], heard: Callable[[str, str], None]) -> None:
        """Have `heard` called with the channel and the payload of each notification on `channels`,
        from now on."""
        for channel in channels:
            if channel not in self._channels:
                self._heard = heard
                try:
                    async with asyncio.timeout(PATIENCE):
                        await self._driver.add_listener(channel, self._on_notification)
                except TimeoutError as error:
                    self._driver.terminate()
                    raise LinkLost(
                        f"the server did not answer LISTEN within {PATIENCE} s"
                    ) from error
                except Exception as error:
                    self._raise_if_lost(error)
                    raise
                self._channels.add(channel)

    async def close(self) -> None:
        """Close the connection, or drop it where that is not answered. Never raises."""
        self._heard = None
        if not self._driver.is_closed():
            await uninterrupted(self._close())

    async def _close(self) -> None:
        try:
            # asyncpg does not count the time in which it tells the server of a statement that was
            # cancelled.
            async with asyncio.timeout(1.5):
                await self._driver.close(timeout=1)
        except Exception:
            logger.debug("closing a watcher's connection failed; it is dropped", exc_info=True)
        finally:
            self._driver.terminate()

    def _on_notification(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        if self._heard is not None:
            self._heard(channel, payload)

    def _raise_if_lost(self, error: Exception) -> None:
        state = sqlstate_of(error) or ""
        # The driver's own errors about its connection have no SQLSTATE, and a new connection puts
        # all of them right.
        own = type(error).__name__ in ("InterfaceError", "InternalClientError")
        if self._driver.is_closed() or isinstance(error, OSError) or own or state.startswith(_LOST):
            self._driver.terminate()
            raise LinkLost(f"{type(error).__name__}: {error}") from error


def is_passing(error: Exception) -> bool:
    """Whether the same statement may succeed a moment later."""
    return isinstance(error, Busy) or (sqlstate_of(error) or "").startswith(_PASSING)


def is_about_data(error: Exception) -> bool:
    """Whether a parameter is to blame: asyncpg could not encode it, or PostgreSQL not read it."""
    return isinstance(error, (ValueError, TypeError)) or (sqlstate_of(error) or "").startswith("22")
