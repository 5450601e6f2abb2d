"""The values of the contracts: lock modes, and the reports that functions return.

They need neither a database nor an implementation, so a double of yours can make them too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from enum import StrEnum
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

from pgtoolset._text import may_hold_password, one_line, printable, without_passwords

__all__ = [
    "Blocker",
    "CodeLocation",
    "ConnectionHolder",
    "LockMode",
    "LockWait",
    "M2MChange",
    "RetryAttempt",
    "RowChange",
    "RowLockMode",
]

M_co = TypeVar("M_co", covariant=True)

#: The longest part of a query that a message shows, in characters.
_QUERY_LENGTH = 200


class _Mode(StrEnum):
    """A lock mode: `LockMode("exclusive")` takes a value or a name, in any case."""

    @classmethod
    def _missing_(cls, value: object) -> Self:
        # Enum's own error would show the value, which may be a URL that was given by mistake.
        given = f"a value of type {type(value).__name__}"
        if isinstance(value, str):
            wanted = value.upper().replace("_", " ")
            for mode in cls:
                if mode.value == wanted:
                    return mode
            given = "a URL" if may_hold_password(value) else repr(value)
        raise ValueError(f"{printable(given)} is not a valid {cls.__name__}")


class LockMode(_Mode):
    """The eight modes of a table lock, weakest first.

    `LockMode(text)` takes a value or a name in any case; another text is a `ValueError`.

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


class RowLockMode(_Mode):
    """The four modes of a row lock, strongest first.

    `RowLockMode(text)` takes a value or a name in any case; another text is a `ValueError`.

    See https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-ROWS
    """

    UPDATE = "UPDATE"
    NO_KEY_UPDATE = "NO KEY UPDATE"
    SHARE = "SHARE"
    KEY_SHARE = "KEY SHARE"


@dataclass(frozen=True, slots=True, repr=False)
class Blocker:
    """A session that held a lock, or a place in its queue, while another session waited for it.

    What the role may not see of another role's session is `None`.

    Attributes:
        pid: the process id of its backend; 0 for a prepared transaction.
        application_name: the name that the application gave itself.
        state: `"active"`, `"idle in transaction"`, ...
        query: its current statement, or its last one.
        transaction_age: how long its transaction has been open; `None` without a transaction too.

    See https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-PG-STAT-ACTIVITY-VIEW
    """

    pid: int
    application_name: str | None
    state: str | None
    query: str | None
    transaction_age: timedelta | None

    def __repr__(self) -> str:
        return _repr(self)

    def __str__(self) -> str:
        """Describe the session in one line, as messages do."""
        if self.pid == 0:
            return "a prepared transaction (see pg_prepared_xacts)"
        name = _in_parentheses(self.application_name)
        if self.state is None and self.query is None:
            return (
                f"pid {self.pid}{name}, which has ended, or of which this role may not see more "
                "(GRANT pg_read_all_stats allows it)"
            )
        age = self.transaction_age
        since = "" if age is None else f", {age.total_seconds():.1f} s in its transaction"
        state = printable(self.state or "no state")
        return f"pid {self.pid}{name}, {state}{since}, query: {_shown_query(self.query)}"


@dataclass(frozen=True, slots=True, repr=False)
class LockWait:
    """A session that waits for a lock, and the sessions that it waits for.

    What the role may not see of another role's session is `None`.

    Attributes:
        pid: the process id of the backend that waits.
        blocked_by: the process ids that hold the lock or stand before it in the queue.
        relation: the table, schema-qualified; `None` for a lock on something else.
        mode: the requested mode, as in `pg_locks` without the suffix: `"ACCESS EXCLUSIVE"`.
        waiting_for: how long it has waited; `None` where PostgreSQL does not report it.
        application_name: the name that the application gave itself.
        query: the statement that waits.

    See https://www.postgresql.org/docs/current/view-pg-locks.html
    """

    pid: int
    blocked_by: Sequence[int]
    relation: str | None
    mode: str | None
    waiting_for: timedelta | None
    application_name: str | None
    query: str | None

    def __repr__(self) -> str:
        return _repr(self)

    def __str__(self) -> str:
        """Describe the wait in one line."""
        since = "" if self.waiting_for is None else f" {self.waiting_for.total_seconds():.1f} s"
        relation = f" on {printable(self.relation)}" if self.relation else ""
        behind = ", ".join(map(str, self.blocked_by)) or "no session"
        return (
            f"pid {self.pid}{_in_parentheses(self.application_name)} waits{since} for "
            f"{printable(self.mode or 'a lock')}{relation} behind {behind}, "
            f"query: {_shown_query(self.query)}"
        )


