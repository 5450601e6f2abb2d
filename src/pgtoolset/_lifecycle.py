"""The end of a session: rolled back and closed, with its connection returned or discarded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgtoolset._arguments import sync_session_of
from pgtoolset._cancellation import uninterrupted
from pgtoolset._compatibility import connections_of
from pgtoolset._postgres.connections import terminate
from pgtoolset._postgres.discards import is_open, is_running, release
from pgtoolset._record import record_of
from pgtoolset.protocols import ManagedSession

logger = logging.getLogger("pgtoolset")

#: Seconds that a ROLLBACK may take; then its connection is closed and discarded.
ROLLBACK_TIMEOUT = 10.0


async def abandon(session: Any) -> None:
    """Roll back the open transaction. Never raises: the caller has an error to report already."""
    if session.in_transaction():
        await uninterrupted(_roll_back(session))


async def close(session: ManagedSession) -> None:
    """Close the session, and return its connection or discard it. Never raises."""
    if session.in_transaction():
        await uninterrupted(_roll_back_and_close(session))
    elif not close_idle(session):
        await _close(session)


def close_idle(session: Any) -> bool:
    """Close a session of SQLAlchemy's that is in no transaction, which takes no I/O.

    Return `False` where that is not the whole of it: `close` is to be called then.
    """
    if type(session).close is not AsyncSession.close:
        return False
    sync: Session = session.sync_session
    if type(sync).close is not Session.close or sync.in_transaction():
        return False
    sync.close()
    return True


async def _roll_back_and_close(session: Any) -> None:
    is_rolled_back = await _roll_back(session)
    if is_rolled_back and not close_idle(session):
        await _close(session)
    elif not is_rolled_back:
        await _attempt(session, "close")


async def _roll_back(session: Any) -> bool:
    """Roll back; return `False` where that failed, and the connections are discarded."""
    connections = _connections_of(session)
    await _release_running(session, connections)
    # To cancel a ROLLBACK that gets no answer would ask the same server for another answer. Closing
    # the socket needs none.
    loop = asyncio.get_running_loop()
    timer = loop.call_later(ROLLBACK_TIMEOUT, _terminate_all, connections)
    try:
        await session.rollback()
    except Exception:
        logger.warning("a rollback failed; its connection is discarded", exc_info=True)
        await _discard(session, connections)
        return False
    finally:
        timer.cancel()
    return True


async def _close(session: Any) -> None:
    connections = _connections_of(session)
    try:
        await session.close()
    except Exception:
        logger.warning("closing a session failed; its connection is discarded", exc_info=True)
        await _discard(session, connections)


def _connections_of(session: Any) -> Collection[Connection]:
    """Return the connections of the open transaction: after a rollback the session has none."""
    sync = sync_session_of(session)
    return () if sync is None else list(connections_of(sync.get_transaction()))


async def _release_running(session: Any, connections: Collection[Connection]) -> None:
    """Take the session's own connections on which another task has a statement.

    A rollback would be refused, or would wait for the end of the statement.
    """
    for connection in connections:
        if not is_open(connection) or not is_running(connection.connection):
            continue
        if connection is not session.sync_session.bind:
            logger.warning(
                "a statement of another task still runs on a connection that is to be rolled back; "
                "the connection is discarded, which ends the statement"
            )
            await release(connection)


def _terminate_all(connections: Collection[Connection]) -> None:
    for connection in connections:
        if is_open(connection):
            terminate(connection)


async def _discard(session: Any, connections: Collection[Connection]) -> None:
    """Take the connections from a session that could not end its transaction.

    Another task may be in the middle of a call of the session, which refuses every other call then.
    """
    sync = sync_session_of(session)
    if sync is None:
        await _attempt(session, "invalidate")
        return
    record_of(sync).abandoned = sync.get_transaction()
    for connection in connections:
        try:
            await release(connection)
            # The caller of a session that is bound to a connection closes that.
            if not is_open(connection) and connection is not sync.bind:
                connection.close()
        except Exception:
            logger.warning("discarding a connection failed", exc_info=True)


async def _attempt(session: Any, method: str) -> None:
    """Call a method of a session whose connections are gone; it may well fail."""
    try:
        await getattr(session, method)()
    except Exception:
        logger.debug("%s() of a session that could not be rolled back failed", method)
