"""The plain values that the contracts speak of: modes that are given, and reports that are
returned.

They need neither a database nor an implementation, so a double of yours can make them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, Generic, Literal, NamedTuple, TypeVar

__all__ = ["Blocker", "LockMode", "LockWait", "M2MChange", "RowChange", "RowLockMode"]

M = TypeVar("M")

#: Characters of a query that a message shows.
_QUERY_LENGTH = 200


class LockMode(StrEnum):
    """The eight modes of a table lock, weakest first.

    See https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES
    """

    ACCESS_SHARE = "ACCESS SHARE"
    ROW_SHARE = "ROW SHARE"
    ROW_EXCLUSIVE = "ROW EXCLUSIVE"
    SHARE_UPDATE_EXCLUSIVE = "SHARE UPDATE EXCLUSIVE"
    SHARE = "SHARE"
    SHARE_ROW_EXCLUSIVE = "SHARE ROW EXCLUSIVE"
    EXCLUSIVE = "EXCLUSIVE"
    ACCESS_EXCLUSIVE = "ACCESS EXCLUSIVE"


class RowLockMode(StrEnum):
    """The four modes of a row lock, strongest first.

    See https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-ROWS
    """

    UPDATE = "UPDATE"
    NO_KEY_UPDATE = "NO KEY UPDATE"
    SHARE = "SHARE"
    KEY_SHARE = "KEY SHARE"


@dataclass(frozen=True, slots=True)
class Blocker:
    """A session that was in the way of a lock while it was waited for.

    Attributes:
        pid: the process id of its backend.
        application_name: what it calls itself; `None` where the role may not see it.
        state: `"active"`, `"idle in transaction"`, ...; `None` where the role may not see it.
        query: its current or latest statement; `None` where the role may not see it.
        transaction_age: how long its transaction has been open; `None` where there is none or the
            role may not see it.

    See https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-PG-STAT-ACTIVITY-VIEW
    """

    pid: int
    application_name: str | None
    state: str | None
    query: str | None
    transaction_age: timedelta | None

    def __str__(self) -> str:
        """The session in words, for a message."""
        if self.pid == 0:
            return "a prepared transaction (see pg_prepared_xacts)"
        name = f" ({self.application_name!r})" if self.application_name else ""
        if self.state is None and self.query is None:
            return (
                f"pid {self.pid}{name}, of which this role may not see more "
                "(GRANT pg_read_all_stats lets it), or which has ended"
            )
        age = self.transaction_age
        since = "" if age is None else f", {age.total_seconds():.1f} s in its transaction"
        query = " ".join((self.query or "").split())
        if len(query) > _QUERY_LENGTH:
            query = query[:_QUERY_LENGTH] + "..."
        return f"pid {self.pid}{name}, {self.state or 'no state'}{since}, query: {query}"


@dataclass(frozen=True, slots=True)
class LockWait:
    """A session that waits for a lock, and who it waits for.

    Attributes:
        pid: the process id of the backend that waits.
        blocked_by: the process ids that are in its way, in front of it in the queue included.
        relation: the table, schema-qualified; `None` where it waits for something else.
        mode: the mode that it asks for, as in `pg_locks`, without the suffix: `"ACCESS EXCLUSIVE"`.
        waiting_for: how long it has waited; `None` on a PostgreSQL that does not tell.
        application_name: what it calls itself; `None` where the role may not see it.
        query: the statement that waits; `None` where the role may not see it.
    """

    pid: int
    blocked_by: Sequence[int]
    relation: str | None
    mode: str | None
    waiting_for: timedelta | None
    application_name: str | None
    query: str | None


class M2MChange(NamedTuple):
    """How many associations `m2m_set` added and removed. One that is only rewritten counts as
    neither."""

    added: int
    removed: int


@dataclass(frozen=True, slots=True)
class RowChange(Generic[M]):
    """A row that changed between two looks at it.

    Attributes:
        model: the mapped class.
        pk: the primary key: a scalar, or a tuple in the mapper's order for a composite one.
        before: attribute names and values at the earlier look; `None` where there was no row.
        after: the same at the later look; `None` where there is no row any more.
        kind: `"insert"`, `"update"` or `"delete"`.
    """

    model: type[M]
    pk: Any
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None

    @property
    def kind(self) -> Literal["insert", "update", "delete"]:
        if self.before is None:
            return "insert"
        return "update" if self.after is not None else "delete"
