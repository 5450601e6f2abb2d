"""Statements of ours that have no parameters, sent as they are."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, CursorResult

#: psycopg reads every `%` as the begin of a placeholder where it is given parameters, and
#: SQLAlchemy gives it an empty tuple. Without any, it also takes several statements in one message.
_AS_IT_IS = {"no_parameters": True}


def send(connection: Connection, statement: str) -> CursorResult[Any]:
    """Execute a text of SQL, in which every character stands for itself."""
    return connection.exec_driver_sql(statement, execution_options=_AS_IT_IS)
