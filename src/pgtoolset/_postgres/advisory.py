"""The SQL of transaction-level advisory locks.

https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADVISORY-LOCKS
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import Connection, TextClause, text


def acquire(
    connection: Connection,
    numbers: tuple[int, ...],
    *,
    shared: bool,
    nowait: bool,
    milliseconds: int | None,
) -> bool:
    """Take the lock until the transaction ends, or its savepoint rolls back.

    Args:
        connection: in a transaction. It runs in SQLAlchemy's greenlet.
        numbers: the key: one bigint, or two int4.
        shared: whether others may share the lock.
        nowait: return `False` where the lock is taken, in place of waiting.
        milliseconds: how long to wait; `None` leaves that to the `lock_timeout` of the connection.
    """
    statement = _statement(len(numbers), shared, nowait, milliseconds is not None and not nowait)
    parameters: dict[str, Any] = dict(zip("ab", numbers, strict=False))
    if nowait:
        return bool(connection.scalar(statement, parameters))
    if milliseconds is not None:
        parameters["timeout"] = f"{milliseconds}ms"
    connection.execute(statement, parameters)
    return True


@cache
def _statement(width: int, shared: bool, nowait: bool, is_limited: bool) -> TextClause:
    """Return the statement, which SQLAlchemy parses once.

    Args:
        width: the number of integers in the key.
        shared: whether others may share the lock.
        nowait: whether it does not wait.
        is_limited: whether it has a `lock_timeout` of its own.
    """
    function = f"pg_{'try_' * nowait}advisory_xact_lock{'_shared' * shared}"
    arguments = "CAST(:a AS bigint)" if width == 1 else "CAST(:a AS int), CAST(:b AS int)"
    call = f"pg_catalog.{function}({arguments})"
    if not is_limited:
        return text(f"SELECT {call}")
    # PostgreSQL computes the columns from left to right, and waits with the setting as it is at
    # that moment. The outer query restores the value that the inner one has read; OFFSET 0 keeps
    # the planner from making one query of the two. After a failure the rollback to the savepoint,
    # or of the transaction, restores it.
    return text(
        "SELECT pg_catalog.set_config('lock_timeout', s.earlier, true) FROM ("
        "SELECT pg_catalog.current_setting('lock_timeout') AS earlier, "
        "pg_catalog.set_config('lock_timeout', :timeout, true) AS used, "
        f"{call} AS locked OFFSET 0) AS s"
    )
