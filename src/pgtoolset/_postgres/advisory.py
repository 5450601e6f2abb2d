"""Advisory locks: taking one, and a session's own that never reaches the pool.

https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADVISORY-LOCKS
"""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from pgtoolset._cancellation import uninterrupted

logger = logging.getLogger("pgtoolset")

#: In the `info` of a DBAPI connection: the session-level locks that blocks hold on it.
_KEY = "pgtoolset.advisory_locks"

#: Seconds that an unlock may take before its connection is discarded, and the lock with it.
_UNLOCK_TIMEOUT = 10.0


async def acquire(
    connection: AsyncConnection,
    numbers: tuple[int, ...],
    *,
    shared: bool,
    nowait: bool,
    milliseconds: int | None,
    until_commit: bool,
) -> bool:
    """Take the lock, until the transaction ends or until it is unlocked. False with `nowait` where
    it is taken."""
    function = f"pg_{'try_' * nowait}advisory_{'xact_' * until_commit}lock{'_shared' * shared}"
    arguments = "CAST(:a AS bigint)" if len(numbers) == 1 else "CAST(:a AS int), CAST(:b AS int)"
    call = f"pg_catalog.{function}({arguments})"
    parameters: dict[str, Any] = dict(zip("ab", numbers, strict=False))
    if nowait:
        return bool(await connection.scalar(text(f"SELECT {call}"), parameters))
    if milliseconds is None:
        await connection.execute(text(f"SELECT {call}"), parameters)
    else:
        # The columns are computed from left to right, and the lock waits with the setting as it is
        # at that moment. The outer query restores what the inner one has found; a failure does so
        # with the savepoint or transaction.
        await connection.execute(
            text(
                "SELECT pg_catalog.set_config('lock_timeout', s.earlier, true) FROM ("
                "SELECT pg_catalog.current_setting('lock_timeout') AS earlier, "
                f"pg_catalog.set_config('lock_timeout', :timeout, true) AS used, {call} AS locked OFFSET 0) AS s"
            ),
            parameters | {"timeout": f"{milliseconds}ms"},
        )
    return True


class SessionLock:
    """A session-level lock on `connection`, for a block that is a part of a longer transaction.

    PostgreSQL keeps it until it is unlocked or the connection ends. It is unlocked at the end of
    its block; where the transaction ends before, then; and at the latest when the connection goes
    back to the pool. What cannot be unlocked is discarded with its connection.
    """

    __slots__ = (
        "_connection",
        "_driver",
        "_held",
        "_listening",
        "_locks",
        "_numbers",
        "_session",
        "_shared",
    )

    def __init__(
        self, connection: Connection, session: Session, numbers: tuple[int, ...], shared: bool
    ) -> None:
        self._connection = connection
        self._driver: Any = connection.connection.driver_connection
        self._locks: list[SessionLock] = connection.info.setdefault(_KEY, [])
        self._session = session
        self._numbers = numbers
        self._shared = shared
        self._held: bool | None = None
        self._listening = False
        pool = connection.engine.pool
        if not event.contains(pool, "checkin", _before_pool):
            event.listen(pool, "checkin", _before_pool)

    def is_held_already(self) -> bool:
        """Whether a block around this one has the same lock, so that nothing needs to be asked of
        the server.

        Of two holds on one lock it could not be told, after a cancellation, whether there is one or
        two.
        """
        return any(
            lock._numbers == self._numbers and (self._shared or not lock._shared)
            for lock in self._locks
        )

    def expect(self) -> None:
        """From now on it may be held: whether a statement that is cut short got the lock, nobody
        knows."""
        self._locks.append(self)
        event.listen(self._session, "after_transaction_end", self._after_transaction_end)
        self._listening = True

    def settle(self, taken: bool) -> None:
        """It is known whether it is held."""
        self._held = taken
        if not taken and self in self._locks:
            self._locks.remove(self)

    async def release(self) -> None:
        """Unlock it where that has not happened yet. Never raises."""
        if self._listening:
            self._listening = False
            event.remove(self._session, "after_transaction_end", self._after_transaction_end)
        await self._release()

    async def _release(self) -> None:
        if self not in self._locks:
            return
        self._locks.remove(self)
        try:
            await self.unlock()
        except Exception:
            logger.warning(
                "an advisory lock could not be released; its connection is discarded", exc_info=True
            )
            self._driver.terminate()

    async def unlock(self) -> None:
        if self._driver.is_closed():
            return
        function = f"pg_catalog.pg_advisory_unlock{'_shared' if self._shared else ''}"
        call = f"SELECT {function}({', '.join(map(str, self._numbers))})"
        if self._held is None:
            # Unlocking what is not held would be a warning in the server's log.
            call += f" FROM pg_catalog.pg_locks WHERE {self._in_pg_locks()}"
        await self._driver.execute(call, timeout=_UNLOCK_TIMEOUT)

    def _in_pg_locks(self) -> str:
        if len(self._numbers) == 2:
            high, low, kind = *self._numbers, 2
        else:
            high, low, kind = self._numbers[0] >> 32, self._numbers[0], 1
        return (
            f"pid = pg_backend_pid() AND locktype = 'advisory' AND granted "
            f"AND classid = {high % 2**32} AND objid = {low % 2**32} AND objsubid = {kind} "
            f"AND mode = '{'Share' if self._shared else 'Exclusive'}Lock'"
        )

    def _after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        # On a pooled connection it has been unlocked on the way into the pool; this is for one of
        # the caller's own.
        if transaction.parent is None and self in self._locks:
            await_only(uninterrupted(self._release()))


def _before_pool(dbapi_connection: Any, record: Any) -> None:
    locks: list[SessionLock] | None = record.info.get(_KEY)
    if not locks:
        return
    held = list(locks)
    locks.clear()
    if dbapi_connection is None:
        return
    try:
        for lock in held:
            await_only(uninterrupted(lock.unlock()))
    except Exception:
        logger.warning(
            "an advisory lock could not be released; its connection is discarded", exc_info=True
        )
        record.invalidate()
