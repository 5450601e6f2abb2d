"""psycopg 3: libpq's connection knows the state of the transaction, without a round trip.

In an aborted transaction PostgreSQL answers COMMIT with the command tag ROLLBACK and no error, and
psycopg drops that tag. libpq has the state that the server has sent with its last answer, and so
the answer to the COMMIT is known before it is sent: no other statement may run on the connection in
between. See https://www.postgresql.org/docs/current/libpq-status.html#LIBPQ-PQTRANSACTIONSTATUS

Cancelled in a statement, psycopg asks the server to cancel it and waits for the answer. A COMMIT
that is cancelled like that may be stored, so it runs in a task of its own.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import URL, Dialect, PoolProxiedConnection
from sqlalchemy.dialects.postgresql import base
from sqlalchemy.engine import characteristics
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.util import await_only

from pgtoolset._cancellation import UninterruptedHere, uninterrupted
from pgtoolset._compatibility import isolation_level_at_connect, unsupported
from pgtoolset._postgres.drivers._attempts import CommitAttempt, Outcome
from pgtoolset._postgres.drivers._plain import (
    cancel_psycopg,
    connect_psycopg,
    terminate_psycopg,
)

#: libpq's states of a transaction, `PQTRANS_...`. psycopg is not imported here.
_IDLE = 0
_ACTIVE = 1
_IN_TRANSACTION = 2
_IN_ERROR = 3

#: libpq's states of a pipeline, `PQ_PIPELINE_...`.
_NO_PIPELINE = 0

#: The peer has closed its end: nothing that is sent now can reach it.
_HAS_LEFT = (
    getattr(select, "POLLRDHUP", 0)
    | getattr(select, "POLLHUP", 0)
    | getattr(select, "POLLERR", 0)
    | getattr(select, "POLLNVAL", 0)
)

#: Seconds that the server may take to cancel a statement on a connection that is closed.
_CANCEL_TIMEOUT = 2.0

#: Seconds until the server is asked once more to cancel a statement, because it ignores a request
#: that reaches it before the statement does; twice as many after that.
_FIRST_PAUSE = 0.1

#: What sends a COMMIT, and says whether it can succeed.
_NEEDED = ("_commit_gen", "lock", "wait", "pgconn")

_CONSEQUENCE = "The answer to a COMMIT cannot be checked, so nothing is sent"
_ADVICE = "Give SQLAlchemy psycopg's own connection, or a wrapper that passes its attributes on."


class PsycopgDriver:
    """The driver psycopg, from version 3 on."""

    begins_by_itself = True
    options: tuple[str, ...] = ("row_factory", "cursor_factory", "prepare_threshold")
    prepared_prefix = "_pg3_"
    without_caches = 'connect_args={"prepare_threshold": None}'

    async def connect(self, url: URL, database: str) -> Any:
        """Connect without SQLAlchemy; see `pgtoolset._postgres.drivers._plain`."""
        return await connect_psycopg(url, database)

    def refuses_database(self, error: BaseException) -> bool:
        """Whether a server has refused a connection so that another database may accept it.

        libpq gives a server's refusal no SQLSTATE, and so any refusal may be one.
        """
        name = type(error).__name__
        return name == "OperationalError"  # a subclass of it is for a time that is over

    def mend(self, dialect: Dialect) -> None:
        """Let the options of a connection end with it, and a connection end after its users.

        psycopg frees libpq's connection as it closes, also below a task that waits for an answer on
        it, and that task would read memory that is freed.

        psycopg's BEGIN names each option that is not `None`. SQLAlchemy sets them back to `False`
        and to the level that it saw at its first connection, and every later BEGIN says READ WRITE
        then, also for a role whose transactions are read-only by default.
        """
        known: Mapping[str, Any] = dialect.connection_characteristics  # type: ignore[attr-defined]
        vars(dialect)["connection_characteristics"] = {
            **known,
            "isolation_level": _IsolationLevel(),
            "postgresql_readonly": _ReadOnly(),
            "postgresql_deferrable": _Deferrable(),
        }
        for name in ("do_close", "do_terminate"):
            vars(dialect)[name] = _closing(getattr(dialect, name))

    def terminate(self, raw: Any) -> None:
        """Close the socket at once."""
        with suppress(Exception):
            terminate_psycopg(raw)

    async def close(self, raw: Any) -> None:
        """Close the connection, and cancel what runs on it: PostgreSQL would finish that first."""
        try:
            if _is_busy(raw):
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CANCEL_TIMEOUT):
                        await _cancel_running(raw)
        finally:
            self.terminate(raw)

    def close_pooled(
        self, adapter: Any, dialect_terminate: Callable[[DBAPIConnection], None]
    ) -> None:
        """Close the connection of SQLAlchemy's adapter, which its pool has given up.

        SQLAlchemy would close the socket in any case, also while a task waits for it.
        """
        self.terminate(adapter.driver_connection)

    def roll_back(
        self,
        connection: PoolProxiedConnection,
        dialect_rollback: Callable[[PoolProxiedConnection], None],
    ) -> None:
        """Roll back. Where no transaction is open nothing is sent, and no cancellation arrives.

        The pool calls it after a COMMIT. psycopg may suspend all the same, and a cancellation would
        hide there that the transaction is stored.
        """
        raw: Any = _raw_of(connection)
        if raw is None or raw.pgconn.transaction_status != _IDLE or _has_pipeline(raw):
            dialect_rollback(connection)
        else:
            await_only(UninterruptedHere(raw.rollback()))

    def is_closed(self, raw: Any) -> bool:
        """Whether the connection is closed or lost.

        psycopg reads nothing between two statements, and learns of the loss by the next one; the
        operating system knows it already.
        """
        return bool(raw.closed) or _has_left(raw)

    def is_in_transaction(self, raw: Any) -> bool:
        """Whether a transaction is open, as the server has said last."""
        return raw.pgconn.transaction_status in (_ACTIVE, _IN_TRANSACTION, _IN_ERROR)

    def keeps_its_backend(self, raw: Any) -> bool:
        """Whether psycopg prepares statements, which it must not behind most poolers."""
        return getattr(raw, "prepare_threshold", None) is not None

    def server_pid(self, raw: Any) -> int:
        """Return the process id that libpq got as it connected."""
        return int(raw.pgconn.backend_pid)

    def reported(self, raw: Any, name: str) -> str | None:
        """Return the last value of a parameter that the server reports unasked."""
        try:
            value = raw.pgconn.parameter_status(name.encode())
        except Exception:
            return None  # the connection is closed
        return None if value is None else str(value.decode())

    async def finds_row(self, raw: Any, statement: str) -> bool:
        """Whether a query has one row. psycopg has begun a transaction for it, which is ended."""
        cursor = await raw.execute(statement, prepare=False)
        found = bool(cursor.rowcount == 1)
        await raw.rollback()
        return found

    def refuses_to_begin(self, raw: Any) -> bool:
        """Say no: the state is the server's, and it is in no transaction after such a BEGIN."""
        return False

    def is_read_only(self, connection: PoolProxiedConnection) -> bool:
        """Whether an option of the connection has its transactions begin as READ ONLY."""
        return bool(getattr(_raw_of(connection), "read_only", None))

    def is_running(self, connection: PoolProxiedConnection) -> bool:
        """Whether a task executes a statement on the connection at this moment."""
        raw: Any = _raw_of(connection)
        return raw is not None and _is_busy(raw)

    def is_committing(self, connection: PoolProxiedConnection) -> bool:
        """Whether a COMMIT that is observed was sent and has not ended."""
        return isinstance(_raw_of(connection), CommitAttempt)

    def isolation_level(self, connection: PoolProxiedConnection) -> str | None:
        """Return the isolation level of the transactions, or AUTOCOMMIT; `None` by default."""
        raw: Any = _raw_of(connection)
        if raw.autocommit:
            return "AUTOCOMMIT"
        level = raw.isolation_level
        return None if level is None else str(level.name)

    def begun_transaction(self, connection: PoolProxiedConnection) -> Any | None:
        """Return the state of the open transaction; `None` before the first statement."""
        raw: Any = _raw_of(connection)
        return raw.pgconn.transaction_status if self.is_in_transaction(raw) else None

    def begin(self, connection: PoolProxiedConnection, statements: str) -> None:
        """Begin the transaction with statements; psycopg sends its BEGIN by itself before."""
        raw: Any = _raw_of(connection)
        if statements:
            await_only(raw.execute(statements, prepare=False))

    def show(self, connection: PoolProxiedConnection, name: str) -> str:
        """Return a setting."""
        return await_only(self._show(_raw_of(connection), name))

    async def _show(self, raw: Any, name: str) -> str:
        # The factory of the connection may make rows of any kind.
        async with raw.cursor(row_factory=lambda _: tuple) as cursor:
            await cursor.execute(f"SHOW {name}", prepare=False)
            return str((await cursor.fetchone())[0])

    def check_verifiable(self, connection: PoolProxiedConnection) -> None:
        """Raise where psycopg, or a wrapper of its connection, lacks what sends a COMMIT."""
        raw: Any = _raw_of(connection)
        for name in _NEEDED:
            if not hasattr(raw, name):
                raise unsupported(
                    "psycopg", f"attribute {name} of {type(raw).__name__}", _CONSEQUENCE, _ADVICE
                )
        if getattr(connection.dbapi_connection, "_connection", None) is not raw:
            missing = f"attribute _connection of {type(connection.dbapi_connection).__name__}"
            raise unsupported("sqlalchemy", missing, _CONSEQUENCE)

    def verify_next_commit(self, connection: PoolProxiedConnection) -> CommitAttempt | None:
        """Observe the next COMMIT.

        SQLAlchemy's adapter keeps psycopg's connection in an attribute and calls `commit()` on it;
        the returned object takes its place for that call.
        """
        raw: Any = _raw_of(connection)
        if raw.pgconn.transaction_status == _IDLE and not _has_pipeline(raw):
            return None  # no statement has run, so no COMMIT is sent
        adapter: Any = connection.dbapi_connection
        attempt = adapter._connection = _Attempt(self, raw, adapter)
        return attempt


