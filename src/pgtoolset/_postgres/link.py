"""A connection of a watcher's own: outside the pool, outside transactions, watched for its loss."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.checkouts import pool_apart
from pgtoolset._postgres.connections import is_closed, keeps_its_backend, terminate_driver
from pgtoolset._postgres.sqlstates import LOCK_NOT_AVAILABLE, sqlstate_of

__all__ = [
    "Busy",
    "Link",
    "LinkLost",
    "is_about_data",
    "is_about_schema",
    "is_locked",
    "is_passing",
]

logger = logging.getLogger("pgtoolset")

#: Seconds that the answer to a statement may take. Connecting may take twice as long.
STATEMENT_TIMEOUT = 5.0

#: Milliseconds that a statement waits for a lock: the statements for other tables wait with it.
LOCK_TIMEOUT = 100

#: Seconds of silence after which a connection that only listens is tested.
HEARTBEAT = 20.0

#: SQLSTATE classes of a lost connection, and of a server that stops or starts.
_LOST = ("08", "57P")

#: SQLSTATE classes of rollbacks, missing resources and locks, and a cancelled statement. The same
#: statement may succeed a moment later.
_PASSING = ("40", "53", "55", "57014")

#: SQLSTATE classes of values: data exceptions, and a parameter that violates a domain's CHECK.
_DATA = ("22", "23514")


#: SQLSTATE classes of statements that do not fit the tables, and of caches from before a DDL
#: statement. Another attempt may find a table that is complete again.
_SCHEMA = ("42", "0A", "XX")


class SettingStatements(Protocol):
    """Settings, as the statements that set them.

    Attributes:
        statements: `SET LOCAL` for each.
    """

    statements: str

    def of_connection(self) -> str:
        """Return `SET` for each."""
        ...


class LinkLost(Exception):
    """The connection is lost; a new one has to start from the beginning."""


class Busy(Exception):
    """The server lives, but did not answer the statement in time. Mostly a table is locked."""


class Link:
    """One connection of asyncpg."""

    def __init__(self, driver: Any, settings: SettingStatements | None) -> None:
        self._driver = driver
        self._settings = settings
        self._keeps_its_backend = keeps_its_backend(driver)
        self._heard: Callable[[str, str], None] | None = None
        self._channels: set[str] = set()

    @classmethod
    async def open(cls, engine: AsyncEngine, settings: SettingStatements | None = None) -> Self:
        """Connect as the engine does, its events included, without a place in its pool.

        Every statement has the settings, but for `lock_timeout`, which is the watcher's own.

        The first connection of an engine is one of its own pool, whose other users wait until
        SQLAlchemy has looked at the server over it. For another pool they would not wait.
        """
        pool = engine.sync_engine.pool
        if engine.dialect.server_version_info is not None:
            pool = pool_apart(pool)
        async with asyncio.timeout(2 * STATEMENT_TIMEOUT):
            fairy: Any = await greenlet_spawn(pool.connect)
        driver = fairy.driver_connection
        fairy.detach()
        link = cls(driver, settings)
        try:
            await link._set()
        except BaseException:
            await link.close()
            raise
        return link

    async def fetch(self, statement: str, *arguments: Sequence[Any]) -> list[Any]:
        """Return the rows of a statement, which is a transaction of its own.

        Raises:
            LinkLost: the connection is lost.
            Busy: the server did not answer in time.
            Exception: any error of the driver.
        """
        try:
            if self._keeps_its_backend:
                return await self._fetch(statement, *arguments)
            return await self._fetch_behind_pooler(statement, *arguments)
        except TimeoutError:
            await self.check()
            raise Busy(
                f"PostgreSQL did not answer within {STATEMENT_TIMEOUT} s. Perhaps the table is "
                "locked, or its statistics are from a time when it was nearly empty: ANALYZE "
                "renews them."
            ) from None
        except Exception as error:
            self._raise_if_lost(error)
            raise

    async def _set(self) -> None:
        if self._keeps_its_backend:
            given = "" if self._settings is None else self._settings.of_connection()
            await self._execute(f"{given} SET lock_timeout = {LOCK_TIMEOUT}")
        elif self._settings is not None:
            # So that one that PostgreSQL refuses is an error now, and not at each look.
            await self._execute(f"BEGIN; {self._settings.statements} ROLLBACK")

    async def _fetch(self, statement: str, *arguments: Sequence[Any]) -> list[Any]:
        rows: list[Any] = await self._driver.fetch(statement, *arguments, timeout=STATEMENT_TIMEOUT)
        return rows

    async def _fetch_behind_pooler(self, statement: str, *arguments: Sequence[Any]) -> list[Any]:
        """Set the limit for this statement alone: its backend serves others afterwards."""
        given = "" if self._settings is None else self._settings.statements
        try:
            await self._execute(f"BEGIN; {given} SET LOCAL lock_timeout = {LOCK_TIMEOUT}")
            return await self._fetch(statement, *arguments)
        finally:
            await self._execute("ROLLBACK")

    async def _execute(self, statement: str) -> None:
        await self._driver.execute(statement, timeout=STATEMENT_TIMEOUT)

    async def check(self) -> None:
        """Raise `LinkLost` where the server does not answer a heartbeat.

        Only a heartbeat shows that a connection is half-open.
        """
        try:
            async with asyncio.timeout(STATEMENT_TIMEOUT):
                await self._driver.fetch("SELECT 1")
        except TimeoutError as error:
            raise self._silence("a heartbeat") from error
        except Exception as error:
            self._raise_if_lost(error)
            raise

    async def listen(self, channels: Sequence[str], heard: Callable[[str, str], None]) -> None:
        """Call `heard` with the channel and payload of each notification on `channels` from now."""
        self._heard = heard
        for channel in channels:
            if channel not in self._channels:
                await self._listen(channel)
                self._channels.add(channel)

    async def close(self) -> None:
        """Close the connection, or terminate it where the server does not answer. Never raises."""
        self._heard = None
        if not is_closed(self._driver):
            await uninterrupted(self._close())

    async def _listen(self, channel: str) -> None:
        try:
            async with asyncio.timeout(STATEMENT_TIMEOUT):
                await self._driver.add_listener(channel, self._on_notification)
        except TimeoutError as error:
            raise self._silence("LISTEN") from error
        except Exception as error:
            self._raise_if_lost(error)
            raise

    async def _close(self) -> None:
        try:
            # asyncpg's own timeout does not cover its request to cancel a statement.
            async with asyncio.timeout(1.5):
                await self._driver.close(timeout=1)
        except Exception:
            logger.debug(
                "The connection of a RowWatcher could not be closed, and is terminated.",
                exc_info=True,
            )
        finally:
            terminate_driver(self._driver)

    def _on_notification(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        if self._heard is not None:
            self._heard(channel, payload)

    def _silence(self, request: str) -> LinkLost:
        """Terminate the connection, and return the error that says why."""
        terminate_driver(self._driver)
        return LinkLost(f"the server did not answer {request} within {STATEMENT_TIMEOUT} s")

    def _raise_if_lost(self, error: Exception) -> None:
        state = sqlstate_of(error) or ""
        # asyncpg's own errors about a connection have no SQLSTATE, and a new connection is free of
        # them. They are compared by name, because this module does not import the driver.
        own = type(error).__name__ in ("InterfaceError", "InternalClientError")
        if is_closed(self._driver) or isinstance(error, OSError) or own or state.startswith(_LOST):
            terminate_driver(self._driver)
            raise LinkLost(f"{type(error).__name__}: {error}") from error


def is_passing(error: Exception) -> bool:
    """Return whether the same statement may succeed a moment later."""
    return isinstance(error, Busy) or (sqlstate_of(error) or "").startswith(_PASSING)


def is_about_schema(error: Exception) -> bool:
    """Return whether a statement did not fit the tables, or the caches about them."""
    # asyncpg's own error about its cache of types has no SQLSTATE.
    name = type(error).__name__
    return name == "OutdatedSchemaCacheError" or (sqlstate_of(error) or "").startswith(_SCHEMA)


def is_locked(error: Exception) -> bool:
    """Return whether a table or a row is locked."""
    return sqlstate_of(error) == LOCK_NOT_AVAILABLE


def is_about_data(error: Exception) -> bool:
    """Return whether asyncpg could not encode a parameter, or PostgreSQL refused its value."""
    state = sqlstate_of(error) or ""
    return isinstance(error, (ValueError, TypeError)) or state.startswith(_DATA)
