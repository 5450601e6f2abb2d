"""A schema in which every name of pg_catalog has another meaning, as a stranger would plant it.

Each planted function, aggregate, operator and relation raises an error that names it; each planted
type refuses every value. With `evil, pg_catalog` as the search_path, any name of a statement that
has no schema finds one of them. With `evil, public`, where PostgreSQL looks into pg_catalog first,
it finds the ones whose types match better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import asyncpg
from sqlalchemy import Connection, text
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.postgresql.psycopg import PGDialectAsync_psycopg
from sqlalchemy.engine import Inspector

#: The search_paths of an attack.
BEFORE_CATALOG = "evil, pg_catalog, public"
AFTER_CATALOG = "evil, public"

_SETUP = """
CREATE SCHEMA evil;
SET check_function_bodies = off;
CREATE FUNCTION evil.planted(what text) RETURNS boolean STABLE LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION 'planted: %', what; END $$;
CREATE FUNCTION evil.try(command text) RETURNS void LANGUAGE plpgsql AS
  $$ BEGIN EXECUTE command; EXCEPTION WHEN OTHERS THEN NULL; END $$;
"""

#: What each function has: its types, and with `better` the ones that an argument matches better.
_FUNCTIONS = """
SELECT evil.try(CASE p.prokind WHEN 'a' THEN format(
  'CREATE FUNCTION evil.%1$I(text%2$s) RETURNS text LANGUAGE plpgsql AS '
  '$f$ BEGIN RAISE EXCEPTION ''planted: %%'', %3$L; END $f$; '
  'CREATE AGGREGATE evil.%4$I(%5$s) (SFUNC = evil.%1$I, STYPE = text)',
  'step of ' || p.oid || ' ' || md5(v.arguments), coalesce(', ' || nullif(v.arguments, ''), ''),
  p.proname || '(' || v.arguments || ')', p.proname, coalesce(nullif(v.arguments, ''), '*'))
WHEN 'w' THEN format(
  'CREATE FUNCTION evil.%I(%s) RETURNS %s WINDOW LANGUAGE internal AS ''trigger_in''',
  p.proname, v.arguments, format_type(p.prorettype, NULL))
WHEN 'f' THEN format(
  'CREATE FUNCTION evil.%I(%s) RETURNS %s%s LANGUAGE %s',
  p.proname, v.arguments, CASE WHEN p.proretset THEN 'SETOF ' ELSE '' END,
  format_type(p.prorettype, NULL),
  CASE WHEN v.arguments LIKE '%VARIADIC "any"%' THEN 'internal AS ''trigger_in''' ELSE
  format('plpgsql AS $f$ BEGIN RAISE EXCEPTION ''planted: %%'', %L; END $f$',
         p.proname || '(' || v.arguments || ')') END) END)
FROM pg_proc AS p
CROSS JOIN LATERAL (
  SELECT coalesce(string_agg(
      CASE WHEN p.provariadic <> 0 AND a.n = p.pronargs THEN 'VARIADIC ' ELSE '' END
      || format_type(a.type, NULL), ', ' ORDER BY a.n), '') AS arguments
  FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY AS a(type, n)
  UNION
  SELECT string_agg(CASE WHEN b.better IS NOT NULL AND (b.at = 0 OR b.at = a.n)
      AND format_type(a.type, NULL) = b.type THEN b.better ELSE format_type(a.type, NULL) END,
      ', ' ORDER BY a.n)
  FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY AS a(type, n)
  CROSS JOIN (SELECT * FROM (VALUES
    ('text', 'name'), ('text', 'character varying'), ('name', 'text'), ('regclass', 'oid'),
    ('anyarray', 'integer[]'), ('anyarray', 'text[]'), ('anyarray', 'oid[]'),
    ('anyarray', 'smallint[]'), ('anynonarray', 'text'), ('anynonarray', 'name'),
    ('anynonarray', 'oid'), ('anynonarray', 'boolean'), ('anynonarray', 'bigint'),
    ('anyelement', 'json'), ('"any"', 'text')) AS t(type, better),
    generate_series(0, 3) AS at) AS b
  WHERE p.pronargs BETWEEN 1 AND 3 AND p.provariadic = 0
    AND b.type = ANY (SELECT format_type(t, NULL) FROM unnest(p.proargtypes::oid[]) AS t)
  GROUP BY b.type, b.better, b.at
) AS v
WHERE p.pronamespace = 'pg_catalog'::regnamespace
"""

#: All but the ones of smallint, which are for the keys of the tables in the tests.
_OPERATORS = """
SELECT evil.try(format(
  'CREATE FUNCTION evil.%1$I(%2$s) RETURNS %3$s LANGUAGE plpgsql AS '
  '$f$ BEGIN RAISE EXCEPTION ''planted: %%'', %4$L; END $f$; '
  'CREATE OPERATOR evil.%5$s (FUNCTION = evil.%1$I, %6$s RIGHTARG = %7$s)',
  concat('operator ', o.oid, l, r), concat_ws(', ', l, r), format_type(o.oprresult, NULL),
  concat_ws(' ', l, o.oprname, r), o.oprname, 'LEFTARG = ' || l || ',', r))