class _Options:
    """Sets the options of a connection, whatever cancels the caller.

    The pool resets them as a connection returns. psycopg may suspend there, and a cancellation
    would cost the pool the connection.
    """

    def __init__(self, adapter: DBAPIConnection) -> None:
        self._driver: Any = adapter.driver_connection

    def set_autocommit(self, value: bool) -> None:
        await_only(UninterruptedHere(self._driver.set_autocommit(value)))

    def set_isolation_level(self, value: Any) -> None:
        await_only(UninterruptedHere(self._driver.set_isolation_level(value)))

    def set_read_only(self, value: bool | None) -> None:
        await_only(UninterruptedHere(self._driver.set_read_only(value)))

    def set_deferrable(self, value: bool | None) -> None:
        await_only(UninterruptedHere(self._driver.set_deferrable(value)))


class _IsolationLevel(characteristics.IsolationLevelCharacteristic):
    def reset_characteristic(self, dialect: Dialect, dbapi_conn: DBAPIConnection) -> None:
        options: Any = _Options(dbapi_conn)
        if isolation_level_at_connect(dialect) is not None:
            dialect.reset_isolation_level(options)
            return
        options.set_autocommit(False)
        options.set_isolation_level(None)


class _ReadOnly(base.PGReadOnlyConnectionCharacteristic):
    def reset_characteristic(self, dialect: Dialect, dbapi_conn: DBAPIConnection) -> None:
        _Options(dbapi_conn).set_read_only(None)


