"""Connections without SQLAlchemy, with the same methods on both drivers: those of asyncpg's own.

Each statement is a transaction of its own outside of `transaction()`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from importlib import import_module
from typing import Any

from sqlalchemy import URL

from pgtoolset._cancellation import Requests
from pgtoolset._postgres.urls import connect_arguments, engine_url

#: Arguments that SQLAlchemy's adapter removes before it calls asyncpg.
_NOT_FOR_THE_DRIVER = ("async_creator_fn", "async_fallback", "prepared_statement_cache_size")


#: libpq's state of a connection on which a statement runs, `PQTRANS_ACTIVE`.
_ACTIVE = 1

#: How often a connection is looked at that a COPY may still be read from, each hundredth second.
_LOOKS = 100


async def connect_asyncpg(url: URL, database: str) -> Any:
    """Return a connection of asyncpg."""
    # Imported late, because `import pgtoolset` imports no driver.
    asyncpg = import_module("asyncpg")
    arguments = _arguments(url) | connect_arguments(url)
    # Without the cache no prepared statement is looked for on another backend of a pooler.
    return await asyncpg.connect(**(arguments | {"database": database, "statement_cache_size": 0}))


async def connect_psycopg(url: URL, database: str) -> PlainPsycopg:
    """Return a connection of psycopg with the methods of one of asyncpg.

    psycopg 3.2 waits with `asyncio.wait_for`, which before Python 3.12 drops a cancellation that
    arrives together with the answer. https://github.com/python/cpython/issues/86296
    """
    psycopg = import_module("psycopg")
    requests = Requests()
    raw = await psycopg.AsyncConnection.connect(
        **(_arguments(url) | {"dbname": database}),
        autocommit=True,
        prepare_threshold=None,
        cursor_factory=psycopg.AsyncRawCursor,
        row_factory=_row_factory,
    )
    try:
        requests.raise_swallowed()
    except asyncio.CancelledError:
        terminate_psycopg(raw)
        raise
    return PlainPsycopg(raw, psycopg)


def _arguments(url: URL) -> dict[str, Any]:
    translated = engine_url(url)
    arguments = translated.get_dialect()().create_connect_args(translated)[1]
    return {name: each for name, each in arguments.items() if name not in _NOT_FOR_THE_DRIVER}


#: What ends connections of psycopg, so that it is not collected before its end.
_ending: set[asyncio.Task[None]] = set()


async def cancel_psycopg(raw: Any, timeout: float) -> bool:
    """Cancel what runs on a connection of psycopg; return whether the server was asked to.

    It is not where that would block the process.

    Before libpq 17 psycopg waits for the server and lets no other task or thread run meanwhile; a
    network that does not answer would stop the program. PostgreSQL finishes the statement then.
    https://www.psycopg.org/psycopg3/docs/api/connections.html#psycopg.Connection.cancel_safe
    """
    if not import_module("psycopg").capabilities.has_cancel_safe():
        return False
    await raw.cancel_safe(timeout=timeout)
    return True


def terminate_psycopg(raw: Any) -> None:
    """Close the socket of a connection at once.

    Where a task waits for an answer, its event loop watches the socket: closed, its number could
    belong to another socket before the task is woken. Shut down, it wakes the task, and is closed
    after that: the task may have the answer already, and see nothing of the loss.
    """
    # psycopg 3.2 reads a COPY without the lock.
    is_free = not raw.lock.locked() and raw.pgconn.transaction_status != _ACTIVE
    if is_free:
        raw.pgconn.finish()
    else:
        with socket.socket(fileno=os.dup(raw.pgconn.socket)) as duplicate, suppress(OSError):
            duplicate.shutdown(socket.SHUT_RDWR)
    pool = getattr(raw, "_pool", None)
    if pool is not None and not getattr(pool, "close_returns", False):
        pool = None
    if pool is not None or not is_free:
        task = asyncio.get_running_loop().create_task(_end(raw, pool))
        _ending.add(task)
        task.add_done_callback(_ending.discard)
        task.add_done_callback(lambda _: raw.pgconn.finish())  # one that was never begun, too


async def _end(raw: Any, pool: Any) -> None:
    """Close the connection when no task uses it, and give it back to psycopg's own pool, if any.

    The pool makes another one in its place. psycopg's `close()` gives back only a connection that
    is not closed.
    """
    try:
        for _ in range(_LOOKS):
            if raw.pgconn.transaction_status != _ACTIVE:
                break  # the task that reads a COPY has found that the connection is lost
            await asyncio.sleep(0.01)
        async with raw.lock:
            pass
    finally:
        raw.pgconn.finish()  # where the event loop ends, each task that waits ends with it
    if pool is not None:
        with suppress(Exception):  # it has it already
            await pool.putconn(raw)


class Row(tuple[Any, ...]):
    """A row whose values are found by their number, and by the name of their column."""

    names: tuple[str, ...] = ()

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self.names.index(key) if isinstance(key, str) else key)


def _row_factory(cursor: Any) -> Any:
    names = tuple(column.name for column in cursor.description or ())
    return type("NamedRow", (Row,), {"names": names})


class PlainPsycopg:
    """A connection of psycopg with the methods of one of asyncpg, and its parameters `$1`."""

    def __init__(self, raw: Any, psycopg: Any) -> None:
        self._raw = raw
        self._psycopg = psycopg

    async def execute(self, statement: str, *values: Any, timeout: float | None = None) -> None:
        """Run a statement, or several without values; `TimeoutError` after the timeout."""
        await self._run(statement, values, timeout)

    async def fetch(self, statement: str, *values: Any) -> list[Row]:
        """Return all rows of a query."""
        cursor = await self._run(statement, values)
        rows: list[Row] = await cursor.fetchall()
        return rows

    async def fetchrow(self, statement: str, *values: Any) -> Row | None:
        """Return the first row of a query."""
        rows = await self.fetch(statement, *values)
        return rows[0] if rows else None

    async def fetchval(self, statement: str, *values: Any) -> Any:
        """Return the first value of the first row of a query."""
        row = await self.fetchrow(statement, *values)
        return None if row is None else row[0]

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """Return a block that is a transaction."""
        block: AbstractAsyncContextManager[Any] = self._raw.transaction()
        return block

    def get_server_pid(self) -> int:
        """Return the process id that libpq got as it connected."""
        return int(self._raw.pgconn.backend_pid)

    def is_closed(self) -> bool:
        """Whether the connection is closed or lost."""
        return bool(self._raw.closed)

    async def close(self, *, timeout: float) -> None:
        """Close the connection, and cancel what runs on it.

        Args:
            timeout: seconds that the server may take for that.
        """
        try:
            if not self._raw.closed and self._raw.lock.locked():
                async with asyncio.timeout(timeout):
                    await cancel_psycopg(self._raw, timeout)
        finally:
            self.terminate()

    def terminate(self) -> None:
        """Close the socket at once."""
        with suppress(Exception):
            terminate_psycopg(self._raw)

    async def _run(
        self, statement: str, values: Sequence[Any], timeout: float | None = None
    ) -> Any:
        if self._raw.closed:
            # As asyncpg says that it has sent nothing.
            raise self._psycopg.InterfaceError("connection is closed")
        requests = Requests()
        async with asyncio.timeout(timeout):
            cursor = await self._raw.execute(statement, values or None)
        requests.raise_swallowed()  # as in `connect_psycopg`
        return cursor
