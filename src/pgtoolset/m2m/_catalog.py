"""What the database has for an association table, and which statements are right for it.

The metadata cannot tell: a unique index or a trigger may be the database's alone, a reflected key
may be deferrable, a "table" may be a view. The answer is kept for each signature of the table,
which changes with everything that the answer depends on. `m2m_set` reads the signature with the
lock of the owner, so it notices DDL without a round trip.

See https://www.postgresql.org/docs/current/catalog-pg-index.html and
https://www.postgresql.org/docs/current/sql-insert.html#SQL-ON-CONFLICT
"""

from __future__ import annotations

import secrets
from enum import IntEnum
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import ColumnElement, Dialect, Select, String, Table, literal_column, select, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.visitors import InternalTraversal

from pgtoolset._postgres.catalog import IS_USERS
from pgtoolset._postgres.quoting import literal

#: Signatures of one table; more than this many are one for each tenant, or much DDL.
_MOST_SIGNATURES = 1000


class Storage(IntEnum):
    """How an association table stores rows, from what allows least to what allows most."""

    #: A view, a foreign table, a table with rules: no ON CONFLICT, no data-modifying WITH.
    INDIRECT = 0
    #: A table whose constraints ON CONFLICT cannot name: the pair is not unique, or deferrable.
    WITHOUT_ARBITER = 1
    #: A unique pair, and something else that may refuse a new row because of an old one.
    RESTRICTED = 2
    #: Only a unique pair.
    PLAIN = 3


class Knowledge:
    """The answers for one table of one engine.

    Attributes:
        latest: the last one.
    """

    __slots__ = ("_by_signature", "latest")

    def __init__(self) -> None:
        self._by_signature: dict[str, Storage] = {}
        self.latest: Storage | None = None

    def recall(self, signature: str) -> Storage | None:
        """Return the answer for this signature."""
        self.latest = self._by_signature.get(signature)
        return self.latest

    def learn(self, signature: str, storage: Storage) -> None:
        if len(self._by_signature) >= _MOST_SIGNATURES:
            self._by_signature.clear()
        self._by_signature[signature] = self.latest = storage


#: For each engine, of which all connections share the dialect, each table and each pair of keys
#: in it. No engine and no table is kept alive.
_known: WeakKeyDictionary[Dialect, WeakKeyDictionary[Table, dict[frozenset[str], Knowledge]]]
_known = WeakKeyDictionary()


def knowledge(dialect: Dialect, table: Table, pair: frozenset[str]) -> Knowledge:
    """Return the answers for a table, given the columns that identify an association."""
    tables = _known.get(dialect)
    if tables is None:
        tables = _known[dialect] = WeakKeyDictionary()
    return tables.setdefault(table, {}).setdefault(pair, Knowledge())


class _TableId(ColumnElement[Any]):
    """The `regclass` of a table, whose schema is translated as in any other place."""

    inherit_cache = True
    _traverse_internals = [("table", InternalTraversal.dp_clauseelement)]  # noqa: RUF012

    def __init__(self, table: Table) -> None:
        self.table = table


# A schema's name arrives after the statement was compiled, so it cannot be escaped inside quotes.
# It cannot end this literal either: no other role can know the tag.
_TAG = f"$t{secrets.token_hex(8)}$"


@compiles(_TableId)
def _compile_table_id(element: _TableId, compiler: Any, **_: Any) -> str:
    name = compiler.preparer.format_table(element.table)
    return f"CAST({_TAG}{name}{_TAG} AS pg_catalog.regclass)"


_EQ = "OPERATOR(pg_catalog.=)"
_USER_TRIGGERS = f"""
    pg_catalog.pg_trigger t WHERE t.tgrelid {_EQ} c.oid AND {IS_USERS}"""
_REFUSING_INDEXES = f"""
    pg_catalog.pg_index i WHERE i.indrelid {_EQ} c.oid AND (i.indisunique OR i.indisexclusion)"""
_SIGNATURE = f"""pg_catalog.concat_ws(' ',
    CAST(c.oid AS pg_catalog.int8), c.relkind, c.relhasrules, c.relhassubclass, c.relrowsecurity,
    c.relchecks, (SELECT pg_catalog.sum(CASE WHEN i.indisvalid
        THEN CAST(i.indexrelid AS pg_catalog.int8)
        ELSE OPERATOR(pg_catalog.-) CAST(i.indexrelid AS pg_catalog.int8) END)
        FROM {_REFUSING_INDEXES}),
    (SELECT pg_catalog.count(*) FROM {_USER_TRIGGERS}))"""


