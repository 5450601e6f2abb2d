"""Statements of ours that have no parameters, sent as they are."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, CursorResult

#: psycopg reads every `%` as the begin of a placeholder where it is given parameters, and
#: SQLAlchemy gives it an empty tuple. Without any, it also takes several statements in one message.
_AS_IT_IS = {"no_parameters": True}


#: The option of a statement that changes a setting, or puts it back, within one call of ours.
PUTS_BACK = {"pgtoolset_puts_back": True}


def send(connection: Connection, statement: str, *, puts_back: bool = False) -> CursorResult[Any]:
    """Execute a text of SQL, in which every character stands for itself.

    Args:
        connection: to execute it on.
        statement: the text.
        puts_back: see `PUTS_BACK`.
    """
    options = {**_AS_IT_IS, **PUTS_BACK} if puts_back else _AS_IT_IS
    return connection.exec_driver_sql(statement, execution_options=options)
