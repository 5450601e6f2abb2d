"""A session that holds the till for some seconds, for others to wait for."""

import asyncio
import time
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from examples.shop.models import TillSale
from pgtoolset import lock_tables

#: Seconds to wait for the lock itself.
PATIENCE = 2.0


class TillHolds:
    """At most one session that holds the till."""

    def __init__(self, observer: AsyncEngine) -> None:
        # A transaction needs another isolation level than the looks of the page have.
        self._engine = observer.execution_options(isolation_level="READ COMMITTED")
        self._task: asyncio.Task[None] | None = None
        self._pid: int | None = None
        self._until = 0.0

    @property
    def is_held(self) -> bool:
        """Whether a session holds the till, or is about to."""
        return self._task is not None and not self._task.done()

    def as_json(self) -> dict[str, int | None]:
        """The session that holds the till."""
        return {"held_by": self._pid if self.is_held else None}

    def remaining(self) -> float:
        """Seconds until the till is free."""
        return max(0.0, self._until - time.monotonic())

    async def begin(self, seconds: float) -> int:
        """Hold the till for so long; return the pid of the session once it does.

        Raises:
            LockTimeoutError: others have the till.
        """
        held: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(seconds, held))
        # A session that is ended from outside gives the till back; there is nothing else to do.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        either: list[asyncio.Future[Any]] = [self._task, held]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not held.done():
            await self._task
        return await held

    async def close(self) -> None:
        """Let the till go."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _hold(self, seconds: float, held: asyncio.Future[int]) -> None:
        self._pid, self._until = None, time.monotonic() + PATIENCE + seconds
        async with (
            AsyncSession(self._engine) as session,
            lock_tables(session, [TillSale], mode="EXCLUSIVE", timeout=PATIENCE),
        ):
            self._pid = await session.scalar(select(func.pg_backend_pid()))
            self._until = time.monotonic() + seconds
            held.set_result(self._pid or 0)
            # In PostgreSQL, so that it ends at once where the session is terminated.
            await session.execute(select(func.pg_sleep(seconds)))
