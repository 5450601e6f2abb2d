"""The memory that the sessions of a test share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pgtoolset._arguments import shown
from pgtoolset.testing.doubles import _rows as rows
from pgtoolset.testing.doubles._clock import Clock, LoopClock
from pgtoolset.testing.doubles._refusals import checked_failure
from pgtoolset.testing.doubles._relationships import pairs_of
from pgtoolset.testing.doubles._work import Event, Failure, Store, Work
from pgtoolset.testing.doubles.session import MemorySession

__all__ = ["MemoryDatabase"]

_OPERATIONS = ("BEGIN", "STATEMENT", "COMMIT")


class MemoryDatabase:
    """The memory that the sessions of a test share: a log, locks, rows, associations, failures.

    A session sees what others have committed, and its own changes. There is no schema, no
    constraint and no ORM: rows are keys and plain values that a test puts.

    Args:
        clock: what timeouts are measured by; without one the clock of the event loop. A
            `ManualClock` stands still until the test moves it.

    Example:
        >>> database = MemoryDatabase()
        >>> async with create_db_context(database.session)() as session:
        ...     async with get_transaction(session):
        ...         on_commit(session, lambda: events.publish("order placed"))
        >>> assert session.log == ["BEGIN", "SAVEPOINT", "RELEASE", "COMMIT", "CLOSE"]

    See https://docs.sqlalchemy.org/en/20/orm/session_transaction.html
    """

    def __init__(self, *, clock: Clock | None = None) -> None:
        self._store = Store(LoopClock() if clock is None else clock)

    def session(self) -> MemorySession:
        """Return a new session. The method itself is a `SessionFactory`."""
        return MemorySession(self._store)

    @property
    def log(self) -> Sequence[Event]:
        """What all sessions did, in order."""
        return tuple(self._store.log)

    def put(self, model: type[Any], key: Any, values: Mapping[str, Any] | None = None) -> None:
        """Insert or replace a row, committed at once and without regard to locks.

        Args:
            model: a mapped class.
            key: the primary key: a scalar, or a tuple in the mapper's order.
            values: by attribute name, without the key.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        place = rows.place_of(model, "key", key)
        row = rows.new_row(model, place[1], {} if values is None else values)
        self._store.apply({place: row})

    def remove(self, model: type[Any], key: Any) -> None:
        """Remove a row, committed at once and without regard to locks."""
        self._store.apply({rows.place_of(model, "key", key): None})

    def rows(self, model: type[Any]) -> list[Mapping[str, Any]]:
        """The committed rows of a mapped class, by attribute name, in the order of their keys."""
        return rows.rows_of(self._onlooker, model)

    def associations(self, rel_attr: Any) -> list[tuple[Any, Any]]:
        """The committed associations of a relationship: pairs of the owner's and related's keys.

        A composite key is a tuple.

        Args:
            rel_attr: the Many-to-Many relationship, `Post.tags`.
        """
        return pairs_of(self._onlooker, rel_attr)

    def fail_next(
        self,
        operation: Literal["BEGIN", "STATEMENT", "COMMIT"],
        error: str | BaseException | type[BaseException],
        *,
        times: int = 1,
    ) -> None:
        """Let the next operations of this kind fail, in any session.

        Args:
            operation: `"BEGIN"`, `"STATEMENT"` (of `execute` or of a double) or `"COMMIT"`.
            error: an exception, its class, or the SQLSTATE of an error of PostgreSQL: `"40001"` is
                a serialization failure.
            times: how many operations fail.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        if operation not in _OPERATIONS:
            known = ", ".join(_OPERATIONS)
            raise ValueError(f"operation must be one of {known}, not {shown(operation)}")
        if isinstance(times, bool) or not isinstance(times, int):
            raise TypeError(f"times must be an int, not {shown(times)}")
        if times < 1:
            raise ValueError(f"times must be at least 1, not {times}")
        self._store.failures.append(Failure(operation, checked_failure(error), times))

    @property
    def _onlooker(self) -> Work:
        """A transaction without changes, which sees the committed values."""
        return Work(self._store, 0)
