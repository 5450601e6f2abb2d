"""A session that records its transactions and statements, and has no database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

from sqlalchemy import Executable
from sqlalchemy.exc import CompileError, InvalidRequestError

from pgtoolset._arguments import check_transactional, shown, tables_of
from pgtoolset._callbacks import Callback, run_callbacks
from pgtoolset._cancellation import uninterrupted
from pgtoolset.errors import TransactionStateError
from pgtoolset.testing.doubles import _rows as rows
from pgtoolset.testing.doubles._refusals import NoResult, Refusing, no_database
from pgtoolset.testing.doubles._work import Event, Store, Work
from pgtoolset.values import LockMode, RowLockMode

__all__ = ["MemorySession", "work_of"]


class MemorySession(Refusing):
    """A recording session: transactions, savepoints, callbacks, statements and asked failures.

    `MemoryDatabase.session` makes one. It satisfies `ManagedSession`, so that `get_transaction`,
    `create_db_context`, `create_db_dependency`, `run_transaction` and `on_commit` work with it as
    with an `AsyncSession`. It is not an `AsyncSession`: any other attribute is a
    `NoDatabaseError`.

    Attributes:
        number: of the session; in locks it stands for the pid.
    """

    refusal = (
        "a MemorySession is not an AsyncSession; it has begin, begin_nested, in_transaction, "
        "commit, rollback, close, execute, put, remove and rows"
    )

    def __init__(self, store: Store) -> None:
        self._work = Work(store, next(store.numbers))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None:
        await self.close()

    @property
    def number(self) -> int:
        return self._work.number

    @property
    def events(self) -> Sequence[Event]:
        """What this session did, in order, with the statements and parameters."""
        return [event for event in self._work.store.log if event.session == self.number]

    @property
    def log(self) -> list[str]:
        """What this session did, in words: `["BEGIN", "SELECT 1", "COMMIT"]`."""
        return [event.what for event in self.events]

    # Transactions

    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return bool(self._work.levels)

    def begin(self) -> Transaction:
        """A block that is a transaction; or, awaited, a transaction that `commit` ends."""
        return Transaction(self)

    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[Self]:
        """A block that is a savepoint. It begins a transaction where none is open."""
        work = self._work
        if not work.levels:
            work.begin()
        level = work.begin()
        work.blocks.append(level)
        try:
            yield self
        except BaseException:
            work.blocks.pop()
            if level in work.levels:
                work.undo()
            raise
        work.blocks.pop()
        if level in work.levels:  # no commit() or rollback() inside the block has ended it
            work.release()

    async def commit(self) -> None:
        """Commit, then run the callbacks.

        Raises:
            TransactionAbortedError: a swallowed error of the database has aborted the transaction.
        """
        callbacks = self._work.commit()
        if callbacks:
            await uninterrupted(run_callbacks(callbacks))

    async def rollback(self) -> None:
        """Roll back all levels."""
        self._work.roll_back()

    async def close(self) -> None:
        """Roll back the open transaction, if any."""
        self._work.roll_back()
        self._work.log("CLOSE")

    def run_after_commit(self, callback: Callback) -> None:
        """Run `callback` after the commit of the level that is open now, for `on_commit`."""
        if not self._work.levels:
            raise TransactionStateError("on_commit needs a session in a transaction")
        self._work.levels[-1].callbacks.append(callback)

    # Statements and rows

    async def execute(self, statement: Executable, parameters: Any = None) -> NoResult:
        """Record a statement. The returned object has no rows: each use of it is an error.

        Args:
            statement: such as `text("SELECT 1")` or `select(Order)`.
            parameters: recorded as they are.
        """
        if not isinstance(statement, Executable):
            raise TypeError(f"statement must be executable SQL, not {shown(statement)}")
        self._work.statement(_sql(statement), statement, parameters)
        return NoResult()

    async def put(
        self, model: type[Any], key: Any, values: Mapping[str, Any] | None = None
    ) -> None:
        """Insert or replace a row in this session's transaction, and lock it as an UPDATE does.

        Args:
            model: a mapped class.
            key: the primary key: a scalar, or a tuple in the mapper's order.
            values: by attribute name, without the key.
        """
        place = rows.place_of(model, "key", key)
        row = rows.new_row(model, place[1], {} if values is None else values)
        await self._write(f"PUT {model.__name__} {shown(key)}", model, place, row)

    async def remove(self, model: type[Any], key: Any) -> None:
        """Remove a row in this session's transaction, and lock it as a DELETE does."""
        place = rows.place_of(model, "key", key)
        await self._write(f"REMOVE {model.__name__} {shown(key)}", model, place, None)

    async def _write(self, what: str, model: type[Any], place: Any, row: Any) -> None:
        self._work.statement(what)
        for table in tables_of([model]):
            await self._work.lock(("table", table), LockMode.ROW_EXCLUSIVE)
        mode = RowLockMode.UPDATE if row is None else RowLockMode.NO_KEY_UPDATE
        await self._work.lock(("row", *place), mode)
        self._work.change(place, row)

    def rows(self, model: type[Any]) -> list[Mapping[str, Any]]:
        """Return the rows that this session sees: committed ones, and its own changes."""
        return rows.rows_of(self._work, model)


class Transaction(Refusing):
    """What `MemorySession.begin` returns."""

    refusal = "the transaction of a MemorySession is a block, or is ended by the session's methods"

    def __init__(self, session: MemorySession) -> None:
        self._session = session

    def __await__(self) -> Generator[Any, None, Self]:
        work = self._session._work
        if work.levels:
            raise InvalidRequestError("a transaction is already begun on this session")
        work.begin()
        yield from ()
        return self

    async def __aenter__(self) -> MemorySession:
        await self
        return self._session

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None:
        try:
            if exc_type is None:
                await self._session.commit()
        finally:
            self._session._work.roll_back()


def work_of(session: object) -> Work:
    """Return the transaction of a `MemorySession`; refuse any other session."""
    if isinstance(session, MemorySession):
        return session._work
    check_transactional(session)
    raise no_database(
        f"session is {shown(session)}, and the doubles work with sessions of a MemoryDatabase; "
        "pass PostgreSQL's sessions to the functions of pgtoolset"
    )


def _sql(statement: Executable) -> str:
    """The statement as SQL, without the values of its parameters."""
    try:
        return " ".join(str(statement).split())
    except CompileError:  # a construct that only one database knows
        return shown(statement)
