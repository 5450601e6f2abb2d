"""asyncpg: its transaction keeps the COMMIT, and the answer is the tag that it returns.

In an aborted transaction PostgreSQL answers COMMIT with the command tag ROLLBACK and no error.
asyncpg returns that tag, and SQLAlchemy's adapter drops it. The attempt reads it, without a further
round trip. See https://www.postgresql.org/docs/current/sql-commit.html and
https://www.postgresql.org/docs/current/protocol-message-formats.html (CommandComplete).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import URL, Dialect, PoolProxiedConnection
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.util import await_only

from pgtoolset._cancellation import UninterruptedHere
from pgtoolset._compatibility import unsupported
from pgtoolset._postgres.drivers._attempts import CommitAttempt, Outcome
from pgtoolset._postgres.drivers._plain import connect_asyncpg
from pgtoolset._postgres.sqlstates import sqlstate_of

#: SQLSTATEs of a refused connection where another database may be open: the database is missing,
#: sealed or full, or the role has no CONNECT privilege or no line in pg_hba.conf.
_REFUSED = frozenset({"3D000", "42501", "28000", "55000", "53300"})

#: Seconds until PostgreSQL is asked once more to cancel a statement; twice as many after that.
_FIRST_PAUSE = 0.1

_CONSEQUENCE = "The answer to a COMMIT cannot be checked, so nothing is sent"


class AsyncpgDriver:
    """The driver asyncpg."""

    begins_by_itself = False
    options: tuple[str, ...] = ()
    prepared_prefix = "__asyncpg_"
    without_caches = (
        'connect_args={"statement_cache_size": 0, "prepared_statement_cache_size": 0, '
        '"prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__"}'
    )

    async def connect(self, url: URL, database: str) -> Any:
        """Connect without SQLAlchemy; see `pgtoolset._postgres.drivers._plain`."""
        return await connect_asyncpg(url, database)

    def refuses_database(self, error: BaseException) -> bool:
        """Whether a server has refused a connection so that another database may accept it."""
        return sqlstate_of(error) in _REFUSED

    def mend(self, dialect: Dialect) -> None:
        """Leave a dialect as it is: asyncpg's BEGIN names only what differs from the defaults."""

    def terminate(self, raw: Any) -> None:
        """Close the socket at once, without a message to a server that may not answer."""
        with suppress(Exception):  # the proxy of asyncpg's pool raises where the pool has it back
            raw.terminate()

    async def close(self, raw: Any) -> None:
        """Close the connection, and cancel what runs on it."""
        with _cancelling_again(raw):
            await raw.close()

    def close_pooled(
        self, adapter: Any, dialect_terminate: Callable[[DBAPIConnection], None]
    ) -> None:
        """Close the connection of SQLAlchemy's adapter, which its pool has given up.

        To close a connection once more, gracefully, would be a suspension. A cancellation that
        waited for the answer to the COMMIT would arrive there, in place of the error about the
        COMMIT.
        """
        raw: Any = adapter.driver_connection
        if not self.is_closed(raw):
            with _cancelling_again(raw):
                dialect_terminate(adapter)

    def roll_back(
        self,
        connection: PoolProxiedConnection,
        dialect_rollback: Callable[[PoolProxiedConnection], None],
    ) -> None:
        """Roll back. Where no transaction is open SQLAlchemy's adapter does not suspend."""
        dialect_rollback(connection)

    def is_closed(self, raw: Any) -> bool:
        """Whether the connection is closed or lost, which asyncpg hears from the event loop."""
        try:
            return bool(raw.is_closed())
        except Exception:
            return True  # as above

    def is_in_transaction(self, raw: Any) -> bool:
        """Whether a transaction is open, as the server has said last."""
        check = getattr(raw, "is_in_transaction", None)
        return check is not None and bool(check())

    def keeps_its_backend(self, raw: Any) -> bool:
        """Whether asyncpg caches statements, which it must not behind a pooler.

        One that does not say so counts as behind a pooler: that is correct everywhere, at the price
        of a BEGIN.
        """
        return bool(getattr(raw, "_stmt_cache_enabled", False))

    def server_pid(self, raw: Any) -> int:
        """Return the process id that asyncpg got as it connected; 0 for a wrapper without it."""
        try:
            return int(raw.get_server_pid())
        except Exception:
            return 0

    def reported(self, raw: Any, name: str) -> str | None:
        """Return the last value of a parameter that the server reports unasked."""
        try:
            value = getattr(raw.get_settings(), name, None)
        except Exception:
            return None  # a wrapper without settings
        return None if value is None else str(value)

    async def finds_row(self, raw: Any, statement: str) -> bool:
        """Whether a query has one row, by the command tag of a query that is one message."""
        return bool(await raw.execute(statement) == "SELECT 1")

    def refuses_to_begin(self, raw: Any) -> bool:
        """Whether asyncpg would send a SAVEPOINT as its next BEGIN."""
        if self.is_closed(raw) or self.is_in_transaction(raw):
            return False
        return getattr(raw, "_top_xact", None) is not None

    def is_read_only(self, connection: PoolProxiedConnection) -> bool:
        """Whether an option of SQLAlchemy's adapter has its transactions begin as READ ONLY."""
        return bool(getattr(connection.dbapi_connection, "readonly", None))

    def is_running(self, connection: PoolProxiedConnection) -> bool:
        """Whether a task executes a statement on the connection at this moment.

        asyncpg refuses a second statement, but SQLAlchemy sends none to end a transaction whose
        BEGIN has not been answered yet.
        """
        mutex = getattr(connection.dbapi_connection, "_execute_mutex", None)
        return mutex is not None and mutex.locked()

    def is_committing(self, connection: PoolProxiedConnection) -> bool:
        """Whether a COMMIT that is observed was sent and has not ended."""
        adapter = connection.dbapi_connection
        return isinstance(getattr(adapter, "_transaction", None), CommitAttempt)

    def isolation_level(self, connection: PoolProxiedConnection) -> str | None:
        """Return the isolation level of the transactions, or AUTOCOMMIT; `None` by default."""
        level: str | None = getattr(connection.dbapi_connection, "isolation_level", None)
        return level

    def begun_transaction(self, connection: PoolProxiedConnection) -> Any | None:
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

    def begin(self, connection: PoolProxiedConnection, statements: str) -> None:
        """Begin the transaction with statements, in one message."""
        adapter: Any = connection.dbapi_connection
        await_only(self._begin(adapter, adapter.driver_connection, statements))

    async def _begin(self, adapter: Any, raw: Any, statements: str) -> None:
        # As SQLAlchemy's adapter begins it: no other task may execute anything meanwhile.
        async with adapter._execute_mutex:
            try:
                if _has_begun(adapter):
                    await raw.execute(statements)
                else:
                    await self._begin_with(adapter, raw, statements)
            except Exception as error:
                adapter._handle_exception(error)

    async def _begin_with(self, adapter: Any, raw: Any, statements: str) -> None:
        transaction = raw.transaction(
            isolation=adapter.isolation_level,
            readonly=adapter.readonly,
            deferrable=adapter.deferrable,
        )
        owner = _owner_of(transaction, raw)
        state = getattr(transaction, "_state", None)
        started = getattr(type(state), "STARTED", None)
        if started is None or owner._top_xact is not None or self.is_in_transaction(raw):
            await transaction.start()  # a wrapper's own, or one that asyncpg refuses
            _note_begun(adapter, transaction)
            await raw.execute(statements)
            return
        owner._top_xact = transaction
        try:
            await raw.execute(f"{_begin_of(adapter)}; {statements}")
        except BaseException:
            if not self.is_in_transaction(raw):
                owner._top_xact = None
                raise
            # PostgreSQL has begun it, and then refused one of the statements.
            transaction._state = started
            _note_begun(adapter, transaction)
            raise
        transaction._state = started
        _note_begun(adapter, transaction)

    def show(self, connection: PoolProxiedConnection, name: str) -> str:
        """Return a setting."""
        adapter: Any = connection.dbapi_connection
        return await_only(self._show(adapter, adapter.driver_connection, name))

    async def _show(self, adapter: Any, raw: Any, name: str) -> str:
        async with adapter._execute_mutex:
            try:
                return str(await raw.fetchval(f"SHOW {name}"))
            except Exception as error:
                adapter._handle_exception(error)
                raise  # it has raised an error of its own

    def check_verifiable(self, connection: PoolProxiedConnection) -> None:
        """Raise where asyncpg, or a wrapper of its connection, lacks an attribute."""
        raw: Any = connection.driver_connection
        if raw is None:  # it has left its pool
            adapter: Any = connection.dbapi_connection
            raw = adapter.driver_connection
        owner = _owner_of(raw.transaction(), raw)
        _forget_transaction(owner, owner._top_xact)

    def verify_next_commit(self, connection: PoolProxiedConnection) -> CommitAttempt | None:
        """Observe the next COMMIT.

        SQLAlchemy's adapter keeps asyncpg's transaction in an attribute and calls `commit()` on it;
        the returned object takes its place for that call.
        """
        transaction = self.begun_transaction(connection)
        if transaction is None:
            return None  # no statement has run, so no COMMIT is sent
        adapter: Any = connection.dbapi_connection
        attempt = _Attempt(self, adapter.driver_connection, transaction)
        adapter._transaction = attempt
        return attempt


