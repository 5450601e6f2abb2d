"""`list_lock_waits`: the sessions that wait for locks now."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from pgtoolset._arguments import check_bind, shown, sync_session
from pgtoolset._postgres.locks import waits
from pgtoolset.types import LockWaitSource
from pgtoolset.values import LockWait

__all__ = ["list_lock_waits"]


async def list_lock_waits(
    connection_or_session: LockWaitSource,
) -> Sequence[LockWait]:
    """Return each session of the database that waits for a lock, with the sessions in its way.

    Args:
        connection_or_session: an `AsyncConnection` or an `AsyncSession`, which is in a transaction
            afterwards as after any query, or an `AsyncEngine`, which lends a connection for the
            query.

    Returns:
        The waits, the longest first. An attribute that this role may not see is `None`.

    Raises:
        TypeError: the argument is not one of the three.
        UnsupportedDriverError: it uses another driver, or another database.

    Example:
        >>> for wait in await list_lock_waits(session):
        ...     print(wait.pid, "waits for", wait.blocked_by, "to use", wait.relation)

    See https://www.postgresql.org/docs/current/view-pg-locks.html
    """
    if isinstance(connection_or_session, AsyncSession):
        sync_session(connection_or_session)
    elif isinstance(connection_or_session, AsyncEngine | AsyncConnection):
        check_bind(connection_or_session)
    if isinstance(connection_or_session, AsyncEngine):
        async with connection_or_session.connect() as connection:
            return await waits(connection)
    if isinstance(connection_or_session, AsyncConnection | AsyncSession):
        return await waits(connection_or_session)
    raise TypeError(
        "connection_or_session must be an AsyncConnection, an AsyncSession or an AsyncEngine, "
        f"not {shown(connection_or_session)}"
    )
