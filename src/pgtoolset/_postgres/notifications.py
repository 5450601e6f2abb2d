"""NOTIFY: the channel of a table, the triggers that announce changes of its rows, their payloads.

A payload is a JSON array of keys, each an array of its parts: `[[1], [2]]`. An empty payload means
that any row may have changed: the keys did not fit, or are of a type that JSON and the driver spell
differently. See https://www.postgresql.org/docs/current/sql-notify.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from hashlib import blake2b, sha256
from typing import Any
from uuid import UUID

from sqlalchemy import Column, Date, Integer, String, Table, Uuid
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement

from pgtoolset._postgres.arrays import DIALECT, stored_type
from pgtoolset._postgres.catalog import EQ, GT, NE
from pgtoolset._postgres.quoting import do_block, dollar_quoted, literal
from pgtoolset._postgres.untrusted import json_in

__all__ = [
    "SCHEMA_OF_TABLE",
    "AnnounceFunction",
    "AnnounceTrigger",
    "channel_in",
    "channel_of",
    "is_own_body",
    "is_own_function",
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
SCHEMA_OF_TABLE = f"""
SELECT n.nspname FROM pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
WHERE c.oid {EQ} pg_catalog.to_regclass($1::pg_catalog.text)
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

    `None` means that any row may have changed: the payload is empty, or another program's. Any role
    can send one, so a payload can do no more than have rows polled.
    """
    rows = json_in(payload, longest=LONGEST_PAYLOAD)
    if not isinstance(rows, list) or not all(map(_is_key, rows)):
        return None
    return [tuple(row) for row in rows]


def _is_key(row: object) -> bool:
    return isinstance(row, list) and all(type(part) in (int, str) for part in row)


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
    function = _qualified(element.table, channel_of(element.table), compiler)
    body = dollar_quoted(_body(element))
    oid = f"pg_catalog.to_regprocedure({literal(f'{function}()')})"
    # Two migrations at a time both create the function, or both replace it: PostgreSQL refuses the
    # second one once the first has committed, and it succeeds when it is tried again.
    block = f"""
DECLARE
    owner pg_catalog.name;
BEGIN
    {_check_owner(function, oid)}
    FOR attempt IN 1..{_ATTEMPTS} LOOP
        BEGIN
            CREATE OR REPLACE FUNCTION {function}() RETURNS pg_catalog.trigger
            LANGUAGE plpgsql AS {body};
            EXIT;
        EXCEPTION WHEN unique_violation OR internal_error THEN
            IF attempt {EQ} {_ATTEMPTS} THEN
                RAISE;
            END IF;
        END;
    END LOOP;
    -- Again, because OR REPLACE keeps the owner of a function that has appeared meanwhile.
    {_check_owner(function, oid)}
END """
    return _statement(block, compiler)


@compiles(AnnounceTrigger, "postgresql")
def _create_trigger(element: AnnounceTrigger, compiler: Any, **_: Any) -> str:
    function = _qualified(element.table, channel_of(element.table), compiler)
    table = _qualified(element.table, element.table.name, compiler)
    name = f"pgtoolset_{element.event.lower()}"
    executed = (
        "(SELECT t.tgfoid FROM pg_catalog.pg_trigger AS t"
        f" WHERE t.tgrelid {EQ} CAST({literal(table)} AS pg_catalog.regclass)"
        f" AND t.tgname {EQ} '{name}')"
    )
    block = f"""
DECLARE
    owner pg_catalog.name;
BEGIN
    CREATE OR REPLACE TRIGGER {name}
    AFTER {element.event} ON {table} {EVENTS[element.event]}FOR EACH STATEMENT
    EXECUTE FUNCTION {function}();
    {_check_owner(function, executed)}