class _Deferrable(base.PGDeferrableConnectionCharacteristic):
    def reset_characteristic(self, dialect: Dialect, dbapi_conn: DBAPIConnection) -> None:
        _Options(dbapi_conn).set_deferrable(None)


class _Attempt(CommitAttempt):
    """Stands in for psycopg's connection while it commits."""

    __slots__ = ("_adapter", "_driver", "_is_sent")

    def __init__(self, driver: PsycopgDriver, raw: Any, adapter: Any) -> None:
        super().__init__(raw)
        self._driver = driver
        self._adapter = adapter
        self._is_sent = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    async def commit(self) -> None:
        """Send COMMIT, whatever cancels the caller, and note its outcome."""
        try:
            # Not in this task: psycopg 3.2 waits by `asyncio.wait_for`, which may cancel its own.
            await uninterrupted(self._commit_here())
        finally:
            self._adapter._connection = self._raw

    async def _commit_here(self) -> None:
        raw = self._raw
        if _has_pipeline(raw):
            # The state is that of the last statement only when all of them are answered.
            async with raw.pipeline():
                pass
        async with raw.lock:
            is_in_error = raw.pgconn.transaction_status == _IN_ERROR
            self.was_lost = self._driver.is_closed(raw)
            try:
                await raw.wait(self._sending(raw._commit_gen()))
            except BaseException as error:
                if self._fail(error, is_sent=self._is_sent and not self.was_lost):
                    self.was_lost = self._driver.is_closed(raw)
                    raw.pgconn.finish()  # this task alone waits for its socket
                raise
        self.outcome = Outcome.DISCARDED if is_in_error else Outcome.STORED

    def _sending(self, commit: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        """Yield what `commit` waits for. It writes the COMMIT before it waits for the first time:
        an error without a wait is a refusal of libpq or of psycopg.
        """
        ready = None
        while True:
            try:
                waiting = commit.send(ready)
            except StopIteration:
                return
            self._is_sent = True
            ready = yield waiting


def _raw_of(connection: PoolProxiedConnection) -> Any:
    """Return psycopg's connection, also of one that has left its pool; `None` where it is gone.

    An engine that is not async, which is refused, has no adapter around it.
    """
    adapter: Any = connection.dbapi_connection
    return getattr(adapter, "driver_connection", adapter)


def _closing(close: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a method of the dialect that closes a connection, for one that a task may use."""

    def closing(adapter: Any) -> None:
        if _is_busy(adapter.driver_connection):
            terminate_psycopg(adapter.driver_connection)
        else:
            close(adapter)

    return closing


def _is_busy(raw: Any) -> bool:
    """Whether a task waits for an answer, or has begun a COPY. In a pipeline answers may be due
    while no task waits.
    """
    if raw.lock.locked():
        return True
    return raw.pgconn.transaction_status == _ACTIVE and not _has_pipeline(raw)


async def _cancel_running(raw: Any) -> None:
    """Ask the server to cancel what runs, until each task that waits for an answer has it.

    psycopg 3.2 reads a COPY without the lock, and then there is nothing to wait for.
    """
    pause = _FIRST_PAUSE
    while await cancel_psycopg(raw, _CANCEL_TIMEOUT):
        try:
            async with asyncio.timeout(pause), raw.lock:
                return
        except TimeoutError:
            pause *= 2


def _has_pipeline(raw: Any) -> bool:
    return bool(raw.pgconn.pipeline_status != _NO_PIPELINE)


def _has_left(raw: Any) -> bool:
    """Whether the server, or the network, has closed the connection already."""
    if not hasattr(select, "poll"):
        return False  # Windows
    poll = select.poll()
    poll.register(raw.pgconn.socket, _HAS_LEFT)
    return bool(poll.poll(0))
