"""The triggers and functions of `row_change_trigger`, as the catalog has them.

https://www.postgresql.org/docs/current/catalog-pg-trigger.html
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._postgres.catalog import EQ
from pgtoolset._postgres.notifications import EVENTS

__all__ = ["Trigger", "TriggerFunction", "trigger_functions", "triggers"]


@dataclass(frozen=True, slots=True)
class TriggerFunction:
    """A function with a name of `row_change_trigger`.

    Attributes:
        schema: its schema.
        name: its name.
        call: both, quoted, with parentheses.
        owner: its owner.
        body: its source.
        is_plain: whether it is in PL/pgSQL, runs with the rights of its caller, and sets nothing.
        calls: how many triggers execute it.
    """

    schema: str
    name: str
    call: str
    owner: str
    body: str
    is_plain: bool
    calls: int


_FUNCTIONS = text(f"""
SELECT CAST(n.nspname AS varchar), CAST(p.proname AS varchar),
       pg_catalog.format('%I.%I()', n.nspname, p.proname),
       CAST(pg_catalog.pg_get_userbyid(p.proowner) AS varchar), p.prosrc,
       (l.lanname {EQ} 'plpgsql' AND NOT p.prosecdef AND p.proconfig IS NULL),
       (SELECT pg_catalog.count(*) FROM pg_catalog.pg_trigger AS t WHERE t.tgfoid {EQ} p.oid)
FROM pg_catalog.pg_proc AS p
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} p.pronamespace
JOIN pg_catalog.pg_language AS l ON l.oid {EQ} p.prolang
WHERE p.proname OPERATOR(pg_catalog.~) '^pgtoolset_[0-9a-f]{{32}}$' AND p.pronargs {EQ} 0
ORDER BY n.nspname, p.proname
""")


async def trigger_functions(connection: AsyncConnection) -> list[TriggerFunction]:
    """Return the functions with names of `row_change_trigger`, by any maker."""
    return [TriggerFunction(*row) for row in await connection.execute(_FUNCTIONS)]


@dataclass(frozen=True, slots=True)
class Trigger:
    """A trigger with a name of `row_change_trigger`.

    Attributes:
        table_oid: of its table.
        table: the name of its table, quoted and with its schema.
        table_owner: the owner of the table.
        name: its name.
        is_plain: whether it runs after each statement of its event, without a condition.
        is_enabled: whether it runs in a session with the usual `session_replication_role`.
        function: the name of the function that it executes.
        call: the same, quoted and with its schema.
        function_owner: the owner of the function.
        is_trusted: whether that owner may do all that the owner of the table may.
    """

    table_oid: int
    table: str
    table_owner: str
    name: str
    is_plain: bool
    is_enabled: bool
    function: str
    call: str
    function_owner: str
    is_trusted: bool


#: Of a trigger AFTER the event, FOR EACH STATEMENT: its `tgtype`, and its transition tables.
_TYPES = {"INSERT": 4, "DELETE": 8, "UPDATE": 16, "TRUNCATE": 32}
_TABLES = {
    "INSERT": ("", "pgtoolset_new"),
    "UPDATE": ("pgtoolset_old", "pgtoolset_new"),
    "DELETE": ("pgtoolset_old", ""),
    "TRUNCATE": ("", ""),
}
_NAMES = ", ".join(f"'pgtoolset_{event.lower()}'" for event in EVENTS)
_IS_PLAIN = " OR ".join(
    f"(t.tgname {EQ} 'pgtoolset_{event.lower()}' AND t.tgtype {EQ} {_TYPES[event]}"
    f" AND coalesce(t.tgoldtable, '') {EQ} '{old}' AND coalesce(t.tgnewtable, '') {EQ} '{new}')"
    for event, (old, new) in _TABLES.items()
)

_TRIGGERS = text(f"""
SELECT CAST(c.oid AS pg_catalog.int8), pg_catalog.format('%I.%I', n.nspname, c.relname),
       CAST(pg_catalog.pg_get_userbyid(c.relowner) AS varchar), CAST(t.tgname AS varchar),
       (({_IS_PLAIN}) AND t.tgqual IS NULL AND t.tgnargs {EQ} 0
         AND CAST(t.tgattr AS pg_catalog.text) {EQ} ''),
       (t.tgenabled {EQ} 'O' OR t.tgenabled {EQ} 'A'),
       CAST(p.proname AS varchar), pg_catalog.format('%I.%I()', pn.nspname, p.proname),
       CAST(pg_catalog.pg_get_userbyid(p.proowner) AS varchar),
       pg_catalog.pg_has_role(p.proowner, c.relowner, 'MEMBER')
FROM pg_catalog.pg_trigger AS t
JOIN pg_catalog.pg_class AS c ON c.oid {EQ} t.tgrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
JOIN pg_catalog.pg_proc AS p ON p.oid {EQ} t.tgfoid
JOIN pg_catalog.pg_namespace AS pn ON pn.oid {EQ} p.pronamespace
WHERE t.tgname {EQ} ANY(ARRAY[{_NAMES}]) AND NOT t.tgisinternal
ORDER BY n.nspname, c.relname, t.tgname
""")


async def triggers(connection: AsyncConnection) -> list[Trigger]:
    """Return the triggers with names of `row_change_trigger`, by any maker."""
    return [Trigger(*row) for row in await connection.execute(_TRIGGERS)]
