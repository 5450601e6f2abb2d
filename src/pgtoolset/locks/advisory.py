"""`advisory_lock`: a lock on a key that only the application knows the meaning of."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from pgtoolset._arguments import check_flag, optional_seconds, sync_session
from pgtoolset._arguments import milliseconds as to_milliseconds
from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.advisory import SessionLock, acquire
from pgtoolset._postgres.locks import isolation_level_of
from pgtoolset._postgres.lookout import Lookout
from pgtoolset._postgres.sqlstates import LOCK_NOT_AVAILABLE, sqlstate_of
from pgtoolset.transactions import get_transaction
from pgtoolset.types import AdvisoryKey, Duration

__all__ = ["advisory_lock"]

logger: logging.Logger = logging.getLogger("pgtoolset")


def advisory_lock(
    session: AsyncSession,
    key: AdvisoryKey,
    *,
    shared: bool = False,
    nowait: bool = False,
    timeout: Duration | None = None,
) -> AbstractAsyncContextManager[bool]:
    """A block that is a `get_transaction` and holds the advisory lock on `key` until it ends.

    It is held on the session's own connection. Outermost, it is released by the COMMIT or ROLLBACK
    itself, so whoever gets it next sees what the block has written. Nested, it is released at the
    end of the block, and what the block wrote is only seen when the transaction around it commits.
    A commit or rollback inside the block releases it too. It is never carried into the pool.

    Args:
        session: an `AsyncSession`.
        key: an `int` of 64 bits, a pair of `int` of 32 bits, or a `str`, of which the first 64 bits
            of its SHA-256 are taken. The three kinds of application that share a database must
            agree on who uses which.
        shared: several may hold it together, as long as nobody holds it alone.
        nowait: yield `False` at once where somebody else has it.
        timeout: how long to wait: seconds, a `timedelta`, or a number with a unit such as
            `"500ms"`. `None` leaves that to the connection's `lock_timeout`, which by default is
            for ever.

    Returns:
        An async context manager that yields `True`; with `nowait`, `False` where the lock is taken.

    Raises:
        LockTimeoutError: it was not to be had in time; the error names who was in the way.
        ValueError, TypeError: an argument is not what it must be; before any SQL.

    Example:
        >>> async with advisory_lock(session, "nightly report", nowait=True) as mine:
        ...     if mine:
        ...         account = await session.get_one(Account, 1)

    See https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS
    """
    sync = sync_session(session)
    numbers = key_numbers(key)
    check_flag("shared", shared)
    check_flag("nowait", nowait)
    milliseconds = to_milliseconds(optional_seconds("timeout", timeout))
    return _block(session, sync, key, numbers, shared, nowait, milliseconds)


@asynccontextmanager
async def _block(
    session: Any,
    sync: Session,
    key: AdvisoryKey,
    numbers: tuple[int, ...],
    shared: bool,
    nowait: bool,
    milliseconds: int | None,
) -> AsyncIterator[bool]:
    # On a session that is bound to a connection the block's transaction may be a part of a longer
    # one.
    outermost = not session.in_transaction() and not isinstance(sync.get_bind(), Connection)
    lock: SessionLock | None = None
    try:
        async with get_transaction(session):
            connection: AsyncConnection = await session.connection()
            assert connection.sync_connection is not None
            if not outermost or isolation_level_of(connection.sync_connection) == "AUTOCOMMIT":
                lock = SessionLock(connection.sync_connection, sync, numbers, shared)
            yield await _acquire(connection, lock, key, numbers, shared, nowait, milliseconds)
    finally:
        # After the savepoint: its ROLLBACK puts an aborted transaction right, and only then is
        # unlocking possible.
        if lock is not None:
            await uninterrupted(lock.release())


async def _acquire(
    connection: AsyncConnection,
    lock: SessionLock | None,
    key: AdvisoryKey,
    numbers: tuple[int, ...],
    shared: bool,
    nowait: bool,
    milliseconds: int | None,
) -> bool:
    if lock is not None and lock.is_held_already():
        return True
    assert connection.sync_connection is not None
    seconds = None if milliseconds is None or nowait else milliseconds / 1000
    async with Lookout(seconds) as lookout:
        lookout.watch(connection.sync_connection)
        try:
            if lock is not None:
                lock.expect()
            taken = await acquire(
                connection,
                numbers,
                shared=shared,
                nowait=nowait,
                milliseconds=milliseconds,
                until_commit=lock is None,
            )
        except DBAPIError as error:
            if sqlstate_of(error) != LOCK_NOT_AVAILABLE:
                raise
            mode = "SHARE" if shared else "EXCLUSIVE"
            what = f"take the advisory lock {key!r} in {mode} mode"
            raise await lookout.timed_out(what, tables=(), mode=mode) from error
    if lock is not None:
        lock.settle(taken)
    return taken


def key_numbers(key: object) -> tuple[int, ...]:
    """The key as PostgreSQL takes it: one bigint or two int4."""
    if isinstance(key, str):
        return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True),)
    if _is_int(key):
        return (_in_range(key, 64),)
    if isinstance(key, tuple) and len(key) == 2 and all(map(_is_int, key)):
        return tuple(_in_range(number, 32) for number in key)
    raise TypeError(f"key must be an int, a pair of int or a str, not {key!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in_range(number: Any, bits: int) -> int:
    if not -(2 ** (bits - 1)) <= number < 2 ** (bits - 1):
        raise ValueError(f"key must be of {bits} bits with a sign, which {number} is not")
    return int(number)