class _Attempt(CommitAttempt):
    """Stands in for asyncpg's `Transaction` while it commits."""

    __slots__ = ("_driver", "_owner", "_transaction")

    def __init__(self, driver: AsyncpgDriver, raw: Any, transaction: Any) -> None:
        super().__init__(raw)
        self._driver = driver
        self._transaction = transaction
        self._owner = _owner_of(transaction, raw)

    async def commit(self) -> None:
        """Send COMMIT, whatever cancels the caller, and note its outcome."""
        self.was_lost = self._driver.is_closed(self._raw)
        # A caller who left before the answer would know neither of success nor of failure.
        answer: UninterruptedHere[str] = UninterruptedHere(self._raw.execute("COMMIT;"))
        try:
            tag = await answer
        except BaseException as error:
            # asyncpg writes in the same step in which it checks its own state, and then waits: an
            # error without a wait is a refusal of its own.
            if self._fail(error, is_sent=answer.has_suspended and not self.was_lost):
                self.was_lost = self._driver.is_closed(self._raw)
                self._driver.terminate(self._raw)
            raise
        finally:
            # asyncpg's own `Transaction.commit` resets it too, however the COMMIT ended.
            self._owner._top_xact = None
        self.outcome = Outcome.STORED if tag == "COMMIT" else Outcome.DISCARDED

    async def rollback(self) -> None:
        """Roll back as asyncpg's own transaction does."""
        await self._transaction.rollback()


