"""The connection of asyncpg below a connection of SQLAlchemy.

In an aborted transaction PostgreSQL answers COMMIT with the command tag ROLLBACK and no error.
asyncpg returns that tag, and SQLAlchemy's adapter drops it. `verify_next_commit` reads it, without
a further round trip. See https://www.postgresql.org/docs/current/sql-commit.html and
https://www.postgresql.org/docs/current/protocol-message-formats.html (CommandComplete).

No other module knows what the driver does at a COMMIT.
"""

from __future__ import annotations

from contextlib import suppress
from enum import Enum, auto
from typing import Any

from sqlalchemy import Connection, PoolProxiedConnection

from pgtoolset._cancellation import UninterruptedHere
from pgtoolset._compatibility import unsupported
from pgtoolset._postgres.sqlstates import refuses_commit

#: In the `info` of a connection: its commits can be verified.
_KEY = "pgtoolset.verifiable"

_CONSEQUENCE = "The answer to a COMMIT cannot be checked, so nothing is sent"


class Outcome(Enum):
    """The outcome of a COMMIT."""

    #: PostgreSQL has stored the transaction.
    STORED = auto()
    #: PostgreSQL has answered ROLLBACK, because an error had aborted the transaction.
    DISCARDED = auto()
    #: PostgreSQL has answered with an error, and has rolled back.
    REFUSED = auto()
    #: The driver has refused to send it.
    NOT_SENT = auto()
    #: It was sent, and no answer says what became of it.
    UNKNOWN = auto()


def terminate(connection: Connection) -> None:
    """Close the socket at once, without a message to a server that may not answer."""
    driver = connection.connection.driver_connection
    if driver is not None:
        terminate_driver(driver)


def terminate_driver(driver: Any) -> None:
    """Close the socket of a connection of asyncpg, or of a wrapper around one. Never raises."""
    with suppress(Exception):  # the proxy of asyncpg's pool raises where the pool has it back
        driver.terminate()


def is_closed(driver: Any) -> bool:
    """Whether a connection of asyncpg, or a wrapper around one, is closed or lost."""
    try:
        return bool(driver.is_closed())
    except Exception:
        return True  # as above


def has_one_backend(connection: Connection) -> bool:
    """Whether two statements outside a transaction reach the same backend of PostgreSQL.

    Behind a pooler in transaction mode they may not: the next backend does not know a statement
    that the last one prepared. The driver does not say, but asyncpg must not cache statements
    there. An asyncpg that does not say whether it caches counts as behind a pooler: that is correct
    everywhere, at the price of a BEGIN.
    """
    return keeps_its_backend(connection.connection.driver_connection)


def keeps_its_backend(driver: Any) -> bool:
    """As `has_one_backend`, for a connection of the driver."""
    return bool(getattr(driver, "_stmt_cache_enabled", False))


#: The largest process id of Linux. A pooler such as PgBouncer answers with 32 random bits.
_LARGEST_PID = 2**22


def backend_pid(connection: Connection) -> int | None:
    """Return the pid of the backend, which the driver got as it connected; `None` where a pooler
    has answered in its place.
    """
    driver: Any = connection.connection.driver_connection
    pid = int(driver.get_server_pid())
    return pid if has_one_backend(connection) and 0 < pid <= _LARGEST_PID else None


def begun_transaction(connection: PoolProxiedConnection) -> Any | None:
    """Return asyncpg's transaction that SQLAlchemy's adapter has begun; `None` before the first
    statement.

    Raises:
        UnsupportedVersionError: the adapter does not have the attribute that keeps it.
    """
    adapter: Any = connection.dbapi_connection
    try:
        return adapter._transaction
    except AttributeError:
        raise unsupported(
            "sqlalchemy",
            f"attribute _transaction of {type(adapter).__name__}",
            "pgtoolset cannot see whether a transaction has begun",
        ) from None


