"""Finding who is in the way of a lock while it is waited for: when the wait is over, the evidence
is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self, TypeAlias

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.locks import backend_pid, sessions_blocking
from pgtoolset._postgres.outside import outside_connection
from pgtoolset.errors import LockTimeoutError
from pgtoolset.values import Blocker

logger: logging.Logger = logging.getLogger("pgtoolset")

#: Asks, over a connection from outside, who holds what was wanted; not to be reported: the backend
#: of this pid.
FindHolders: TypeAlias = Callable[[AsyncConnection, int], Awaitable[list[Blocker]]]

#: Seconds before the end of the wait at which a connection is opened for the look, and of the last
#: look, at the most. Of a short wait it is a part: four fifths and a tenth.
_OPEN_BEFORE = 1.0
_LOOK_BEFORE = 0.05

#: Seconds that the error may come later for the sake of naming the blockers: of a wait a quarter,
#: but at the most _GRACE. Less than _SHORT_GRACE is not enough to connect and ask on a busy
#: machine.
_GRACE = 1.0
_SHORT_GRACE = 0.25


class Lookout:
    """Looks out for blockers during a block that waits for a lock.

    For the first fifth of the wait, or more, it is nothing but a timer, so a lock that is free
    costs no statement, no task and no connection. Then it connects past the pool, which may be
    exhausted by those very waiters, and asks the server. Where the block does not wait, or nobody
    was seen, `holders` asks afterwards who has what was wanted.

    Args:
        seconds: how long the block waits at the most; 0 where it does not wait, `None` where there
            is no end.
        holders: asks for holders after the failure; `None` where the server cannot tell.
    """

    __slots__ = (
        "_began",
        "_connection",
        "_error",
        "_failed",
        "_holders",
        "_seconds",
        "_seen",
        "_task",
        "_timer",
    )

    def __init__(self, seconds: float | None, holders: FindHolders | None = None) -> None:
        self._connection: Connection | None = None
        self._seconds = seconds
        self._holders = holders
        self._seen: list[Blocker] = []
        self._error: Exception | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self._began = time.monotonic()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await uninterrupted(_ended(self._task))

    def watch(self, connection: Connection) -> None:
        """The lock is about to be asked for on this connection: the wait begins now."""
        self._connection = connection
        self._began = time.monotonic()
        if self._seconds:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(
                self._seconds - min(_OPEN_BEFORE, self._seconds * 4 / 5), self._start
            )

    @property
    def waited(self) -> float:
        """The seconds since the wait began."""
        return time.monotonic() - self._began

    async def timed_out(self, what: str, *, tables: Sequence[str], mode: str) -> LockTimeoutError:
        """The error that names whoever was in the way. `what` says what could not be done: "lock
        orders"."""
        seconds = self._seconds
        if self._task is None:
            self._start()
        assert self._task is not None
        self._failed.set()
        await asyncio.wait(
            [self._task], timeout=min(_GRACE, max(_SHORT_GRACE, seconds / 4)) if seconds else _GRACE
        )
        waited = self.waited if seconds is None else seconds
        within = f"within {waited:g} s" if waited else "without waiting"
        return LockTimeoutError(
            f"Could not {what} {within}: {self._account()}",
            tables=tables,
            mode=mode,
            timeout=waited,
            blockers=self._seen,
        )

    def _start(self) -> None:
        self._failed = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        if self._connection is None:
            return  # refused before the lock was asked for
        try:
            pid = backend_pid(self._connection)
            async with outside_connection(self._connection.engine) as outside:
                if self._seconds:
                    self._seen = await sessions_blocking(outside, pid)
                    last = self._seconds - min(_LOOK_BEFORE, self._seconds / 10) - self.waited
                    if not await _within(last, self._failed):
                        self._seen = await sessions_blocking(outside, pid) or self._seen
                if not self._seen and self._holders is not None:
                    await self._failed.wait()
                    self._seen = await self._holders(outside, pid)
        except Exception as error:
            # The lock may still be had; and where it is not, that is what the caller must hear of.
            logger.debug("looking for the blockers of a lock failed", exc_info=True)
            self._error = error

    def _account(self) -> str:
        if self._seen:
            verb = "is" if len(self._seen) == 1 else "are"
            return f"in the way {verb} {'; '.join(map(str, self._seen))}. End that first, or wait longer (timeout)."
        if self._error is not None:
            return f"who is in the way could not be seen ({type(self._error).__name__}: {self._error})."
        return "who is in the way could not be seen in time. `pgtoolset locks URL` shows who waits for whom."


async def _within(seconds: float, event: asyncio.Event) -> bool:
    """Whether the event is set within some seconds."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