class CodeLocation(NamedTuple):
    """A line of the application.

    Attributes:
        file: the path of the file, as Python knows it.
        line: the number of the line.
        function: the name of the function, as in a traceback.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """Describe the line as `app/orders.py:42 in place_order`."""
        return printable(f"{_shortest(self.file)}:{self.line} in {self.function}")


@dataclass(frozen=True, slots=True, repr=False)
class ConnectionHolder:
    """A connection that is out of its pool, and who took it.

    Attributes:
        task: the name of the task that took the connection; `None` outside of a task.
        seconds: how long it has been out.
        where: the line of the application that took it: the first statement of a transaction, most
            often. `None` where no frame of an application led to the pool.
        statement: the last statement on it, without its parameters, on one line and cut; `None`
            before the first one.

    See docs/connections.md.
    """

    task: str | None
    seconds: float
    where: CodeLocation | None
    statement: str | None

    def __repr__(self) -> str:
        return _repr(self)

    def __str__(self) -> str:
        """Describe the holder in one line, as messages do."""
        task = (
            "code outside of a task"
            if self.task is None
            else f"task {without_passwords(self.task)!r}"
        )
        where = "" if self.where is None else f", taken at {self.where}"
        last = "no statement yet" if self.statement is None else f"last statement: {self.statement}"
        return f"{printable(task)} for {self.seconds:.1f} s{where}, {last}"


class M2MChange(NamedTuple):
    """The number of associations that `m2m_set` added and removed.

    One that is only rewritten counts as neither.
    """

    added: int
    removed: int


@dataclass(frozen=True, slots=True)
class RetryAttempt:
    """An attempt of `run_transaction` that has failed, and that another one will follow.

    Attributes:
        number: the number of the attempt that has failed, from 1.
        error: its error.
        pause: the seconds until the next attempt begins.
    """

    number: int
    error: Exception
    pause: float


@dataclass(frozen=True, slots=True)
class RowChange(Generic[M_co]):
    """A row that changed between two looks at it.

    Attributes:
        model: the mapped class.
        pk: the primary key: a scalar, or a tuple in the mapper's order for a composite one.
        before: the earlier values by attribute name; `None` where the row did not exist.
        after: the later values by attribute name; `None` where the row does not exist any more.
    """

    model: type[M_co]
    pk: Any
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None

    @property
    def kind(self) -> Literal["insert", "update", "delete"]:
        """What happened to the row."""
        if self.before is None:
            return "insert"
        return "update" if self.after is not None else "delete"


def _shortest(file: str) -> str:
    """Return the path of a file below the folder that Python imports it from."""
    folders = [os.path.join(each, "") for each in sys.path if os.path.isabs(each)]
    return file[max((len(each) for each in folders if file.startswith(each)), default=0) :]


def _shown_query(query: str | None) -> str:
    return one_line(query or "", _QUERY_LENGTH)


def _in_parentheses(application_name: str | None) -> str:
    return f" ({without_passwords(application_name)!r})" if application_name else ""


def _repr(value: Any) -> str:
    """Return what a dataclass writes, without the passwords that a query may have."""
    parts = (f"{each.name}={getattr(value, each.name)!r}" for each in fields(value))
    return f"{type(value).__qualname__}({without_passwords(', '.join(parts))})"
