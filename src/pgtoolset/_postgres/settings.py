"""Settings inside of a transaction that has begun, and their earlier values.

A ROLLBACK TO puts them back, a RELEASE keeps them. https://www.postgresql.org/docs/current/sql-set.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, String, literal, select, true
from sqlalchemy.exc import StatementError

from pgtoolset._postgres.catalog import pg


def change_settings(connection: Connection, values: Mapping[str, str]) -> dict[str, str]:
    """Set settings until the transaction ends, and return their earlier values.

    A setting with a prefix that was never set has the empty string from then on: PostgreSQL has no
    way back to no value. Runs in SQLAlchemy's greenlet.
    """
    terms = [
        term
        for name, value in values.items()
        for term in (pg.current_setting(_text(name), true()), _set(name, value))
    ]
    row = _send(connection, terms)
    return {name: row[2 * number] or "" for number, name in enumerate(values)}


def put_settings_back(connection: Connection, before: Mapping[str, str]) -> None:
    """Set settings to their earlier values. Runs in SQLAlchemy's greenlet."""
    _send(connection, [_set(name, value) for name, value in before.items()])


def _send(connection: Connection, terms: list[Any]) -> Any:
    try:
        return connection.execute(select(*terms)).one()
    except StatementError as error:
        error.hide_parameters = True  # a value may be a secret
        raise


def _set(name: str, value: str) -> Any:
    return pg.set_config(_text(name), _text(value), true())


def _text(value: str) -> Any:
    return literal(value, String)
