"""A row as the open transaction of the session has it.

A poll sees committed rows. Where the session has an open transaction, the row is read once more
through that: under READ COMMITTED a difference that the next poll does not see is the session's own
work, by whatever statement. Under REPEATABLE READ a difference may also be a change that the
snapshot is too old for, so only what the ORM has written counts. See
https://www.postgresql.org/docs/current/transaction-iso.html
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import Connection, Engine, Table, update
from sqlalchemy import inspect as inspect_instance
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from pgtoolset._cancellation import uninterrupted
from pgtoolset._compatibility import connections_of, written_by
from pgtoolset._native import row_comparator
from pgtoolset._postgres.locks import isolation_level_of
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset._record import record_of
from pgtoolset.errors import PgToolsetError
from pgtoolset.watch._polls import RowQuery, is_lost

__all__ = ["OwnRow"]

#: SQLSTATE of a statement in a transaction that has failed before.
_FAILED_TRANSACTION = "25P02"


class OwnRow:
    """A row as the open transaction of a session has it."""

    def __init__(self, session: Session, query: RowQuery) -> None:
        self._session = session
        self._query = query
        self._connection = self._open_connection()

    async def instead_of(self, found: Any, look_again: Callable[[], Awaitable[Any]]) -> Any:
        """Return the row with what the session has written, or `found` where it has written none.

        Args:
            found: the row as the last poll has found it, a detached instance.
            look_again: polls once more.

        Raises:
            RowDeletedError: the session's transaction has deleted the row.
        """
        key = inspect_instance(found).key
        written = written_by(self._session, key)
        if written == "deleted":
            raise self._query.condition.missing()
        connection = self._connection
        if connection is None:
            return found
        if written is None and isolation_level_of(connection) != "READ COMMITTED":
            return found
        # A cancellation in the middle of the statement would cost the caller its transaction.
        own, level = await uninterrupted(greenlet_spawn(self._read, connection, found))
        if written is None and (level != "read committed" or _is_same(own, found)):
            return found
        if own is None:
            raise self._query.condition.missing()
        if written is None and not await _is_still(found, look_again):
            return found  # another transaction has committed a change in between
        return own

    def _open_connection(self) -> Connection | None:
        """Return the connection that writes, or else reads, of the session's transaction use."""
        mapper = self._query.target.mapper
        table = mapper.local_table
        if not isinstance(self._query.bind, Engine) or not isinstance(table, Table):
            return None
        connections = connections_of(self._session.get_transaction())
        write = self._session.get_bind(mapper=mapper, clause=update(table))
        for bind in (write, self._query.bind):
            for connection in connections:
                if connection.engine is bind and connection.in_transaction():
                    return connection
        return None

    def _read(self, connection: Connection, found: Any) -> tuple[Any, str]:
        try:
            if record_of(self._session).levels:
                # The savepoint of a block with settings begins with the first statement in it.
                self._session.connection(bind_arguments={"bind": connection.engine})
            return self._query.row_and_level(connection)
        except Exception as error:
            if is_lost(error) or sqlstate_of(error) == _FAILED_TRANSACTION:
                return found, ""  # nothing of the transaction will be stored
            raise


async def _is_still(found: Any, look_again: Callable[[], Awaitable[Any]]) -> bool:
    """Return whether the committed row is the same as before, or cannot be read now."""
    try:
        return _is_same(await look_again(), found)
    except Exception as error:
        known = isinstance(error, SQLAlchemyError | PgToolsetError | OSError)
        if not known and not is_lost(error) and sqlstate_of(error) is None:
            raise
        return True  # the caller's own work counts more than a change


def _is_same(row: Any, found: Any) -> bool:
    """Return whether two detached instances have equal values; `row` may be anything else."""
    if not isinstance(row, type(found)):
        return False
    mapper = inspect_instance(found).mapper
    values, others = inspect_instance(found).dict, inspect_instance(row).dict
    return all(
        row_comparator.same_value(values[name], others[name])
        for name in mapper.column_attrs.keys()
        if name in values and name in others
    )
