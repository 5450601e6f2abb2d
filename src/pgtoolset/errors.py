"""The errors of pgtoolset.

Each derives from `PgToolsetError` and from the builtin that a Python programmer would catch.
Errors of SQLAlchemy and of the driver propagate unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.exc import TimeoutError as _PoolTimeout

from pgtoolset._text import safe, safe_lines

if TYPE_CHECKING:
    from pgtoolset.types import CommitPhase, SpentOn
    from pgtoolset.values import Blocker, ConnectionHolder

__all__ = [
    "CommitUnknownError",
    "DatabaseExistsError",
    "DatabaseInUseError",
    "DatabaseNotFoundError",
    "DeadlineExceededError",
    "EmbeddedServerError",
    "LifespanError",
    "LockTimeoutError",
    "NoDatabaseError",
    "OutsideReferenceError",
    "PgToolsetError",
    "PoolTimeoutError",
    "PoolerError",
    "RowDeletedError",
    "RowNotFoundError",
    "SettingMissingError",
    "TransactionAbortedError",
    "TransactionLostError",
    "TransactionStateError",
    "UnsupportedDriverError",
    "UnsupportedVersionError",
    "WaitTimeoutError",
    "WatchFailedError",
    "WatcherClosedError",
]


class PgToolsetError(Exception):
    """The root of all errors of this library. Catch it where any of them may occur.

    A message is one line, whatever it quotes: control characters are escaped and passwords of URLs
    left out. The attributes of an error hold what PostgreSQL said, unchanged.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(self._said(each) for each in arguments))

    def _said(self, argument: object) -> object:
        return safe(argument) if isinstance(argument, str) else argument


