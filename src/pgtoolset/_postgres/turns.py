"""Turns of processes: advisory locks of an open transaction, asked for again and again.

A lock that belongs to a transaction stays on no backend of a pooler. One that is asked for without
waiting in PostgreSQL can be waited for within a limit and until a cancellation, and a waiting
process occupies no backend of a pooler, where the one that has the lock may need another.
https://www.postgresql.org/docs/current/explicit-locking.html#ADVISORY-LOCKS
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pgtoolset._postgres.locks import ACTIVITY
from pgtoolset.errors import LockTimeoutError
from pgtoolset.values import Blocker

#: Seconds between two attempts.
_INTERVAL = 0.05

#: An open transaction that only has locks must outlive what its role allows.
_NO_LIMITS = """
SELECT pg_catalog.set_config(name, '0', true) FROM pg_catalog.pg_settings
WHERE name OPERATOR(pg_catalog.=) 'idle_in_transaction_session_timeout'
   OR name OPERATOR(pg_catalog.=) 'transaction_timeout'
"""

_HOLDERS = ACTIVITY.format(
    # A prepared transaction has no pid.
    pids="""SELECT coalesce(l.pid, 0) AS pid
            FROM pg_catalog.pg_locks AS l
            JOIN pg_catalog.pg_database AS d ON d.oid OPERATOR(pg_catalog.=) l.database
            WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.granted
              AND d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
              AND l.objsubid OPERATOR(pg_catalog.=) 1
              AND CAST(l.classid AS pg_catalog.int8) OPERATOR(pg_catalog.=) $1
              AND CAST(l.objid AS pg_catalog.int8) OPERATOR(pg_catalog.=) $2
              AND (l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()) IS NOT TRUE"""
)


def key_of(purpose: str, name: str) -> int:
    """Return the key of an advisory lock."""
    digest = hashlib.sha256(f"pgtoolset {purpose} {name}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


@asynccontextmanager
async def turn(
    connection: Any,
    *,
    alone: int | None = None,
    together: int | None = None,
    timeout: float,
    purpose: str,
) -> AsyncIterator[bool]:
    """Open a transaction with locks over a connection of asyncpg that runs no other statement.

    Args:
        connection: to the same database as every other process, because a lock belongs to one.
        alone: a key that no other process may have.
        together: a key that others may have as well.
        timeout: seconds to wait for the locks; 0 to try once, and yield whether they are held.
        purpose: their purpose, for the error.

    Raises:
        LockTimeoutError: another session has one of the locks for too long.
    """
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        async with connection.transaction():
            is_held = await _take(connection, alone, together)
            if is_held or not timeout:
                if is_held:
                    await connection.execute(_NO_LIMITS)
                yield is_held
                return
        if asyncio.get_running_loop().time() >= deadline:
            key = alone if alone is not None else together
            assert key is not None
            raise _refusal(purpose, timeout, await _holders(connection, key))
        await asyncio.sleep(_INTERVAL)


async def _take(connection: Any, alone: int | None, together: int | None) -> bool:
    for function, key in (
        ("pg_try_advisory_xact_lock", alone),
        ("pg_try_advisory_xact_lock_shared", together),
    ):
        if key is not None and not await connection.fetchval(
            f"SELECT pg_catalog.{function}($1)", key
        ):
            return False
    return True


async def _holders(connection: Any, key: int) -> list[Blocker]:
    rows = await connection.fetch(_HOLDERS, (key >> 32) & 0xFFFFFFFF, key & 0xFFFFFFFF)
    return [Blocker(*row) for row in rows]


def _refusal(purpose: str, timeout: float, holders: Sequence[Blocker]) -> LockTimeoutError:
    who = "; ".join(map(str, holders)) or "a session that has ended since, or held the other lock"
    return LockTimeoutError(
        f"could not {purpose} within {timeout:g} s, because another session holds the advisory "
        f"lock for it: {who}. Wait until it has ended, or end it with pg_terminate_backend.",
        tables=(),
        mode="EXCLUSIVE",
        timeout=timeout,
        blockers=holders,
    )
