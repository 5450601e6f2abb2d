"""Settings inside of a transaction that has begun, and their earlier values.

A ROLLBACK TO puts them back, a RELEASE keeps them. https://www.postgresql.org/docs/current/sql-set.html
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection

from pgtoolset._postgres.quoting import literal
from pgtoolset._postgres.sending import send


def change_settings(connection: Connection, values: Mapping[str, str]) -> dict[str, str]:
    """Set settings until the transaction ends, and return their earlier values.

    A setting with a prefix that was never set has the empty string from then on: PostgreSQL has no
    way back to no value. Runs in SQLAlchemy's greenlet.
    """
    terms = ", ".join(
        f"pg_catalog.current_setting({literal(name)}, true), {_set(name, value)}"
        for name, value in values.items()
    )
    row = send(connection, f"SELECT {terms}").one()
    return {name: row[2 * number] or "" for number, name in enumerate(values)}


def put_settings_back(connection: Connection, before: Mapping[str, str]) -> None:
    """Set settings to their earlier values. Runs in SQLAlchemy's greenlet."""
    terms = ", ".join(_set(name, value) for name, value in before.items())
    send(connection, f"SELECT {terms}").close()


def _set(name: str, value: str) -> str:
    return f"pg_catalog.set_config({literal(name)}, {literal(value)}, true)"
