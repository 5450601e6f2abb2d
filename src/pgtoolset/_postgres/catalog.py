"""PostgreSQL's own functions, operators and types, whatever schemas the search_path has.

A name without a schema is looked up in the search_path, and any role that may create objects in one
of its schemas can give the name another meaning (CVE-2018-1058). So the library's own statements
name `pg_catalog` with each function, operator, type and relation. Only what the grammar defines
needs no schema: types such as INTEGER, VARCHAR and INTERVAL, expressions such as COALESCE, GREATEST
and EXTRACT, and ORDER BY, GROUP BY, DISTINCT and UNION, which use the operators of the type. Not so
IN, IS DISTINCT FROM, BETWEEN, NULLIF, CASE x WHEN, LIKE and USING: they look operators up by name.

See https://www.postgresql.org/docs/current/typeconv-func.html and
https://www.postgresql.org/docs/current/sql-expressions.html#SQL-EXPRESSIONS-OPERATOR-CALLS
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Integer, cast, func, literal_column
from sqlalchemy.types import TypeEngine, UserDefinedType

__all__ = [
    "EQ",
    "GE",
    "GT",
    "IS_USERS",
    "MINUS",
    "NE",
    "Named",
    "as_text",
    "compare",
    "count",
    "named",
    "pg",
    "row_of",
    "unnested",
]

#: `pg.current_setting(...)` is `func.current_setting(...)` of PostgreSQL.
pg: Any = func.pg_catalog

#: The operators of our texts of SQL: `f"a.oid {EQ} b.oid"`.
EQ, NE, GE, GT, MINUS = (f"OPERATOR(pg_catalog.{symbol})" for symbol in ("=", "<>", ">=", ">", "-"))


#: SQL: whether the trigger `t` is the user's. Before PostgreSQL 15 the copy that a partition has of
#: its parent's trigger counts as internal, like the triggers of a constraint.
#: https://www.postgresql.org/docs/14/catalog-pg-trigger.html
IS_USERS = f"(NOT t.tgisinternal OR t.tgparentid {NE} 0 AND t.tgconstraint {EQ} 0)"


class Named(UserDefinedType[Any]):
    """A type of `pg_catalog` in the name of a cast."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return f"pg_catalog.{self.name}"


#: The types of `pg_catalog` that the grammar does not define, as SQLAlchemy renders its own. The
#: name of a user's type is in lower case or quoted.
_LOOKED_UP = frozenset(
    "BYTEA CIDR DATE DATERANGE DATEMULTIRANGE INET INT4MULTIRANGE INT4RANGE INT8MULTIRANGE "
    "INT8RANGE JSON JSONB JSONPATH MACADDR MACADDR8 MONEY NUMMULTIRANGE NUMRANGE OID REGCLASS "
    "REGCONFIG TEXT TSMULTIRANGE TSQUERY TSRANGE TSTZMULTIRANGE TSTZRANGE TSVECTOR UUID".split()
)


def named(type_: TypeEngine[Any], rendered: str) -> TypeEngine[Any]:
    """Return a type that renders with its schema, where `rendered` is looked up in the path."""
    return Named(rendered.lower()) if rendered in _LOOKED_UP else type_


def as_text(expression: Any) -> ColumnElement[Any]:
    """Return `CAST(expression AS pg_catalog.text)`."""
    return cast(expression, Named("text"))


def count() -> Any:
    """Return `pg_catalog.count(*)`."""
    return pg.count(literal_column("*"), type_=Integer)


def compare(left: Any, symbol: str, right: Any) -> ColumnElement[bool]:
    """Return a comparison of values of ours. A user's column compares as SQLAlchemy writes it."""
    operator = left.op(f"OPERATOR(pg_catalog.{symbol})", is_comparison=True)
    condition: ColumnElement[bool] = operator(right)
    return condition


def row_of(values: Sequence[Any]) -> Any:
    """Return `ROW(...)`, which is of the grammar and no function."""
    return func.row(*values)


def unnested(arrays: Sequence[Any]) -> Any:
    """Return `unnest` of one array, or of several side by side: a function in FROM.

    PostgreSQL makes several calls of its own function out of `unnest(a, b)`, but only where the
    name has no schema; no other function can take its place there.
    https://www.postgresql.org/docs/current/queries-table-expressions.html#QUERIES-TABLEFUNCTIONS
    """
    return pg.unnest(*arrays) if len(arrays) == 1 else func.unnest(*arrays)