def check_verifiable(connection: PoolProxiedConnection) -> None:
    """Raise where a COMMIT of `connection` could not be verified. Nothing is sent.

    Call it before the first statement of a transaction: `async_creator` may give any object that
    behaves like asyncpg's connection, such as the proxy of asyncpg's own pool.

    Raises:
        UnsupportedVersionError: asyncpg, or a wrapper of its connection, lacks an attribute.
    """
    info = connection.info
    driver: Any = connection.driver_connection
    # One that was lost in the pool refuses to be looked at. SQLAlchemy replaces it at its next use.
    if _KEY not in info and not is_closed(driver):
        owner = _owner_of(driver.transaction(), driver)
        _forget_transaction(owner, owner._top_xact)
        info[_KEY] = True


def verify_next_commit(connection: PoolProxiedConnection) -> CommitAttempt | None:
    """Observe the COMMIT that `connection` is about to send; `None` where it sends none.

    Call it just before the COMMIT. SQLAlchemy's adapter keeps asyncpg's transaction in an attribute
    and calls `commit()` on it; the returned object takes its place for that call.

    Raises:
        UnsupportedVersionError: the adapter or asyncpg does not have the attributes for that. The
            COMMIT must not be sent then: its answer could not be trusted.
    """
    transaction = begun_transaction(connection)
    if transaction is None:
        return None  # no statement has run, so no COMMIT is sent
    driver: Any = connection.driver_connection
    attempt = CommitAttempt(driver, transaction, _owner_of(transaction, driver))
    adapter: Any = connection.dbapi_connection
    adapter._transaction = attempt
    return attempt


class CommitAttempt:
    """Stands in for asyncpg's `Transaction` while it commits, and remembers its outcome.

    Attributes:
        outcome: the outcome of the COMMIT so far.
        error: the driver's error, where there was one.
        was_lost: whether the driver had lost the connection.
    """

    __slots__ = ("_driver", "_owner", "_transaction", "error", "outcome", "was_lost")

    def __init__(self, driver: Any, transaction: Any, owner: Any) -> None:
        self._driver = driver
        self._transaction = transaction
        self._owner = owner
        self.outcome = Outcome.NOT_SENT
        self.error: BaseException | None = None
        self.was_lost = False

    async def commit(self) -> None:
        """Send COMMIT and wait for its answer, whatever cancels the caller in between."""
        self.was_lost = is_closed(self._driver)
        # A caller who left before the answer would know neither of success nor of failure.
        answer: UninterruptedHere[str] = UninterruptedHere(self._driver.execute("COMMIT;"))
        try:
            tag = await answer
        except BaseException as error:
            self._fail(error, is_sent=answer.has_suspended and not self.was_lost)
            raise
        finally:
            # asyncpg's own `Transaction.commit` resets it too, however the COMMIT ended.
            self._owner._top_xact = None
        self.outcome = Outcome.STORED if tag == "COMMIT" else Outcome.DISCARDED

    async def rollback(self) -> None:
        """Roll back as asyncpg's own transaction does."""
        await self._transaction.rollback()

    def _fail(self, error: BaseException, *, is_sent: bool) -> None:
        """Note an error of the COMMIT. Unless it is an answer, the connection ends here.

        asyncpg writes in the same step in which it checks its own state, and then waits: an error
        without a wait is a refusal of its own.
        """
        self.error = error
        if is_sent and refuses_commit(error):
            self.outcome = Outcome.REFUSED
            return
        self.outcome = Outcome.UNKNOWN if is_sent else Outcome.NOT_SENT
        self.was_lost = is_closed(self._driver)
        # A transaction may still be open on it, or a late answer may still arrive.
        terminate_driver(self._driver)


def _owner_of(transaction: Any, driver: Any) -> Any:
    """Return the connection that keeps asyncpg's state, inside of what may be a wrapper."""
    owner = getattr(transaction, "_connection", None)
    if owner is None and hasattr(type(driver), "_top_xact"):
        owner = driver
    if not hasattr(owner, "_top_xact"):
        raise _not_verifiable(driver)
    return owner


def _forget_transaction(owner: Any, transaction: Any) -> None:
    try:
        owner._top_xact = transaction
    except AttributeError:
        raise _not_verifiable(owner) from None


def _not_verifiable(owner: Any) -> Exception:
    return unsupported(
        "asyncpg",
        f"attribute _top_xact of {type(owner).__name__} that can be set",
        _CONSEQUENCE,
        "Give SQLAlchemy asyncpg's own connection, or a wrapper that passes its attributes on.",
    )
