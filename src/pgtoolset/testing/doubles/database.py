"""The database of the doubles: rows, locks and a log that its sessions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import FromClause, Table, inspect
from sqlalchemy.orm import Mapper

from pgtoolset.testing.doubles._clock import Clock, LoopClock
from pgtoolset.testing.doubles._loading import values_at
from pgtoolset.testing.doubles._store import Event, Store, Work
from pgtoolset.testing.doubles.session import MemorySession

__all__ = ["MemoryDatabase"]

#: What `fail_next` can make fail.
_OPERATIONS = ("COMMIT", "FLUSH", "M2M")


class MemoryDatabase:
    """Rows of mapped classes in memory, which its sessions share as those of a database do.

    Sessions see what others have committed, at READ COMMITTED, and wait for each other's locks.
    There is no schema to create. Nothing is random and nothing is read from a real clock but what
    `clock` does.

    Args:
        clock: what timeouts are measured by; without one the clock of the event loop. A
            `ManualClock` stands still until the test moves it.

    Example:
        >>> database = MemoryDatabase()
        >>> async with create_db_context(database.session)() as session:
        ...     session.add(Account(id=1, balance=100))
        >>> assert database.rows(Account) == [{"id": 1, "balance": 100}]
        >>> log = [event.what for event in database.log]
        >>> assert log == ["BEGIN", "INSERT account (1)", "COMMIT"]
    """

    def __init__(self, *, clock: Clock | None = None) -> None:
        self.store: Store = Store(LoopClock() if clock is None else clock)

    def session(self, *, expire_on_commit: bool = False, autoflush: bool = True) -> MemorySession:
        """A new session. The method itself is a `SessionFactory`.

        Args:
            expire_on_commit: as in SQLAlchemy's `Session`, which has `True` there.
            autoflush: as in SQLAlchemy's `Session`.
        """
        return MemorySession(self.store, expire_on_commit=expire_on_commit, autoflush=autoflush)

    @property
    def log(self) -> Sequence[Event]:
        """What all sessions have done, in order: statements, savepoints, commits, locks."""
        return tuple(self.store.log)

    def rows(self, what: type[Any] | FromClause) -> list[Mapping[str, Any]]:
        """The committed rows of a mapped class, by attribute name, or of a `Table`, by column; in
        key order.

        Args:
            what: a mapped class or a `Table`.

        Raises:
            TypeError: it is neither.
        """
        if isinstance(what, Table):
            rows = [dict(row) for row in self.store.committed.get(what, {}).values()]
            keys = [column.key for column in what.primary_key] or [
                column.key for column in what.columns
            ]
            return sorted(rows, key=lambda row: _order([row[key] for key in keys]))
        mapper: Any = inspect(what, raiseerr=False)
        if not isinstance(mapper, Mapper):
            raise TypeError(f"what must be a mapped class or a Table, not {what!r}")
        onlooker = Work(self.store, 0)
        table = mapper.base_mapper.local_table
        identities = [
            tuple(row[str(column.key)] for column in mapper.base_mapper.primary_key)
            for row in self.rows(table)
        ]
        found = [values_at(onlooker, mapper, identity) for identity in identities]
        return [values for _, values in filter(None, found)]

    def fail_next(self, operation: Literal["COMMIT", "FLUSH", "M2M"], sqlstate: str) -> None:
        """Have an operation fail as PostgreSQL might have it fail, once.

        Args:
            operation: `"COMMIT"`, `"FLUSH"` or `"M2M"`, of whichever session comes to it first.
            sqlstate: the code of the error, `"40001"` for a serialization failure. `23...` is an
                `IntegrityError`.

        Raises:
            ValueError: there is no such operation.
        """
        if operation not in _OPERATIONS:
            raise ValueError(
                f"operation must be one of {', '.join(_OPERATIONS)}, not {operation!r}"
            )
        self.store.failures.append((operation, sqlstate))


def _order(values: list[Any]) -> list[Any]:
    try:
        sorted([values, values])
    except TypeError:
        return [repr(value) for value in values]
    return [value if isinstance(value, int | float) else str(value) for value in values]
