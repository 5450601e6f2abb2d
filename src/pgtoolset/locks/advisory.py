"""`advisory_lock`: a lock on a key whose meaning only the application knows."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset._arguments import (
    advisory_numbers,
    check_flag,
    milliseconds,
    optional_seconds,
    shown,
    writable_session,
)
from pgtoolset._postgres.advisory import acquire
from pgtoolset._postgres.lookout import Lookout, Wanted
from pgtoolset.locks._block import LockedBlock
from pgtoolset.types import AdvisoryKey, Duration

__all__ = ["advisory_lock"]


def advisory_lock(
    session: AsyncSession,
    key: AdvisoryKey,
    *,
    shared: bool = False,
    nowait: bool = False,
    timeout: Duration | None = None,
) -> AbstractAsyncContextManager[bool]:
    """Open a `get_transaction` block that holds the advisory lock on `key`.

    PostgreSQL releases the lock with the transaction. Outermost, that is the end of the block, by
    commit or rollback. Nested, it is the end of the outermost transaction, or the rollback of this
    level. So the next holder sees all that was written under the lock, and no lock is left on a
    pooled connection or on a server behind a pooler. A commit or rollback inside the block releases
    it too.

    Take the lock first and change rows afterwards: other sessions would wait for those rows while
    this one waits for the lock. Changes that are pending at the start of a nested block are flushed
    when the lock is held; the rollback of the level around releases it then.

    Args:
        session: an `AsyncSession`. A session that holds the lock already does not wait for it.
        key: an `int` of 64 bits, a pair of `int` of 32 bits, or a `str`, of which the first 64 bits
            of the SHA-256 are the key. All applications on one database share these keys.
        shared: share the lock with other sessions that ask for it with `shared=True`.
        nowait: yield `False` at once where another session has the lock.
        timeout: how long to wait: seconds, a `timedelta`, or a number with a unit such as
            `"500ms"`. `None` leaves that to the connection's `lock_timeout`; PostgreSQL's default
            waits without limit.

    Returns:
        An async context manager that yields `True`; with `nowait`, `False` where the lock is taken.

    Raises:
        LockTimeoutError: the lock could not be acquired in time; the error names the blockers. The
            transaction around the block is still usable.
        TransactionStateError: the session's connection is in AUTOCOMMIT, where a lock would end
            with its own statement.
        ValueError, TypeError: an argument is not valid; raised before any SQL.

    Example:
        >>> async with advisory_lock(session, "nightly report", nowait=True) as is_mine:
        ...     if is_mine:
        ...         account = await session.get_one(Account, 1)

    See https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS
    """
    sync = writable_session(session, "advisory_lock")
    numbers = advisory_numbers("key", key)
    check_flag("shared", shared)
    check_flag("nowait", nowait)
    seconds = optional_seconds("timeout", timeout)
    mode = "SHARE" if shared else "EXCLUSIVE"

    def take(lookout: Lookout, connection: Connection) -> bool:
        limit = lookout.limit()
        action = f"take the advisory lock {shown(key)} in {mode} mode"
        wanted = Wanted(action, tables=(), mode=mode, kind="advisory", key=shown(key))
        lookout.watch(connection, wanted)
        lookout.acquired = acquire(
            connection, numbers, shared=shared, nowait=nowait, milliseconds=milliseconds(limit)
        )
        return lookout.acquired

    return LockedBlock(session, sync.connection, take, 0 if nowait else seconds)
