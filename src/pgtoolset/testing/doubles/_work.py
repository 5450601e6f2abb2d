"""The memory that sessions share, and the open transaction of one session."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeAlias

from sqlalchemy import Table
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from pgtoolset._arguments import PrimaryKey
from pgtoolset._callbacks import Callback
from pgtoolset._outcomes import aborted_by
from pgtoolset._postgres.sqlstates import DEADLOCK_DETECTED, IN_FAILED_SQL_TRANSACTION
from pgtoolset.testing.doubles._clock import Clock
from pgtoolset.testing.doubles._locking import DeadlockError, Locks, Resource
from pgtoolset.testing.doubles._refusals import database_error

#: A row by the table of its primary key and its key, or an association by its table and values.
Place: TypeAlias = tuple[Table, PrimaryKey]


class Event(NamedTuple):
    """Something that a session did.

    Attributes:
        session: the session's number; in locks it stands for the pid.
        what: `"BEGIN"`, `"SELECT 1"`, `"COMMIT"`, ...
        statement: what `execute` was given; `None` for any other event.
        parameters: what `execute` was given with it.
    """

    session: int
    what: str
    statement: Any = None
    parameters: Any = None


@dataclass(slots=True)
class Failure:
    """A failure that a test asked for, and how often it is still due."""

    operation: str
    error: str | BaseException | type[BaseException]
    times: int

    def new_error(self) -> BaseException:
        if isinstance(self.error, str):
            message = f"the test asked for {self.error} at {self.operation}"
            return database_error(self.error, message, self.operation)
        return self.error() if isinstance(self.error, type) else self.error


class Store:
    """What the sessions of one database share."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.locks: Locks = Locks(clock)
        self.log: list[Event] = []
        self.failures: list[Failure] = []
        #: The committed values.
        self.values: dict[Place, Any] = {}
        #: Open transactions by the number of their session.
        self.open: dict[int, Work] = {}
        #: Called after each commit that changed something.
        self.listeners: list[Callable[[], object]] = []
        self.numbers: Iterator[int] = itertools.count(1)

    def next_failure(self, operation: str) -> BaseException | None:
        """Return the error of the failure that is due at this operation."""
        for failure in self.failures:
            if failure.operation == operation:
                failure.times -= 1
                if not failure.times:
                    self.failures.remove(failure)
                return failure.new_error()
        return None

    def apply(self, changes: dict[Place, Any]) -> None:
        """Store what a transaction changed; `None` removes."""
        self.values |= changes
        for place in [place for place, value in changes.items() if value is None]:
            del self.values[place]
        for listener in list(self.listeners) if changes else ():
            listener()


@dataclass(eq=False, slots=True)
class Level:
    """A transaction or a savepoint that is open.

    Attributes:
        changes: what its session had changed when it began.
        error: the error that had aborted the transaction when it began.
        is_sent: whether a statement ran in it. SQLAlchemy sends SAVEPOINT with the first one.
        callbacks: what runs after the commit.
    """

    changes: dict[Place, Any]
    error: BaseException | None
    is_sent: bool = False
    callbacks: list[Callback] = field(default_factory=list)