FROM pg_operator AS o
CROSS JOIN LATERAL (
  SELECT l, r
  FROM unnest(CASE format_type(o.oprleft, NULL)
    WHEN 'text' THEN '{text,name}' WHEN 'anynonarray' THEN '{anynonarray,name,text}'
    ELSE ARRAY[nullif(format_type(o.oprleft, NULL), '-')] END::text[]) AS l,
  unnest(CASE format_type(o.oprright, NULL)
    WHEN 'text' THEN '{text,name}' WHEN 'anynonarray' THEN '{anynonarray,name,text}'
    ELSE ARRAY[format_type(o.oprright, NULL)] END::text[]) AS r
) AS v
WHERE o.oprnamespace = 'pg_catalog'::regnamespace
  AND (o.oprleft <> 'smallint'::regtype OR o.oprright <> 'smallint'::regtype)
"""

_RELATIONS = """
SELECT evil.try(format(
  'CREATE VIEW evil.%1$I AS SELECT * FROM pg_catalog.%1$I WHERE evil.planted(%1$L)', c.relname))
FROM pg_class AS c
WHERE c.relnamespace = 'pg_catalog'::regnamespace AND c.relkind IN ('r', 'v')
"""

_TYPES = """
SELECT evil.try(format('CREATE TYPE evil.%I AS (planted integer)', t.typname))
FROM pg_type AS t
WHERE t.typnamespace = 'pg_catalog'::regnamespace AND t.typtype <> 'c' AND t.typcategory <> 'A'
"""


async def plant(url: str, database: str) -> dict[str, int]:
    """Plant the schema `evil` into a database; return how many objects of each kind it has."""
    connection = await asyncpg.connect(
        url, database=database, server_settings={"search_path": "pg_catalog"}
    )
    try:
        await connection.execute(_SETUP)
        for statement in (_FUNCTIONS, _OPERATORS, _RELATIONS, _TYPES):
            await connection.fetch(statement)
        row = await connection.fetchrow(
            """SELECT (SELECT count(DISTINCT proname) FROM pg_proc WHERE pronamespace = n.oid)
                        AS functions,
                      (SELECT count(*) FROM pg_operator WHERE oprnamespace = n.oid) AS operators,
                      (SELECT count(*) FROM pg_class WHERE relnamespace = n.oid AND relkind = 'v')
                        AS relations,
                      (SELECT count(*) FROM pg_class WHERE relnamespace = n.oid AND relkind = 'c')
                        AS types
               FROM pg_namespace AS n WHERE nspname = 'evil'"""
        )
        return dict(row)
    finally:
        await connection.close()


@contextmanager
def spared_drivers() -> Iterator[None]:
    """Run what the drivers and SQLAlchemy send of their own accord with a safe search_path.

    They look up types and reflect tables with names that have no schema.
    """
    with (
        patch.object(asyncpg.Connection, "_introspect_types", _spared_types),
        patch.object(asyncpg.Connection, "_introspect_type", _spared_type),
        patch.object(PGDialectAsync_psycopg, "_type_info_fetch", _spared_type_info),
        patch.object(PGDialect, "_get_default_schema_name", lambda self, connection: "public"),
        patch.object(Inspector, "reflect_table", _spared(Inspector.reflect_table)),
        ExitStack() as stack,
    ):
        for name in _LOOKS:
            method = _spared(getattr(PGDialect, name))
            stack.enter_context(patch.object(PGDialect, name, method))
        yield


#: SQLAlchemy's ways to ask whether a table exists.
_LOOKS = [name for name in dir(PGDialect) if name.startswith("has_")]


_SAFE = "SELECT pg_catalog.set_config('search_path', 'pg_catalog, public', false)"
_NOW = "SELECT pg_catalog.current_setting('search_path')"
_BACK = text("SELECT pg_catalog.set_config('search_path', CAST(:before AS varchar), false)")

#: Not empty while a method of SQLAlchemy runs with the safe path.
_is_spared: list[bool] = []

_types, _type = asyncpg.Connection._introspect_types, asyncpg.Connection._introspect_type


async def _spared_types(self: Any, typeoids: Any, timeout: Any) -> Any:
    return await _with_safe_path(self, _types, typeoids, timeout)


async def _spared_type(self: Any, typename: Any, schema: Any) -> Any:
    return await _with_safe_path(self, _type, typename, schema)


async def _with_safe_path(connection: Any, method: Callable[..., Any], *arguments: Any) -> Any:
    if _is_spared:
        return await method(connection, *arguments)
    # Past the connection's methods, which refuse a second statement while it looks up the types.
    await connection._protocol.query("SET search_path = pg_catalog, public", None)
    try:
        return await method(connection, *arguments)
    finally:
        await connection._protocol.query("RESET search_path", None)


def _spared(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def spared(self: Any, first: Any, *arguments: Any, **keywords: Any) -> Any:
        connection: Connection = first if isinstance(first, Connection) else self.bind
        before = connection.exec_driver_sql(_NOW).scalar_one()
        connection.exec_driver_sql(_SAFE)
        _is_spared.append(True)
        try:
            return method(self, first, *arguments, **keywords)
        finally:
            _is_spared.pop()
            connection.execute(_BACK, {"before": before})

    return spared


#: psycopg looks for the type hstore at the first connection of an engine.
_spared_type_info = _spared(PGDialectAsync_psycopg._type_info_fetch)