def _has_begun(adapter: Any) -> bool:
    """Whether SQLAlchemy's adapter has begun a transaction; before 2.1 it keeps a flag for that."""
    return bool(getattr(adapter, "_started", adapter._transaction is not None))


def _note_begun(adapter: Any, transaction: Any) -> None:
    adapter._transaction = transaction
    if hasattr(adapter, "_started"):
        adapter._started = True


def _begin_of(adapter: Any) -> str:
    """Return the BEGIN with the options of SQLAlchemy's adapter, as asyncpg would write it."""
    level = adapter.isolation_level
    parts = ["BEGIN"] if level is None else [f"BEGIN ISOLATION LEVEL {level.replace('_', ' ')}"]
    parts += ["READ ONLY"] * bool(adapter.readonly) + ["DEFERRABLE"] * bool(adapter.deferrable)
    return " ".join(parts)


def _owner_of(transaction: Any, raw: Any) -> Any:
    """Return the connection that keeps asyncpg's state, inside of what may be a wrapper."""
    owner = getattr(transaction, "_connection", None)
    if owner is None and hasattr(type(raw), "_top_xact"):
        owner = raw
    if not hasattr(owner, "_top_xact"):
        raise _not_verifiable(raw)
    return owner


@contextmanager
def _cancelling_again(raw: Any) -> Iterator[None]:
    """Repeat asyncpg's request to cancel what runs on a connection, while the block closes it.

    PostgreSQL ignores a request that reaches it before the statement does, and asyncpg sends one
    and waits for the end of the statement. Each request has a connection of its own.
    https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-CANCELING-REQUESTS
    """
    request = getattr(raw, "_cancel", None)
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        loop = None  # nor does SQLAlchemy ask then
    if request is None or loop is None:
        yield
        return
    repeating = loop.create_task(_repeat(request))
    try:
        yield
    finally:
        repeating.cancel()


async def _repeat(request: Callable[[asyncio.Future[None]], Awaitable[None]]) -> None:
    pause = _FIRST_PAUSE
    while True:
        await asyncio.sleep(pause)
        with suppress(Exception):
            await request(asyncio.get_running_loop().create_future())
        pause *= 2


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