END """
    return _statement(block, compiler)


#: How often the function is created while other migrations create it too.
_ATTEMPTS = 10


def _check_owner(function: str, oid: str) -> str:
    """Return PL/pgSQL that raises an error where another role owns the function with this oid.

    The owner of a function may replace its body at any time, and the trigger runs it with the
    rights of each writer. That a superuser is a member of each role does not make it the owner.
    """
    return f"""
    owner := (SELECT pg_catalog.pg_get_userbyid(p.proowner) FROM pg_catalog.pg_proc AS p
              WHERE p.oid {EQ} CAST({oid} AS pg_catalog.oid));
    IF owner {NE} current_user THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
        MESSAGE = pg_catalog.regexp_replace(pg_catalog.format(
            'the function %s() belongs to the role %I, which may replace its body, so %I does '
            'not use it: run this DDL as that role (SET ROLE), or drop the function first '
            '(DROP FUNCTION %s() CASCADE)',
            {literal(function)}, owner, current_user, {literal(function)}
        ), '[[:cntrl:]]', '?', 'g');
    END IF;"""


def _body(element: AnnounceFunction) -> str:
    is_named = bool(element.keys) and all(map(_is_spelled_alike, element.keys))
    quote = DIALECT.identifier_preparer.quote
    columns = [quote(column.name) for column in element.keys] if is_named else []
    return _body_for(channel_of(element.table), ", ".join(columns))


def is_own_function(name: str) -> bool:
    """Return whether a function has a name as `channel_of` makes them."""
    return _OWN_NAME.fullmatch(name) is not None


def is_own_body(name: str, body: str) -> bool:
    """Return whether the function of a table has the body that this version creates.

    The columns are the ones that the body names: an identifier is no code.

    Args:
        name: what `channel_of` has returned.
        body: what PostgreSQL has stored.
    """
    found = _NAMED_COLUMNS.search(body)
    columns = found[1] if found else ""
    quote = DIALECT.identifier_preparer.quote
    bare = [each for each in _IDENTIFIER.findall(columns) if not each.startswith('"')]
    return all(quote(each) == each for each in bare) and body == _body_for(name, columns)


_OWN_NAME = re.compile(rf"{_PREFIX}[0-9a-f]{{32}}")
_IDENTIFIER = re.compile(r'"(?:[^"]|"")+"|[\w$]+')
_NAMED_COLUMNS = re.compile(
    rf"json_build_array\(((?:{_IDENTIFIER.pattern})(?:, (?:{_IDENTIFIER.pattern}))*)\)"
)


def _body_for(name: str, columns: str) -> str:
    """Return the body of the function with this name; its payloads name the quoted columns."""
    # `channel_in`, for the schema in which the function is executed.
    channel = (
        f"pg_catalog.concat('{_PREFIX}', pg_catalog.left(pg_catalog.encode(pg_catalog.sha256("
        f"pg_catalog.convert_to(pg_catalog.concat('{name}', TG_TABLE_SCHEMA), "
        "'UTF8')), 'hex'), 32))"
    )
    if columns:

        def named(rows: str) -> str:
            return (
                "SELECT CAST(pg_catalog.json_agg(pg_catalog.json_build_array("
                f"{columns})) AS pg_catalog.text) "
                f"INTO keys FROM (SELECT {columns} FROM {rows} LIMIT {_MOST_KEYS}) AS changed;"
            )

        both = (
            f"(SELECT {columns} FROM pgtoolset_old UNION SELECT {columns} FROM pgtoolset_new) "
            "AS rows"
        )
        body = f"""
    IF TG_OP {EQ} 'INSERT' THEN
        {named("pgtoolset_new")}
    ELSIF TG_OP {EQ} 'UPDATE' THEN
        {named(both)}
    ELSIF TG_OP {EQ} 'DELETE' THEN
        {named("pgtoolset_old")}
    ELSE
        keys := '';
    END IF;
    IF pg_catalog.octet_length(keys) {GT} {LONGEST_PAYLOAD} THEN
        keys := '';
    END IF;"""
    else:
        body = "\n    keys := '';"
    # The columns may have the names of the variables.
    return f"""
#variable_conflict use_column
DECLARE
    keys pg_catalog.text;
BEGIN{body}
    IF keys IS NOT NULL THEN
        PERFORM pg_catalog.pg_notify({channel}, keys);
    END IF;
    RETURN NULL;
END
"""


def _qualified(table: Table, name: str, compiler: Any) -> str:
    """Return the quoted name of an object in the schema of a table.

    The schema is translated here and not by SQLAlchemy, which replaces it in the finished text:
    there the name also stands in literals, and between tags that must not occur in it.
    """
    translation = compiler.schema_translate_map or {}
    schema = translation.get(table.schema, table.schema)
    preparer = DIALECT.identifier_preparer
    return (
        f"{preparer.quote_schema(schema)}.{preparer.quote(name)}"
        if schema
        else preparer.quote(name)
    )


def _statement(block: str, compiler: Any) -> str:
    """Return a DO statement as the driver takes it: some drivers read percent signs."""
    statement: str = compiler.sql_compiler.post_process_text(do_block(block))
    return statement
