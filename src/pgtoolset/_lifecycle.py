"""The end of a session: rolled back and closed, with its connection returned or discarded."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from pgtoolset._arguments import sync_session_of
from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.connections import terminate
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
    await abandon(session)
    try:
        await session.close()
    except Exception:
        logger.warning("closing a session failed; its connection is discarded", exc_info=True)
        await uninterrupted(_discard(session))


async def _roll_back(session: Any) -> None:
    # To cancel a ROLLBACK that gets no answer would ask the same server for another answer. Closing
    # the socket needs none.
    timer = asyncio.get_running_loop().call_later(ROLLBACK_TIMEOUT, _terminate_all, session)
    try:
        await session.rollback()
    except Exception:
        logger.warning("a rollback failed; its connection is discarded", exc_info=True)
        await _discard(session)
    finally:
        timer.cancel()


def _terminate_all(session: Any) -> None:
    sync = sync_session_of(session)
    for connection in () if sync is None else record_of(sync).connections:
        if not connection.closed and not connection.invalidated:
            terminate(connection)


async def _discard(session: Any) -> None:
    invalidate = getattr(session, "invalidate", None)
    if invalidate is not None:
        try:
            await invalidate()
        except Exception:
            logger.warning("discarding a connection failed", exc_info=True)
