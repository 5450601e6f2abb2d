"""Callbacks of `on_commit`: called after the commit, or refused before it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from pgtoolset._arguments import shown
from pgtoolset._cancellation import uninterrupted
from pgtoolset.errors import TransactionStateError

logger = logging.getLogger("pgtoolset")

Callback: TypeAlias = Callable[[], Awaitable[object] | object]


def check_can_run() -> None:
    """Raise where callbacks could not run after a commit, so that it must not be sent."""
    if not in_greenlet():
        raise TransactionStateError(
            "the transaction has callbacks of on_commit, which a commit outside of an AsyncSession "
            "cannot run: nothing was committed. Call `await session.commit()`, or wrap the code in "
            "`await session.run_sync(...)`, in place of session.sync_session.commit()"
        )


def run_in_greenlet(callbacks: Sequence[Callback]) -> None:
    """Run callbacks in SQLAlchemy's greenlet: the work is stored, so a cancellation waits."""
    await_only(uninterrupted(run_callbacks(callbacks)))


async def run_callbacks(callbacks: Sequence[Callback]) -> None:
    """Call each callback in order, after the commit. A failure is logged: it undoes nothing."""
    for callback in callbacks:
        try:
            result = callback()
            if inspect.isawaitable(result):
                await result
        except (Exception, asyncio.CancelledError):
            # Not its repr: the arguments of a `partial` may hold a password.
            name = getattr(callback, "__qualname__", None) or shown(callback)
            logger.exception("on_commit callback %s failed; the transaction is committed", name)
