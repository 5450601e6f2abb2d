"""NOTIFY: the channel of a table, the triggers that announce changes of its rows, their payloads.

A payload is a JSON array of keys, each an array of its parts: `[[1], [2]]`. An empty payload means
that any row may have changed: the keys did not fit, or are of a type that JSON and the driver spell
differently. See https://www.postgresql.org/docs/current/sql-notify.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from hashlib import blake2b, sha256
from typing import Any
from uuid import UUID

from sqlalchemy import Column, Date, Integer, String, Table, Uuid
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement

from pgtoolset._postgres.arrays import DIALECT, stored_type

__all__ = [
    "SCHEMA_OF_TABLE",
    "AnnounceFunction",
    "AnnounceTrigger",
    "channel_in",
    "channel_of",
    "keys_in",
    "payload_key",
]

_PREFIX = "pgtoolset_"

#: The longest payload that PostgreSQL accepts, in bytes.
LONGEST_PAYLOAD = 7999

#: Keys that are read to fill a payload. The shortest take 5 bytes ("[1], "), so more never fit.
_MOST_KEYS = LONGEST_PAYLOAD // 5 + 1

_INFINITE_DATES = {date.min: "-infinity", date.max: "infinity"}

#: The triggers of a table, one for each event: PostgreSQL allows transition tables only to triggers
#: of one event.
EVENTS: Mapping[str, str] = {
    "INSERT": "REFERENCING NEW TABLE AS pgtoolset_new ",
    "UPDATE": "REFERENCING OLD TABLE AS pgtoolset_old NEW TABLE AS pgtoolset_new ",
    "DELETE": "REFERENCING OLD TABLE AS pgtoolset_old ",
    "TRUNCATE": "",
}


#: The schema of the table with a qualified name.
SCHEMA_OF_TABLE = """
SELECT n.nspname FROM pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
WHERE c.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass($1::pg_catalog.text)
"""


def channel_in(table: Table, schema: str) -> str:
    """Return the channel of a table in the schema that it is in on the server.

    Tenants have the same table in schemas of their own, and must not hear each other.
    """
    return _PREFIX + sha256((channel_of(table) + schema).encode()).hexdigest()[:32]


def channel_of(table: Table) -> str:
    """Return the name of a table's function, from which the channels of the table are made.

    It is a hash, because PostgreSQL cuts names to 63 bytes.
    """
    name = json.dumps([table.schema, table.name])
    return _PREFIX + blake2b(name.encode(), digest_size=16).hexdigest()


def keys_in(payload: str) -> list[tuple[Any, ...]] | None:
    """Return the keys that a payload names, as `payload_key` spells them.

    `None` means that any row may have changed: the payload is empty, or another program's.
    """
    try:
        keys = [tuple(key) for key in json.loads(payload)]
        hash(tuple(keys))
    except (ValueError, TypeError, RecursionError):
        return None
    return keys


def payload_key(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a key as payloads spell it, from the driver's values."""
    return tuple(part if isinstance(part, (int, str)) else _as_json(part) for part in key)


def _as_json(part: Any) -> Any:
    if isinstance(part, date) and not isinstance(part, datetime):
        # asyncpg sends the first and the last date as infinities.
        return _INFINITE_DATES.get(part) or part.isoformat()
    return str(part) if isinstance(part, UUID) else part


def _is_spelled_alike(column: Column[Any]) -> bool:
    """Return whether payloads can name the column's values: JSON and the driver agree on them."""
    return isinstance(stored_type(column.type, DIALECT), (Integer, String, Uuid, Date))


class AnnounceFunction(ExecutableDDLElement):
    """CREATE FUNCTION for the triggers of a table."""

    def __init__(self, table: Table, keys: Sequence[Column[Any]]) -> None:
        self.table = table
        self.keys = tuple(keys)


class AnnounceTrigger(ExecutableDDLElement):
    """CREATE TRIGGER for one event of a table."""

    def __init__(self, table: Table, event: str) -> None:
        self.table = table
        self.event = event


@compiles(AnnounceFunction, "postgresql")
def _create_function(element: AnnounceFunction, compiler: Any, **_: Any) -> str:
    quote = compiler.preparer.quote
    columns = ", ".join(quote(column.name) for column in element.keys)
    # `channel_in`, for the schema in which the function is executed.
    channel = (
        f"pg_catalog.concat('{_PREFIX}', pg_catalog.left(pg_catalog.encode(pg_catalog.sha256("
        f"pg_catalog.convert_to(pg_catalog.concat('{channel_of(element.table)}', TG_TABLE_SCHEMA), "
        "'UTF8')), 'hex'), 32))"
    )
    if element.keys and all(map(_is_spelled_alike, element.keys)):

        def named(rows: str) -> str:
            return (
                f"SELECT pg_catalog.json_agg(pg_catalog.json_build_array({columns}))::text "
                f"INTO keys FROM (SELECT {columns} FROM {rows} LIMIT {_MOST_KEYS}) AS changed;"
            )

        both = (
            f"(SELECT {columns} FROM pgtoolset_old UNION SELECT {columns} FROM pgtoolset_new) "
            "AS rows"
        )
        body = f"""
    IF TG_OP = 'INSERT' THEN
        {named("pgtoolset_new")}
    ELSIF TG_OP = 'UPDATE' THEN
        {named(both)}
    ELSIF TG_OP = 'DELETE' THEN
        {named("pgtoolset_old")}
    ELSE
        keys := '';
    END IF;
    IF pg_catalog.octet_length(keys) > {LONGEST_PAYLOAD} THEN
        keys := '';
    END IF;"""
    else:
        body = "\n    keys := '';"
    name = _function_name(element.table, compiler)
    return f"""CREATE OR REPLACE FUNCTION {name}() RETURNS trigger
LANGUAGE plpgsql AS $pgtoolset$
DECLARE
    keys text;
BEGIN{body}
    IF keys IS NOT NULL THEN
        PERFORM pg_catalog.pg_notify({channel}, keys);
    END IF;
    RETURN NULL;
END
$pgtoolset$"""


@compiles(AnnounceTrigger, "postgresql")
def _create_trigger(element: AnnounceTrigger, compiler: Any, **_: Any) -> str:
    table = compiler.preparer.format_table(element.table)
    return (
        f"CREATE OR REPLACE TRIGGER pgtoolset_{element.event.lower()} "
        f"AFTER {element.event} ON {table} {EVENTS[element.event]}FOR EACH STATEMENT "
        f"EXECUTE FUNCTION {_function_name(element.table, compiler)}()"
    )


def _function_name(table: Table, compiler: Any) -> str:
    """Return the name of a table's function: in its schema, that of the channel."""
    beside = Table(channel_of(table), table.metadata.__class__(), schema=table.schema)
    return str(compiler.preparer.format_table(beside))
