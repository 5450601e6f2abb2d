"""A session from its making to its closing, whatever happens in between."""

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

#: Seconds that a ROLLBACK may take before its connection is given up and discarded.
ROLLBACK_TIMEOUT = 10.0


async def abandon(session: Any) -> None:
    """Roll back what is open. Never raises: the error that led here is the one to be told."""
    if session.in_transaction():
        await uninterrupted(_roll_back(session))


async def close(session: ManagedSession) -> None:
    """Close the session and give its connection back, or discard it. Never raises."""
    await abandon(session)
    try:
        await session.close()
    except Exception:
        logger.warning("closing a session failed; its connection is discarded", exc_info=True)
        await uninterrupted(_discard(session))


async def _roll_back(session: Any) -> None:
    # Cutting the connection ends a ROLLBACK that is not answered; cancelling it would ask the same
    # server to answer.
    hang_up = asyncio.get_running_loop().call_later(ROLLBACK_TIMEOUT, _hang_up, session)
    try:
        await session.rollback()
    except Exception:
        logger.warning("a rollback failed; its connection is discarded", exc_info=True)
        await _discard(session)
    finally:
        hang_up.cancel()


def _hang_up(session: Any) -> None:
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