class TransactionAbortedError(PgToolsetError, RuntimeError):
    """PostgreSQL has discarded a transaction whose block ended without an exception.

    After an error PostgreSQL refuses every statement until the transaction, or the savepoint around
    the error, is rolled back, and it answers a COMMIT with ROLLBACK. Code that catches a database
    error and goes on would report success for lost work. Nothing was stored.

    Let the error propagate, or put the statement that may fail into a `get_transaction` block of
    its own and catch the error around that block. The `__cause__` is the swallowed error.

    Attributes:
        sqlstate: the SQLSTATE of the swallowed error; `None` where it is unknown.

    See https://www.postgresql.org/docs/current/tutorial-transactions.html
    """

    def __init__(self, message: str, *, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class CommitUnknownError(PgToolsetError, ConnectionError):
    """The connection was lost after COMMIT was sent and before it was answered.

    PostgreSQL may have stored the transaction or not. Also raised where no answer came within the
    driver's `command_timeout`, and where the server or a pooler said that it stops. A connection
    that was lost before COMMIT was sent is another error: nothing is stored then.

    Do not run the work again before you know. With `resolve_commit=` the library asks PostgreSQL,
    and this error says why that gave no answer. Otherwise look whether the row is there, in a new
    session, or give the work a key that cannot be stored twice. A block that caught this error from
    its own `commit()` can commit nothing afterwards, and its end raises the error again. Callbacks
    of `on_commit` have not run. The `__cause__` is the driver's error.

    A session with several connections sends a COMMIT on each. Where one of them has stored its part
    and a later one fails, with whatever error, that is this error too.

    Attributes:
        phase: which commit it was. `"end"`: the one that the library sends at the end of a block,
            a unit of work, a request or a stream. `"commit"`: one that the block sent itself, with
            `commit()`. `"statement"`: a statement outside a transaction, such as CREATE DATABASE.

    See https://www.postgresql.org/docs/current/sql-commit.html
    """

    def __init__(self, message: str, *, phase: CommitPhase) -> None:
        super().__init__(message)
        self.phase: CommitPhase = phase


class TransactionLostError(PgToolsetError, ConnectionError):
    """The connection was lost at the COMMIT, and the transaction is certainly not stored.

    Raised in place of `CommitUnknownError` where `resolve_commit=` was given and PostgreSQL has
    answered. Run the work again; `run_transaction` does. Callbacks of `on_commit` have not run. The
    `__cause__` is the driver's error.

    See https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT
    """


class TransactionStateError(PgToolsetError, RuntimeError):
    """The session's transaction is in a state that does not allow the call.

    Raised for an option of an outermost transaction inside another one, for `on_commit` outside of
    a transaction, for a lock in AUTOCOMMIT. The message names the state; change it, or open another
    session.
    """


class UnsupportedDriverError(PgToolsetError, ValueError):
    """The database, or the driver of the engine, is one that the called function does not support.

    Use PostgreSQL through `postgresql+asyncpg` or `postgresql+psycopg`. Nothing was sent.
    """


class UnsupportedVersionError(PgToolsetError, RuntimeError):
    """An installed package has a version that the called function does not support.

    The message names the package and the version to install.
    """


class EmbeddedServerError(PgToolsetError, RuntimeError):
    """The embedded PostgreSQL of `pgtoolset.testing` is not installed, or did not start.

    Install `pgtoolset[testing]`, or read the server's log, which the message shows.
    """

    def _said(self, argument: object) -> object:
        return safe_lines(argument) if isinstance(argument, str) else argument


class LifespanError(PgToolsetError, RuntimeError):
    """The startup or shutdown of an application under test has failed.

    The message has the reason that the application gives; read its log, and correct its lifespan.
    """


class DeadlineExceededError(PgToolsetError, TimeoutError):
    """The time of a `deadline` is over.

    Work that was not committed is rolled back when the error leaves the block of its transaction.
    Try again later, do less in one block, or give it more time. The `__cause__` is the error of
    the part that was cut: a `LockTimeoutError` names the sessions in the way, say.

    Attributes:
        spent_on: what the rest of the time was spent on. `"pool"`: a connection was waited for, or
            made. `"lock"`: a lock function of this library. `"statement"`: a statement, or code of
            the block, so that the next statement was not sent. `"retry"`: `run_transaction` could
            not try again. `"wait"`: a row did not change.
        seconds: the length of the deadline.

    See docs/deadlines.md.
    """

    def __init__(self, message: str, *, spent_on: SpentOn, seconds: float) -> None:
        super().__init__(message)
        self.spent_on: SpentOn = spent_on
        self.seconds = seconds


class LockTimeoutError(PgToolsetError, TimeoutError):
    """A lock could not be acquired in time. No lock of the call is held.

    The message names the sessions that hold the lock. Try again later, wait longer (`timeout`), or
    end those sessions.

    Attributes:
        tables: the qualified names of the requested tables; empty for an advisory lock.
        mode: the requested mode: `"EXCLUSIVE"`.
        timeout: the time limit in seconds; 0 with `nowait`.
        blockers: the sessions that hold the lock or stand before it in the queue; empty where none
            was seen, and the message says why.

    See https://www.postgresql.org/docs/current/explicit-locking.html
    """

    def __init__(
        self,
        message: str,
        *,
        tables: Sequence[str],
        mode: str,
        timeout: float,
        blockers: Sequence[Blocker] = (),
    ) -> None:
        super().__init__(message)
        self.tables: tuple[str, ...] = tuple(tables)
        self.mode = mode
        self.timeout = timeout
        self.blockers: tuple[Blocker, ...] = tuple(blockers)


class NoDatabaseError(PgToolsetError, NotImplementedError):
    """A double of `pgtoolset.testing` was used for something that needs a database.

    Test that code with the fixture `pg_session`.
    """


class PoolTimeoutError(PgToolsetError, _PoolTimeout, TimeoutError):
    """All connections of a pool were out for longer than a statement may wait for one.

    Raised for each engine that the library has seen, in place of SQLAlchemy's `TimeoutError`, which
    it is too. The message names the connection that has been out for the longest time. End a
    transaction before you wait for something else than the database, or let the pool have more
    connections: `pool_size`, `max_overflow`.

    Attributes:
        holders: who holds the connections, the longest first; see `pgtoolset.holders`. A connection
            that was taken before the library has seen the engine is not among them.

    See docs/connections.md and https://docs.sqlalchemy.org/en/20/errors.html#error-3o7r
    """

    code: str | None = "3o7r"

    def __init__(self, message: str, *, holders: Sequence[ConnectionHolder] = ()) -> None:
        super().__init__(message)
        self.holders: tuple[ConnectionHolder, ...] = tuple(holders)


class PoolerError(PgToolsetError, DBAPIError, RuntimeError):
    """A pooler between the driver and PostgreSQL has made a statement or a connection impossible.

    The message names the option to change, of the driver or of the pooler. It takes the place of
    SQLAlchemy's error, is one itself, and has the same attributes: `orig`, `statement`, `params`.
    The `__cause__` is the driver's error.

    See https://www.pgbouncer.org/features.html and docs/poolers.md.
    """

    def __init__(self, message: str, *, refused: DBAPIError, is_disconnect: bool = False) -> None:
        StatementError.__init__(
            self,
            safe(message),
            refused.statement,
            refused.params,
            refused.orig,
            hide_parameters=refused.hide_parameters,
            ismulti=refused.ismulti,
        )
        self.connection_invalidated = is_disconnect

    def __str__(self) -> str:
        return str(self.args[0])


class RowNotFoundError(PgToolsetError, LookupError):
    """There is no row with the given primary key.

    Check the key, and that the transaction that inserts the row has committed.
    """


class RowDeletedError(RowNotFoundError):
    """The row was deleted while the caller waited for it to change.

    Stop waiting; another row with this key would be a new one.
    """


class WaitTimeoutError(PgToolsetError, TimeoutError):
    """The row did not change in time.

    Wait again, with `baseline=` so that a change in between is not missed, or give up.
    """


class SettingMissingError(PgToolsetError, LookupError):
    """A setting that each transaction must have is missing or empty.

    Raised at the start of a unit of work with `require=`, before any statement. Give the setting in
    `settings=`: a request without a tenant, say, must not reach the tables of tenants.

    Attributes:
        names: the settings.
    """

    def __init__(self, message: str, *, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names: tuple[str, ...] = tuple(names)


class WatchFailedError(PgToolsetError, RuntimeError):
    """A `RowWatcher` cannot read the watched rows any more.

    Raised where their table was dropped or a privilege revoked, to the waiters of these rows and
    columns only. The `__cause__` is the driver's error: remove it, then wait again.

    Attributes:
        sqlstate: the SQLSTATE of the cause; `None` for an error of another kind.
    """

    def __init__(self, message: str, *, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class WatcherClosedError(PgToolsetError, RuntimeError):
    """A `RowWatcher` was closed during a wait, or is used outside of its block.

    Wait inside `async with RowWatcher(engine) as watcher`, and make a new one after it was closed.
    """


class DatabaseExistsError(PgToolsetError, ValueError):
    """A database with this name exists already.

    Choose another name, drop the database, or pass `exist_ok=True`.
    """


class DatabaseNotFoundError(PgToolsetError, LookupError):
    """There is no database with this name.

    Check the name and the server, or pass `missing_ok=True`.
    """


class DatabaseInUseError(PgToolsetError, RuntimeError):
    """A database cannot be dropped or copied while sessions are connected to it.

    Close these sessions, or drop it with `force=True`, which ends them. The message names what
    `force=True` does not end: prepared transactions, active replication slots and subscriptions.

    Attributes:
        database: the name of the database.
        sessions: the connected sessions; empty where they had ended before they could be listed.
    """

    def __init__(self, message: str, *, database: str, sessions: Sequence[Blocker] = ()) -> None:
        super().__init__(message)
        self.database = database
        self.sessions: tuple[Blocker, ...] = tuple(sessions)


class OutsideReferenceError(PgToolsetError, RuntimeError):
    """Rows of tables outside the metadata reference rows that `cleanup_tables` would delete.

    Nothing was deleted. Empty those tables first, or add them to the metadata.

    Attributes:
        references: each table, schema-qualified, with the constraint in parentheses.
    """

    def __init__(self, message: str, *, references: Sequence[str]) -> None:
        super().__init__(message)
        self.references: tuple[str, ...] = tuple(references)
