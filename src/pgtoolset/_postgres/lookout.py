"""Find the sessions that block a lock while it is waited for: afterwards the evidence is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, TypeAlias
from uuid import uuid4

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._cancellation import uninterrupted
from pgtoolset._deadlines import Deadline, bounded
from pgtoolset._observers import Observers, observers_of
from pgtoolset._postgres.connections import backend_pid
from pgtoolset._postgres.locks import backend_marked
from pgtoolset._postgres.outside import Onlooker, ended
from pgtoolset._postgres.sending import send
from pgtoolset._postgres.sqlstates import LOCK_NOT_AVAILABLE, QUERY_CANCELED, sqlstate_of
from pgtoolset.errors import DeadlineExceededError, LockTimeoutError
from pgtoolset.events import LockKind, LockWaited
from pgtoolset.values import Blocker

#: Seconds before the end of a deadline at which the wait for a lock ends, at most a tenth of it.
_EARLIER = 0.02

logger: logging.Logger = logging.getLogger("pgtoolset")

#: Returns the sessions that hold the wanted locks, except the backend with this pid. The connection
#: is one outside of the pool.
FindHolders: TypeAlias = Callable[[AsyncConnection, int | None], Awaitable[list[Blocker]]]

#: Seconds before the end of the wait at which a connection is opened to find the blockers, and at
#: which they are asked for the last time. A short wait has less: four fifths and a tenth of it.
_OPEN_BEFORE = 1.0
_ASK_BEFORE = 0.05

#: Seconds by which the error may be late so that it can name the blockers: a quarter of the wait,
#: at most _GRACE and at least _SHORT_GRACE, which is enough to connect and ask on a busy machine.
_GRACE = 1.0
_SHORT_GRACE = 0.25


@dataclass(slots=True)
class Wanted:
    """The locks that a statement asks for, as an error describes them.

    Attributes:
        action: what the statement does, after "Could not": `"lock orders in EXCLUSIVE mode"`.
        tables: the qualified names of the tables.
        mode: the lock mode.
        kind: which function asks for them; `None` for a wait that is not reported to observers.
        key: of an advisory lock, in words.
    """

    action: str
    tables: Sequence[str]
    mode: str
    kind: LockKind | None = None
    key: str | None = None

    def tell(self, observers: Observers, *, acquired: bool, seconds: float) -> None:
        """Tell observers how the wait has ended."""
        if self.kind is not None:
            names = self.tables if self.key is None else (self.key,)
            observers.tell(LockWaited(self.kind, tuple(names), self.mode, acquired, seconds))


class Lookout:
    """A block that waits for locks; where it fails, its error names the blockers.

    The error of PostgreSQL that reports a refused lock becomes a `LockTimeoutError`. A lock that is
    free costs no statement, no task and no connection: until the last second of the wait, or the
    last four fifths of a short one, there is only a timer. Then the blockers are asked for, over a
    connection outside of the pool, which these very waiters may have exhausted. All the waiters of
    an engine share that connection.

    Args:
        timeout: the seconds after which PostgreSQL ends the wait; 0 where it does not wait at all,
            `None` where there is no limit. A deadline that is earlier ends it before.
        holders: asked after the failure where nothing was found during the wait; `None` where the
            server cannot answer that.
        limits_statement: whether `statement_timeout` ends the wait as well as `lock_timeout`.

    Attributes:
        acquired: whether a statement that has not failed has acquired the locks.
    """

    __slots__ = (
        *("_began", "_deadline", "_holders", "_limits_statement", "_own_timeout"),
        *("_search", "_timeout", "_timer", "acquired"),
    )

    #: What to find, and for whom, once `watch` was called.
    _search: _Search | None

    def __init__(
        self,
        timeout: float | None,
        *,
        holders: FindHolders | None = None,
        limits_statement: bool = False,
    ) -> None:
        self._own_timeout = timeout
        self._timeout = timeout
        self._deadline: Deadline | None = None
        self._holders = holders
        self._limits_statement = limits_statement
        self._search = None
        self._timer: asyncio.TimerHandle | None = None
        self.acquired = True

    def limit(self) -> float | None:
        """Return the seconds that the locks may be waited for, from now on.

        Raises:
            DeadlineExceededError: a deadline is over.
        """
        if self._own_timeout == 0:
            return 0
        self._timeout, self._deadline = bounded(self._own_timeout)
        if self._timeout is None or self._deadline is None:
            return self._timeout
        if self._timeout <= 0:
            raise self._deadline.exceeded("lock", "the locks were not asked for")
        # The error of the wait for a lock comes before that of its statement, and says more.
        self._timeout -= min(_EARLIER, self._timeout / 10)
        return self._timeout

    def watch(
        self,
        connection: Connection,
        wanted: Wanted,
        *,
        pid: int | None = None,
        marks: bool = False,
    ) -> str:
        """Start the clock: the next statement on `connection` asks for the locks.

        It runs in SQLAlchemy's greenlet. Behind a pooler the driver does not know the pid of the
        backend, and a statement of its own asks for it.

        Args:
            connection: in a transaction.
            wanted: the locks.
            pid: of the backend, where the caller knows it.
            marks: return a mark in place of asking: a comment that the statement has to contain.
                The backend is found by it, and no snapshot is taken.

        Returns:
            The mark; empty where none is needed.
        """
        mark = ""
        pid = pid or backend_pid(connection)
        if pid is None and marks:
            mark = f"/* pgtoolset {uuid4().hex} */ "
        elif pid is None and (self._timeout or self._holders):
            pid = send(connection, "SELECT pg_catalog.pg_backend_pid()").scalar_one()
        self._began = time.monotonic()
        self._search = _Search(connection, wanted, self._timeout, self._holders, pid, mark)
        if self._timeout:
            delay = self._timeout - min(_OPEN_BEFORE, self._timeout * 4 / 5)
            self._timer = asyncio.get_running_loop().call_later(delay, self._search.start)
        return mark

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._search is None:
            return
        self._search.tell(acquired=self.acquired and exc is None, seconds=self._waited())
        try:
            if self._is_timeout(exc):
                waited = self._waited() if self._timeout is None else self._timeout
                error = await self._search.error(waited)
                if self._deadline is None:
                    raise error from exc
                error.__cause__ = exc
                raise self._deadline.exceeded("lock", _first_lower(str(error))) from error
        finally:
            await self._search.stop()

    def _is_timeout(self, error: BaseException | None) -> bool:
        if isinstance(error, DeadlineExceededError):
            # PostgreSQL has canceled the statement that waits for the locks.
            return self._deadline is not None and error.spent_on == "statement"
        if not isinstance(error, DBAPIError):
            return False
        sqlstate = sqlstate_of(error)
        if sqlstate == QUERY_CANCELED and self._limits_statement and self._timeout:
            # A cancellation before that time has another cause.
            return self._waited() >= self._timeout
        return sqlstate == LOCK_NOT_AVAILABLE

    def _waited(self) -> float:
        return time.monotonic() - self._began


class _Search:
    """Finds the sessions that block the backend of `connection`, in a task of its own.

    Attributes:
        found: the blockers that the last query has returned.
    """

    __slots__ = (
        "_answered",
        "_began",
        "_connection",
        "_failed",
        "_failure",
        "_holders",
        "_mark",
        "_pid",
        "_task",
        "_timeout",
        "_wanted",
        "found",
    )

    def __init__(
        self,
        connection: Connection,
        wanted: Wanted,
        timeout: float | None,
        holders: FindHolders | None,
        pid: int | None,
        mark: str,
    ) -> None:
        self._began = time.monotonic()
        self._connection = connection
        self._wanted = wanted
        self._timeout = timeout
        self._holders = holders
        self._pid = pid
        self._mark = mark
        self._task: asyncio.Task[None] | None = None
        #: Set when PostgreSQL has refused the lock.
        self._failed = asyncio.Event()
        #: What went wrong with the search itself.
        self._failure: Exception | None = None
        #: The seconds after which PostgreSQL was asked for the last time and has answered.
        self._answered: float | None = None
        self.found: list[Blocker] = []

    def tell(self, *, acquired: bool, seconds: float) -> None:
        """Tell the observers of the engine how the wait has ended."""
        observers = observers_of(self._connection.dialect)
        if observers:
            self._wanted.tell(observers, acquired=acquired, seconds=seconds)

    def start(self) -> None:
        """Connect and ask, in the background."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End the search, whatever cancels the caller meanwhile."""
        if self._task is not None:
            self._task.cancel()
            await uninterrupted(ended(self._task))

    async def error(self, waited: float) -> LockTimeoutError:
        """Return the error for a lock that was refused after so many seconds."""
        if self._task is None:
            self.start()
        assert self._task is not None
        self._failed.set()
        grace = min(_GRACE, max(_SHORT_GRACE, self._timeout / 4)) if self._timeout else _GRACE
        await asyncio.wait([self._task], timeout=grace)
        wanted = self._wanted
        within = f"within {waited:g} s" if waited else "without waiting"
        return LockTimeoutError(
            f"Could not {wanted.action} {within}: {self._account()}",
            tables=wanted.tables,
            mode=wanted.mode,
            timeout=waited,
            blockers=self.found,
        )

    async def _run(self) -> None:
        try:
            async with Onlooker.joined(self._connection.engine) as onlooker:
                if self._pid is None and self._mark:
                    self._pid = await onlooker.ask(partial(backend_marked, mark=self._mark))
                    if self._pid is None:
                        raise LookupError(
                            "a pooler hides which backend waited, and pg_stat_activity does not "
                            "show its statement; see track_activities"
                        )
                if self._timeout and self._pid is not None:
                    await self._ask_during_the_wait(onlooker, self._pid, self._timeout)
                if not self.found and self._holders is not None:
                    await self._failed.wait()
                    asked = self._waited()
                    self.found = await onlooker.ask(self._ask_for_holders)
                    self._answered = asked
        except Exception as error:
            # The lock may still be granted. Where it is not, that is the error to report.
            logger.debug("the search for the blockers of a lock failed", exc_info=True)
            self._failure = error

    async def _ask_for_holders(self, outside: AsyncConnection) -> list[Blocker]:
        assert self._holders is not None
        return await self._holders(outside, self._pid)

    async def _ask_during_the_wait(self, onlooker: Onlooker, pid: int, timeout: float) -> None:
        """Ask at once, and again shortly before the end, when the blockers may be others."""
        self._answered, self.found = self._waited(), await onlooker.blocking(pid)
        last = timeout - min(_ASK_BEFORE, timeout / 10) - self._waited()
        if not await _is_set_within(last, self._failed):
            asked = self._waited()
            self.found = await onlooker.blocking(pid) or self.found
            self._answered = asked

    def _waited(self) -> float:
        return time.monotonic() - self._began

    def _account(self) -> str:
        """The blockers in words, or the reason why there are none."""
        if self.found:
            verb = "is" if len(self.found) == 1 else "are"
            return (
                f"in the way {verb} {'; '.join(map(str, self.found))}. End the transaction in the "
                "way, or wait longer (timeout)."
            )
        if self._failure is not None:
            kind = type(self._failure).__name__
            return f"the sessions in the way could not be found ({kind}: {self._failure})."
        if self._answered is not None:
            return (
                f"PostgreSQL was asked {self._answered:.2f} s after the start and named no session "
                "in the way. The last one has ended its transaction by then, or the time went into "
                "something else than a lock. Try again."
            )
        if self._timeout is None and self._holders is None:
            return (
                "the lock_timeout of the connection ended the wait, and its length is not known "
                "here, so PostgreSQL was not asked in time. Pass a timeout to have the sessions in "
                "the way named."
            )
        return (
            "PostgreSQL has not answered in time which sessions are in the way. The command "
            "`pgtoolset locks URL` shows which sessions wait for which."
        )


def _first_lower(text: str) -> str:
    return text[:1].lower() + text[1:]


async def _is_set_within(seconds: float, event: asyncio.Event) -> bool:
    try:
        # `asyncio.wait_for` of Python 3.11 swallows a cancellation where the event is set with it.
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
