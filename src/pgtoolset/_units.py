"""One unit of work: a session from its factory to its closing, with its transaction verified."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Generic, TypeVar

from pgtoolset._arguments import (
    Settings,
    SettingsSource,
    check_atomic,
    new_session,
    shown,
    sync_session_of,
)
from pgtoolset._begins import explain_second_begin, stop_explaining
from pgtoolset._commits import commit_at_end, stop_verifying, verify_commits
from pgtoolset._deadlines import Deadline
from pgtoolset._lifecycle import close, close_idle
from pgtoolset._listeners import listen_to_errors
from pgtoolset._record import note_driver_error, record_of
from pgtoolset.errors import TransactionStateError
from pgtoolset.protocols import ManagedSession, SessionFactory

S = TypeVar("S", bound=ManagedSession)


@dataclass(frozen=True, slots=True)
class UnitOptions:
    """The options of each unit of one dependency or context.

    Attributes:
        resolve_commit: seconds in which a commit without an answer is to be resolved.
        settings: what gives the settings of its transactions.
        deadline: seconds from the begin of the unit, for all that it does with the database.
    """

    resolve_commit: float | None = None
    settings: SettingsSource | None = None
    deadline: float | None = None

    def names(self) -> list[str]:
        """Return the names of the options that only an `AsyncSession` can have."""
        names = {"resolve_commit": self.resolve_commit, "settings": self.settings}
        return [name for name, value in names.items() if value is not None]


NO_UNIT_OPTIONS: Final = UnitOptions()

#: Of settings that FastAPI has not resolved.
NOT_GIVEN: Final = object()


def own_session(session_maker: SessionFactory[S]) -> S:
    """Return a session of the factory that is in use nowhere else.

    Raises:
        TransactionStateError: the factory gave a session of another unit, or one in a transaction.
            The session was not touched.
        TypeError: the factory made something else than a session.
    """
    session = new_session(session_maker)
    sync = sync_session_of(session)
    # Between two transactions of its unit the session is in none.
    if session.in_transaction() or (sync is not None and record_of(sync).verifies_commits):
        raise TransactionStateError(
            "session_maker must make a new session at each call; it has returned a session that is "
            "in a transaction or in use already, and two units of work cannot share one: pass an "
            "async_sessionmaker, or use get_transaction() on that session"
        )
    if sync is not None:
        check_atomic(sync)
        listen_to_errors(sync.bind)
    return session


class UnitOfWork(Generic[S]):
    """One session from its factory to its closing.

    Args:
        session_maker: makes the session.
        options: of the unit.
        given: settings that FastAPI has resolved, as a dependency of their own.
    """

    __slots__ = ("_deadline", "_resolve_commit", "_seconds", "_settings", "_sync", "session")

    def __init__(
        self,
        session_maker: SessionFactory[S],
        options: UnitOptions = NO_UNIT_OPTIONS,
        given: object = NOT_GIVEN,
    ) -> None:
        self._resolve_commit = options.resolve_commit
        self._settings = None if options.settings is None else _settings(options.settings, given)
        self._seconds = options.deadline
        self._deadline: Deadline | None = None
        self.session: S = own_session(session_maker)
        self._sync = sync_session_of(self.session)
        names = options.names() if self._sync is None else ()
        if names:
            raise TypeError(
                f"{', '.join(names)}: only an AsyncSession can have that, and session_maker makes "
                f"{shown(self.session)}"
            )

    async def begin(self) -> None:
        """Begin the transaction, without a connection."""
        if self._seconds is not None:
            self._deadline = Deadline(self._seconds)
        if self._sync is None:
            await self.session.begin()
            return
        verify_commits(self._sync, self._resolve_commit, self._settings)
        # The half of `AsyncSession.begin()` that does no I/O, so it needs no greenlet.
        if not self._sync.in_transaction():
            self._sync.begin()
        explain_second_begin(self._sync)

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
            if exc is not None:
                self.note_error(exc)
            if exc_type is None and not self._was_cancelled():
                await self.commit()
        finally:
            await self.close()

    def note_error(self, error: BaseException) -> None:
        """Note the error that ends the unit."""
        if self._sync is not None:
            note_driver_error(self._sync, error)

    def _was_cancelled(self) -> bool:
        # Starlette cancels the stream of a client that hangs up, and raises no error for it.
        return self._sync is not None and isinstance(
            record_of(self._sync).error, asyncio.CancelledError
        )

    async def close(self) -> None:
        """Roll back the open transaction, close the session and release its connection."""
        if self._deadline is not None:
            self._deadline.close()
        if self._sync is not None:
            stop_verifying(self._sync)
            stop_explaining(self._sync)
        if not close_idle(self.session):
            await close(self.session)


class UnitContext(AbstractAsyncContextManager[S]):
    """One unit of work as a block.

    A class: where it is dropped in its middle the event loop would run a generator to its end, and
    close a session that is still in use.
    """

    __slots__ = ("_options", "_session_maker", "_unit")

    def __init__(
        self, session_maker: SessionFactory[S], options: UnitOptions = NO_UNIT_OPTIONS
    ) -> None:
        self._session_maker = session_maker
        self._options = options
        self._unit: UnitOfWork[S] | None = None

    async def __aenter__(self) -> S:
        if self._unit is not None:
            raise TransactionStateError(
                "this block is open already; call db_context() again for a block of its own"
            )
        unit = UnitOfWork(self._session_maker, self._options)
        self._unit = unit
        try:
            await unit.begin()
        except BaseException:
            self._unit = None
            await unit.close()
            raise
        return unit.session

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unit = self._unit
        if unit is None:
            return
        self._unit = None
        try:
            if exc is None:
                await unit.commit()
            else:
                unit.note_error(exc)
        finally:
            await unit.close()


def _settings(source: SettingsSource, given: object) -> Settings | None:
    return source.now() if given is NOT_GIVEN else source.of(given)