class Work:
    """The open transaction of one session: its levels, its changes, the error that aborted it."""

    def __init__(self, store: Store, number: int) -> None:
        self.store = store
        self.number = number
        self.levels: list[Level] = []
        #: The levels of the blocks of `begin_nested` that are open.
        self.blocks: list[Level] = []
        self.began: float = 0.0
        self._changes: dict[Place, Any] = {}
        self._error: BaseException | None = None
        self._has_failed_commit = False

    def log(self, what: str, statement: Any = None, parameters: Any = None) -> None:
        self.store.log.append(Event(self.number, what, statement, parameters))

    # Levels

    def begin(self) -> Level:
        """Begin the transaction, or a savepoint inside it."""
        self._check_block()
        what = "SAVEPOINT" if self.levels else "BEGIN"
        error = None if self.levels else self.store.next_failure("BEGIN")
        if error is not None:
            self.log("BEGIN FAILED")
            raise error
        self.log(what)
        if not self.levels:
            self.store.open[self.number] = self
            self.began = self.store.clock.time()
        self.levels.append(Level(dict(self._changes), self._error))
        return self.levels[-1]

    def release(self) -> None:
        """Release the innermost savepoint, or undo it where an error aborted it."""
        level = self.levels[-1]
        if self._error is not None and level.is_sent:
            error = aborted_by(self._error)
            self.undo()
            raise error
        self.store.locks.move_up(self.number, len(self.levels) - 1)
        self.levels.pop()
        self.levels[-1].callbacks += level.callbacks
        self.log("RELEASE")

    def undo(self) -> None:
        """Roll back the innermost savepoint."""
        level = self.levels.pop()
        self._changes, self._error = level.changes, level.error
        self.log("ROLLBACK TO")
        self.store.locks.release_from(self.number, len(self.levels))

    def commit(self) -> list[Callback]:
        """Commit all levels; return the callbacks that are to run now."""
        if not self.levels:
            self._check_block()
            return []
        if self._error is not None:
            raise aborted_by(self._error)
        while len(self.levels) > 1:
            self.release()
        error = self.store.next_failure("COMMIT")
        if error is not None:
            self.log("COMMIT FAILED")
            self._error, self._has_failed_commit = error, True
            raise error
        callbacks = self.levels[0].callbacks
        self.log("COMMIT")
        self.store.apply(self._changes)
        self._end()
        return callbacks

    def roll_back(self) -> None:
        """Roll back all levels."""
        if self.levels:
            self.log("ROLLBACK")
            self._end()

    def _end(self) -> None:
        self.levels.clear()
        self._changes = {}
        self._error = None
        self._has_failed_commit = False
        self.store.open.pop(self.number, None)
        self.store.locks.release_from(self.number, 0)

    def _check_block(self) -> None:
        if self.blocks and self.blocks[-1] not in self.levels:
            raise InvalidRequestError(
                "the savepoint of this block has ended with a commit() or rollback(); leave the "
                "block before anything else is sent"
            )

    # Statements

    def statement(self, what: str, statement: Any = None, parameters: Any = None) -> None:
        """Record a statement; raise where it fails or the transaction is aborted.

        Args:
            what: the statement in words, for the log.
            statement: what `execute` was given.
            parameters: what `execute` was given.
        """
        # A failure that was asked for is used up, even where the statement would fail anyway.
        error = self.store.next_failure("STATEMENT")
        self._check_block()
        if not self.levels:
            self.begin()
        if self._has_failed_commit:
            raise InvalidRequestError("the COMMIT of this session failed; roll it back first")
        if self._error is not None:
            raise database_error(
                IN_FAILED_SQL_TRANSACTION,
                "current transaction is aborted, commands ignored until end of transaction block",
                what,
            )
        for level in self.levels:
            level.is_sent = True
        self.log(what, statement, parameters)
        if error is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> NoReturn:
        """Raise the error of a statement. An error of the database aborts the transaction."""
        if isinstance(error, DBAPIError):
            self._error = error
        raise error

    async def lock(self, resource: Resource, mode: str, seconds: float | None = None) -> list[int]:
        """Take a lock in the innermost level; return the sessions that blocked it.

        Args:
            resource: what to lock.
            mode: the mode of the lock.
            seconds: how long to wait: 0 not at all, `None` without limit.
        """
        try:
            return await self.store.locks.acquire(
                self.number, resource, mode, len(self.levels) - 1, seconds
            )
        except DeadlockError:
            what = f"lock {resource[0]} in {mode} mode"
            self.fail(database_error(DEADLOCK_DETECTED, "deadlock detected", what))

    # Values

    def value(self, place: Place) -> Any:
        """Return the value that this session sees: its own change, or the committed one."""
        return self._changes.get(place, self.store.values.get(place))

    def places(self, table: Table) -> list[Place]:
        """Return the places of a table where this session sees a value."""
        places = dict.fromkeys((*self.store.values, *self._changes))
        return [place for place in places if place[0] is table and self.value(place) is not None]

    def change(self, place: Place, value: Any) -> None:
        """Set the value of a place; `None` removes it."""
        self._changes[place] = value
