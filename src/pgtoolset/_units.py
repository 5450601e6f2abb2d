"""One unit of work: a session from its factory to its closing, with its transaction verified."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Generic, TypeVar

from pgtoolset._arguments import new_session, sync_session_of
from pgtoolset._commits import commit_at_end, stop_verifying, verify_commits
from pgtoolset._lifecycle import close
from pgtoolset._record import record_of
from pgtoolset.protocols import ManagedSession, SessionFactory

S = TypeVar("S", bound=ManagedSession)


class UnitOfWork(Generic[S]):
    """One session from its factory to its closing."""

    __slots__ = ("_sync", "session")

    def __init__(self, session_maker: SessionFactory[S]) -> None:
        self.session: S = new_session(session_maker)
        self._sync = sync_session_of(self.session)

    async def begin(self) -> None:
        """Begin the transaction, without a connection."""
        if self._sync is None:
            await self.session.begin()
            return
        verify_commits(self._sync)
        # The half of `AsyncSession.begin()` that does no I/O, so it needs no greenlet.
        if not self._sync.in_transaction():
            self._sync.begin()

    async def commit(self) -> None:
        """Commit the open transaction; the session stays usable."""
        if self._sync is not None:
            await commit_at_end(self.session, self._sync)
        elif self.session.in_transaction():
            await self.session.commit()

    async def commit_unless_failed(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit at the exit of FastAPI's stack before the response, unless the endpoint raised.

        After an exception `finish` rolls back, at the exit of the other stack.
        """
        if exc_type is not None:
            return
        was_in_transaction = self.session.in_transaction()
        await self.commit()
        if not was_in_transaction:
            return
        # A streaming response may go on, in a session that does not begin a transaction itself too.
        if self._sync is not None and not self._sync.autobegin:
            self._sync.begin()

    async def finish(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit what a streaming response wrote, unless it failed or was cancelled, and close."""
        try:
            if exc_type is None and not self._was_cancelled():
                await self.commit()
        finally:
            await self.close()

    def _was_cancelled(self) -> bool:
        # Starlette cancels the stream of a client that hangs up, and raises no error for it.
        return self._sync is not None and isinstance(
            record_of(self._sync).error, asyncio.CancelledError
        )

    async def close(self) -> None:
        """Roll back the open transaction, close the session and release its connection."""
        if self._sync is not None:
            stop_verifying(self._sync)
        await close(self.session)
