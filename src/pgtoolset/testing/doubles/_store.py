"""The rows that are committed, and what one session has made of them so far."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

from sqlalchemy import Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only

from pgtoolset._postgres.sqlstates import IN_FAILED_SQL_TRANSACTION
from pgtoolset.testing.doubles._clock import Clock
from pgtoolset.testing.doubles._locking import Hold, Locks, Resource
from pgtoolset.testing.doubles._refusals import READ_ONLY, refusal

__all__ = ["Event", "Row", "RowId", "Store", "Work"]

#: A row by the keys of its columns.
Row: TypeAlias = dict[str, Any]

#: Where a row is: its table and a number that no other row of any table has.
RowId: TypeAlias = tuple[Table, int]


class Event(NamedTuple):
    """Something that a session has done.

    Attributes:
        session: the session's number; in locks it stands for the pid.
        what: `"BEGIN"`, `"INSERT item (1)"`, `"COMMIT"`, ...
    """

    session: int
    what: str


class Store:
    """What the sessions of one database share."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.locks: Locks = Locks(clock)
        self.log: list[Event] = []
        self.works: dict[int, Work] = {}
        self.failures: list[tuple[str, str]] = []
        self.committed: dict[Table, dict[int, Row]] = {}
        #: Called after a commit with the rows that it changed: before and after, `None` where there
        #: is none.
        self.listeners: list[Callable[[], None]] = []
        self._numbers = itertools.count(1)
        self._row_ids = itertools.count(1)
        self._serials: dict[tuple[Table, str], int] = {}

    def next_session(self) -> int:
        return next(self._numbers)

    def new_row(self, table: Table) -> RowId:
        return table, next(self._row_ids)

    def next_serial(self, table: Table, column: str) -> int:
        """Like a sequence, it is not rolled back."""
        number = self._serials[table, column] = self._serials.get((table, column), 0) + 1
        return number

    def apply(self, changes: Mapping[RowId, Row | None]) -> None:
        for (table, number), row in changes.items():
            rows = self.committed.setdefault(table, {})
            if row is None:
                rows.pop(number, None)
            else:
                rows[number] = row
        if changes:
            for listener in list(self.listeners):
                listener()

    def fail_if_asked(self, operation: str) -> None:
        for at, (asked, sqlstate) in enumerate(self.failures):
            if asked == operation:
                del self.failures[at]
                raise refusal(sqlstate, f"{operation} fails, as the test has asked for", operation)


class Level:
    """A transaction or savepoint that is open, and what there was when it began."""

    __slots__ = ("aborted", "changes", "ended", "key", "refused", "touched")

    def __init__(self, key: object, changes: Mapping[RowId, Row | None], aborted: bool) -> None:
        self.key = key
        self.changes = dict(changes)
        self.aborted = aborted
        self.ended = False
        self.refused = False
        # SQLAlchemy sends SAVEPOINT with the first statement of a level.
        self.touched = False


class Work:
    """One session's transaction: its levels, what it has changed, and whether an error has aborted
    it."""

    def __init__(self, store: Store, number: int) -> None:
        self.store: Store = store
        self.number: int = number
        self.levels: list[Level] = []
        self.changes: dict[RowId, Row | None] = {}
        self.aborted: bool = False
        self.read_only: bool = False
        self.began: float = 0.0

    @property
    def depth(self) -> int:
        """0 in the outermost transaction, 1 in a savepoint, and so on."""
        return max(0, len(self.levels) - 1)

    def log(self, what: str) -> None:
        self.store.log.append(Event(self.number, what))

    # Levels

    def begin(self, key: object) -> None:
        if not self.levels:
            self.store.works[self.number] = self
            self.began = self.store.clock.time()
        self.log("SAVEPOINT" if self.levels else "BEGIN")
        self.levels.append(Level(key, self.changes, self.aborted))

    def commit(self) -> None:
        """The innermost level has ended well."""
        level = self.levels[-1]
        level.ended = True
        if len(self.levels) > 1:
            self.log("RELEASE")
            for outer in self.levels[:-1]:
                outer.touched = outer.touched or level.touched
            self.store.locks.move_up(self.number, self.depth)
            return
        # PostgreSQL answers the COMMIT of an aborted transaction with ROLLBACK.
        self.log("ROLLBACK" if self.aborted else "COMMIT")
        changes = {} if self.aborted else self.changes
        self._clear()
        self.store.apply(changes)

    def roll_back(self) -> None:
        """The innermost level is undone, once."""
        level = self.levels[-1]
        if level.ended:
            return
        level.ended = True
        self.changes = level.changes
        # A RELEASE that was refused leaves the transaction as it is: aborted.
        self.aborted = level.aborted or level.refused
        if len(self.levels) > 1:
            self.log("ROLLBACK TO")
            self.store.locks.release_from(self.number, self.depth)
        else:
            self.log("ROLLBACK")
            self._clear()

    def end(self, key: object) -> None:
        """The level of `key`, which is the innermost, is over."""
        if self.levels and self.levels[-1].key is key:
            self.roll_back()
            self.levels.pop()

    def _clear(self) -> None:
        self.changes = {}
        self.aborted = self.read_only = False
        self.store.works.pop(self.number, None)
        self.store.locks.release_from(self.number, 0)

    # Statements

    def statement(self, what: str, *, writes: bool = False) -> None:
        """A statement is about to run: refused where the transaction is aborted."""
        if self.aborted:
            raise refusal(
                IN_FAILED_SQL_TRANSACTION,
                "current transaction is aborted, commands ignored until end of transaction block",
                what,
            )
        for level in self.levels:
            level.touched = True
        if writes and self.read_only:
            self.abort(refusal(READ_ONLY, f"cannot {what} in a read-only transaction", what))

    def abort(self, error: DBAPIError) -> NoReturn:
        """Abort the transaction, as an error of PostgreSQL does, and raise the error."""
        self.aborted = True
        raise error

    # Rows

    def rows(self, table: Table) -> Iterator[tuple[int, Row]]:
        """What this session sees of a table: what is committed, and its own changes."""
        committed = self.store.committed.get(table, {})
        for number, row in committed.items():
            mine = self.changes.get((table, number), row)
            if mine is not None:
                yield number, mine
        for (changed, number), changed_row in list(self.changes.items()):
            if changed is table and changed_row is not None and number not in committed:
                yield number, changed_row

    def row(self, at: RowId) -> Row | None:
        return (
            self.changes[at]
            if at in self.changes
            else self.store.committed.get(at[0], {}).get(at[1])
        )

    def find(self, table: Table, wanted: Mapping[str, Any]) -> list[RowId]:
        """The rows that have these values."""
        items = wanted.items()
        return [
            (table, number)
            for number, row in self.rows(table)
            if all(row.get(k) == v for k, v in items)
        ]

    # Locks

    def lock(self, resource: Resource, mode: str) -> Hold:
        """Take a lock, waiting as long as it takes. Runs in SQLAlchemy's greenlet where somebody is
        in the way."""
        for held in self.store.locks.on(resource):
            if held.owner == self.number and held.mode == mode:
                return held
        hold = self.store.locks.take(self.number, resource, mode, self.depth)
        if hold is None:
            try:
                found = await_only(
                    self.store.locks.wait(self.number, resource, mode, self.depth, None)
                )
            except DBAPIError as error:
                self.abort(error)
            assert isinstance(found, Hold)  # without a limit there is no other end
            hold = found
        return hold


def pick(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)
