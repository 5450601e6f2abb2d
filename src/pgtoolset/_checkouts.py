"""A connection while it is out of the pool: what the sessions on it share, and its commits.

Several sessions may be joined to one connection. An error aborts the work of all of them, and one
COMMIT stores it. https://docs.sqlalchemy.org/en/20/orm/session_transaction.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import Any, NoReturn, Protocol, TypeAlias

from sqlalchemy import Connection, PoolProxiedConnection, Transaction
from sqlalchemy.engine import RootTransaction
from sqlalchemy.util import await_only

from pgtoolset._arguments import Settings
from pgtoolset._callbacks import Callback, check_can_run, run_in_greenlet
from pgtoolset._deadlines import Deadline, begun_deadline, suspended
from pgtoolset._limits import SETTING, LastResort, StatementLimit
from pgtoolset._observers import tell
from pgtoolset._outcomes import aborted_by, commit_unknown, transaction_lost
from pgtoolset._postgres.commit_status import Trace, trace
from pgtoolset._postgres.connections import (
    CommitAttempt,
    Outcome,
    begin_with,
    begun_transaction,
    verify_next_commit,
)
from pgtoolset._postgres.discards import check_is_free, discard, replace_pool
from pgtoolset._postgres.holders import Held, held_on
from pgtoolset._postgres.sqlstates import (
    IN_FAILED_SQL_TRANSACTION,
    refuses_commit,
    reported_by_server,
    sqlstate_of,
)
from pgtoolset._resolution import Resolution, Verdict, resolve
from pgtoolset.errors import CommitUnknownError, TransactionStateError
from pgtoolset.events import CommitResolved, Resolved
from pgtoolset.types import CommitObserver, CommitPhase

DialectCommit: TypeAlias = Callable[[PoolProxiedConnection], None]
DialectRelease: TypeAlias = Callable[[Connection, str], None]

#: What became of a COMMIT whose answer was lost, in the words of events.
_RESOLVED: dict[Verdict, Resolved] = {
    Verdict.STORED: "stored",
    Verdict.LOST: "lost",
    Verdict.UNKNOWN: "unknown",
}


class Participant(Protocol):
    """A session on a checkout, as its record describes it."""

    unknown: CommitUnknownError | None
    resolve_commit: float | None
    observer: CommitObserver | None

    @property
    def needs_verified_commit(self) -> bool:
        """Whether a COMMIT that PostgreSQL answers with ROLLBACK must be an error."""
        ...

    @property
    def is_ending(self) -> bool:
        """Whether the commit is the one at the end of its block."""
        ...


class Checkout:
    """One connection of SQLAlchemy, from the pool and back.

    Attributes:
        connection: the connection.
        held: who holds it, as its pool has noted.
        participants: the sessions whose open transaction uses it, each with the transaction or
            savepoint that it began or joined; `None` after another one has committed that.
        error: the error that aborted its transaction, or the first that may have.
        is_read_only: whether a statement of ours has made its transaction READ ONLY.
        deferred: callbacks of sessions that were joined to its transaction, and have ended.
        owes_commit: whether a session, or a block of ours, relies on the COMMIT of others.
        releasing: the savepoint whose RELEASE was sent, and was refused.
        prelude: the statements with which its transaction is still to begin; none is sent before.
        given_limit: the `statement_timeout` that the prelude sets.
        limit: the `statement_timeout` that a deadline has set in its transaction.
        last_resort: closes it where the statement of a deadline gets no answer.
        attempt: the COMMIT that was sent last.
        locks: what `lock_tables` and `advisory_lock` have taken, in words.
        cursors: of the driver's adapter, on the server.
        borrowers: how many blocks of `driver_connection` are open.
        ended: the error for a transaction that such a block has ended.
    """

    __slots__ = (
        "_aborts",
        "_marks",
        "_transaction",
        "attempt",
        "borrowers",
        "connection",
        "cursors",
        "deferred",
        "ended",
        "error",
        "given_limit",
        "held",
        "is_read_only",
        "last_resort",
        "limit",
        "locks",
        "owes_commit",
        "participants",
        "prelude",
        "releasing",
    )

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.held: Held | None = held_on(connection.connection)
        self.participants: dict[Participant, Transaction | None] = {}
        self._begin(connection.get_transaction())

    def _begin(self, transaction: RootTransaction | None) -> None:
        self._transaction = transaction
        self._aborts = False
        self._marks: dict[str, tuple[int, int]] | None = None
        self.error: BaseException | None = None
        self.is_read_only = False
        self.deferred: list[Callback] = []
        self.owes_commit = False
        self.releasing: str | None = None
        self.prelude = ""
        self.given_limit: str | None = None
        self.limit: StatementLimit | None = None
        self.last_resort: LastResort | None = None
        self.attempt: CommitAttempt | None = None
        self.locks: list[str] = []
        self.cursors: list[Any] = []
        self.borrowers = 0
        self.ended: TransactionStateError | None = None

    def follow(self) -> None:
        """Forget what belongs to an earlier transaction of the connection."""
        transaction = self.connection.get_transaction()
        if transaction is not self._transaction:
            self._begin(transaction)

    def enter(self, participant: Participant) -> None:
        """Note a session that begins or joins the transaction of the connection."""
        connection = self.connection
        self.participants[participant] = (
            connection.get_nested_transaction() or connection.get_transaction()
        )

    def take_settings(self, settings: Settings) -> None:
        """Have the transaction, which has sent nothing yet, begin with settings."""
        self.prelude += settings.statements
        self.given_limit = settings.values.get(SETTING)

    def begin(self) -> None:
        """Begin the transaction with its prelude. Runs in SQLAlchemy's greenlet.

        A statement of the prelude that PostgreSQL refuses leaves the transaction open and aborted,
        so that no other one runs in it. Until it has begun, each statement waits for the prelude,
        also one of another task.
        """
        self.follow()
        if self.prelude:
            self._begin_with(self.prelude)

    def begin_within(self, deadline: Deadline) -> None:
        """As `begin`, and limit the statement that is sent next. Runs in SQLAlchemy's greenlet."""
        self.follow()
        proxied = self.connection.connection
        limit = self.limit
        if limit is None:
            limit = self.limit = StatementLimit()
        if begun_transaction(proxied) is None:
            statement = limit.opening(proxied, deadline, self.given_limit)
            self._begin_with(f"{self.prelude} {statement or ''}".strip())
            if statement is not None:
                return
            limit.begun(proxied, is_given=self.given_limit is not None)
        limit.apply(proxied, deadline)

    def note_settings(self, names: Collection[str]) -> None:
        """Follow statements of ours that have changed settings."""
        if self.limit is not None and SETTING in names:
            self.limit.forget()

    def end_limit(self) -> None:
        """Let the following statements run without a deadline that has ended. Runs in SQLAlchemy's
        greenlet.
        """
        self.follow()
        if self.limit is not None:
            self.limit.take_off(self.connection.connection)

    def _end_limit_before_commit(self) -> None:
        """As `end_limit`; of an aborted transaction the COMMIT itself says that it is."""
        if self.limit is None or begun_transaction(self.connection.connection) is None:
            return
        try:
            self.end_limit()
        except Exception as error:
            if sqlstate_of(error) != IN_FAILED_SQL_TRANSACTION:
                raise

    def _begin_with(self, statements: str) -> None:
        proxied = self.connection.connection
        try:
            begin_with(proxied, statements)
        except BaseException as error:
            if begun_transaction(proxied) is not None:
                self.prelude = ""
            # SQLAlchemy's own error around that of asyncpg has no more than its SQLSTATE.
            if isinstance(error, Exception) and not reported_by_server(error.__cause__ or error):
                discard(proxied)  # what became of the BEGIN is unknown
            raise
        self.prelude = ""

    def is_rolled_back_under(self, participant: Participant) -> bool:
        """Whether what a session had joined was rolled back by others than the session."""
        joined = self.participants.get(participant)
        return joined is not None and not joined.is_active

    def is_committed_under(self, participant: Participant) -> bool:
        """Whether a COMMIT has stored what a session did, and the session has not ended yet."""
        return participant in self.participants and self.participants[participant] is None

    @property
    def is_aborted(self) -> bool:
        """Whether an error is known that has aborted the transaction."""
        return self._aborts

    @property
    def is_joined(self) -> bool:
        """Whether the transaction of the connection goes on after that of a session has ended."""
        return not self.connection.closed and self.connection.in_transaction()

    def note_error(self, error: BaseException, *, is_disconnect: bool = False) -> None:
        """Keep the first error that PostgreSQL reported or that cost the connection.

        Until there is one, keep the first of the others: it may have left the transaction intact.
        """
        aborts = is_disconnect or reported_by_server(error)
        if self.error is None or (aborts and not self._aborts):
            self.error = error
            self._aborts = aborts

    def forget_error(self) -> None:
        """Forget the error: the transaction is back at a savepoint before it."""
        self.error = None
        self._aborts = False

    def defer(self, callbacks: Sequence[Callback]) -> None:
        """Keep the callbacks of a session that has ended until the transaction is committed."""
        self.follow()
        self.owes_commit = True
        self.deferred.extend(callbacks)

    def mark_savepoint(self, name: str) -> None:
        if self._marks is None:
            self._marks = {}
        self._marks[name] = (len(self.deferred), len(self.locks))

    def roll_back_to_savepoint(self, name: str) -> None:
        """Follow a ROLLBACK TO, which repairs an aborted transaction, but no lost connection."""
        self.forget_error()
        if self.limit is not None:
            self.limit.forget()
        # A savepoint without a mark is older than all that was noted.
        deferred, locks = self._marks.get(name, (0, 0)) if self._marks else (0, 0)
        del self.deferred[deferred:]
        del self.locks[locks:]

    def needs_verified_commit(self) -> bool:
        if self.owes_commit:
            return True
        for participant in self.participants:
            if participant.needs_verified_commit:
                return True
        return False

    def commit(
        self, dbapi_connection: PoolProxiedConnection, dialect_commit: DialectCommit
    ) -> None:
        """Send a COMMIT, and raise unless PostgreSQL has stored the transaction."""
        if self.ended is not None or self.borrowers:
            self._refuse()
        if self.deferred:
            check_can_run()  # before anything is sent
        check_is_free(dbapi_connection)
        self._at_any_time(self._commit_and_observe, dbapi_connection, dialect_commit)
        if self.deferred:
            callbacks, self.deferred = self.deferred, []
            run_in_greenlet(callbacks)

    def _at_any_time(self, send: Callable[..., None], *arguments: Any) -> None:
        """Call what ends the transaction or a savepoint, which no deadline stops."""
        if begun_deadline() is None and self.limit is None:
            send(*arguments)
            return
        with suspended():
            send(*arguments)

    def _commit_and_observe(
        self, dbapi_connection: PoolProxiedConnection, dialect_commit: DialectCommit
    ) -> None:
        observers, timeout = self._wishes()
        if observers or timeout is not None:
            self._end_limit_before_commit()  # statements of ours come before it
        for observer in observers:
            observer.before_commit(self.connection)
        self._send_commit(dbapi_connection, dialect_commit, timeout)
        self.note_commit()
        for observer in observers:
            observer.after_commit(self.connection)

    def _refuse(self) -> NoReturn:
        """Raise because a block of `driver_connection` is open, or has ended the transaction."""
        if self.ended is not None:
            raise TransactionStateError(str(self.ended)) from self.ended
        raise TransactionStateError(
            "a block of driver_connection is open on the session, so its transaction cannot be "
            "committed; commit it after that block"
        )

    def _send_commit(
        self,
        dbapi_connection: PoolProxiedConnection,
        dialect_commit: DialectCommit,
        timeout: float | None,
    ) -> None:
        noted = None if timeout is None else self._trace(dbapi_connection)
        self.attempt = attempt = verify_next_commit(dbapi_connection)
        if attempt is None:
            dialect_commit(dbapi_connection)
        else:
            try:
                dialect_commit(dbapi_connection)
            except BaseException as error:
                if attempt.outcome is not Outcome.UNKNOWN:
                    raise
                if timeout is None or noted is None:
                    self._raise_unknown(error, attempt.error)
                    raise
                self._resolve(error, attempt, noted, timeout)
            else:
                if attempt.outcome is not Outcome.STORED:
                    raise aborted_by(self.error)

    def _wishes(self) -> tuple[list[CommitObserver], float | None]:
        """Return what observes the COMMIT, and the longest time in which a session wants to know
        of one without an answer, in seconds; `None` where none does.
        """
        observers: list[CommitObserver] = []
        longest = None
        for participant in self.participants:
            if participant.observer is not None:
                observers.append(participant.observer)
            timeout = participant.resolve_commit
            if timeout is not None and (longest is None or timeout > longest):
                longest = timeout
        return observers, longest

    def _trace(self, dbapi_connection: PoolProxiedConnection) -> Trace | None:
        """Note what the outcome of the COMMIT can be asked by; `None` where none will be sent."""
        if begun_transaction(dbapi_connection) is None:
            return None
        try:
            return trace(dbapi_connection)
        except Exception as error:
            if sqlstate_of(error) == IN_FAILED_SQL_TRANSACTION:
                raise aborted_by(self.error) from self.error
            raise

    def _resolve(
        self, error: BaseException, attempt: CommitAttempt, noted: Trace, timeout: float
    ) -> None:
        """Ask PostgreSQL what became of a COMMIT without an answer; raise unless it is stored."""
        if not isinstance(error, (Exception, asyncio.CancelledError)):
            self._raise_unknown(error, attempt.error)
            raise error
        found = self._resolved(noted, timeout)
        if found.verdict is Verdict.UNKNOWN:
            self._raise_unknown(error, attempt.error, found.reason)
        if found.verdict is Verdict.LOST:
            raise transaction_lost(self._phase(), attempt.error)
        # The next user needs another one; of the others SQLAlchemy would say the same if it saw the
        # error.
        if attempt.was_lost:
            replace_pool(self.connection)
        self.connection.invalidate()

    def _resolved(self, noted: Trace, timeout: float) -> Resolution:
        began_at = monotonic()
        found = await_only(resolve(self.connection.engine, noted, timeout))
        seconds = monotonic() - began_at
        tell(self.connection.dialect, CommitResolved(_RESOLVED[found.verdict], seconds))
        return found

    def commit_prepared(self, dialect_commit: Callable[[], None]) -> None:
        """Send COMMIT PREPARED; PostgreSQL answers with an error where it stores nothing."""
        try:
            dialect_commit()
        except BaseException as error:
            if not refuses_commit(error):
                self._raise_unknown(error, error)
            raise
        self.note_commit()
        for observer in self._wishes()[0]:
            observer.after_commit(self.connection)

    def note_commit(self) -> None:
        """Note that the transaction is stored, for each session that is still open on it."""
        for participant in self.participants:
            self.participants[participant] = None

    def release(self, name: str, dialect_release: DialectRelease) -> None:
        """Send a RELEASE: what joined the savepoint belongs to the level around it then."""
        self.releasing = name
        released = self.connection.get_nested_transaction()
        self._at_any_time(dialect_release, self.connection, name)
        self.releasing = None
        for participant, joined in self.participants.items():
            if joined is released:
                self.participants[participant] = self._transaction

    def _phase(self) -> CommitPhase:
        is_ending = self.owes_commit or any(each.is_ending for each in self.participants)
        return "end" if is_ending else "commit"

    def _raise_unknown(
        self, error: BaseException, cause: BaseException | None, reason: str = ""
    ) -> None:
        unknown = commit_unknown(self._phase(), cause, reason)
        for participant in self.participants:
            participant.unknown = unknown
        if isinstance(error, (Exception, asyncio.CancelledError)):
            raise unknown