def signature(table: Table) -> Any:
    """Return an expression whose value changes with what `question` asks."""
    return _of_table(table, literal_column(_SIGNATURE, String)).scalar_subquery()


def question(table: Table, pair: list[str], generated: list[str]) -> Select[Any]:
    """SELECT the signature of a table, and its `Storage` as a number.

    Args:
        table: the association table.
        pair: the names of the columns that identify an association.
        generated: the names of columns that have another value in each row.
    """
    columns = f"""FROM pg_catalog.pg_attribute a WHERE a.attrelid {_EQ} i.indrelid
        AND a.attnum {_EQ} ANY ((CAST(i.indkey AS pg_catalog.int2[]))
            [0:i.indnkeyatts OPERATOR(pg_catalog.-) 1])"""
    in_pair = f"a.attname {_EQ} ANY ({_names(pair)})"
    is_generated = f"a.attname {_EQ} ANY ({_names(generated)})"
    covers_pair = f"""(SELECT pg_catalog.count(*) {columns} AND {in_pair}) {_EQ} {len(pair)}"""
    is_arbiter = f"""NOT i.indisexclusion AND i.indimmediate AND i.indisvalid
        AND i.indpred IS NULL AND i.indexprs IS NULL
        AND i.indnkeyatts {_EQ} {len(pair)} AND {covers_pair}"""
    # Two rows that agree in these columns are one pair, or cannot be.
    is_harmless = f"""NOT i.indisexclusion AND i.indexprs IS NULL
        AND NOT EXISTS (SELECT {columns} AND NOT {in_pair} AND NOT {is_generated})
        AND ({covers_pair} OR EXISTS (SELECT {columns} AND {is_generated}))"""
    # A check that calls a function may count rows; PostgreSQL's own functions are not listed.
    calls_functions = f"""EXISTS (SELECT FROM pg_catalog.pg_constraint k
        JOIN pg_catalog.pg_depend d ON d.objid {_EQ} k.oid
            AND d.classid {_EQ} CAST('pg_catalog.pg_constraint' AS pg_catalog.regclass)
            AND d.refclassid {_EQ} CAST('pg_catalog.pg_proc' AS pg_catalog.regclass)
        WHERE k.conrelid {_EQ} c.oid AND k.contype {_EQ} 'c')"""
    storage = f"""CASE
        WHEN c.relhasrules OR c.relkind {_EQ} ANY (CAST('{{v,m,f}}' AS pg_catalog."char"[]))
            THEN {Storage.INDIRECT:d}
        WHEN NOT EXISTS (SELECT FROM {_REFUSING_INDEXES} AND {is_arbiter})
            THEN {Storage.WITHOUT_ARBITER:d}
        WHEN c.relkind {_EQ} 'p' OR c.relhassubclass OR c.relrowsecurity OR {calls_functions}
            OR EXISTS (SELECT FROM {_USER_TRIGGERS})
            OR EXISTS (SELECT FROM {_REFUSING_INDEXES} AND NOT ({is_harmless}))
            THEN {Storage.RESTRICTED:d}
        ELSE {Storage.PLAIN:d} END"""
    return _of_table(table, literal_column(_SIGNATURE, String), literal_column(storage))


def has_update_triggers(table: Table) -> Any:
    """Return an expression: whether an UPDATE of the table runs triggers of the user."""
    is_update = "t.tgtype OPERATOR(pg_catalog.&) 16 OPERATOR(pg_catalog.<>) 0"
    return _of_table(
        table, literal_column(f"EXISTS (SELECT FROM {_USER_TRIGGERS} AND {is_update})")
    ).scalar_subquery()


def _of_table(table: Table, *expressions: Any) -> Select[Any]:
    """SELECT expressions in which `c` is the table's row in pg_class."""
    is_table: Any = literal_column("c.oid").op(_EQ, is_comparison=True)(_TableId(table))
    selected: Any = select(*expressions)
    statement: Select[Any] = selected.select_from(text("pg_catalog.pg_class c")).where(is_table)
    return statement


def _names(names: list[str]) -> str:
    return f"CAST(ARRAY[{', '.join(map(literal, names))}] AS pg_catalog.name[])"
