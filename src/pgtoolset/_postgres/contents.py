"""The SQL that finds which tables have rows and which sequences have moved.

One statement asks for the sizes of the tables, which takes a few microseconds for each and no lock
that stays. Only tables that have pages are then asked for a row. The first statement names no
table, so PostgreSQL plans it once for each connection, whatever becomes of the tables, and what it
finds is never out of date.

https://www.postgresql.org/docs/current/catalogs.html,
https://www.postgresql.org/docs/current/catalog-pg-depend.html and
https://www.postgresql.org/docs/current/logical-replication-publication.html
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, TextClause, text

from pgtoolset._postgres.catalog import EQ, GT, IS_USERS, NE
from pgtoolset._postgres.inventory import Inventory
from pgtoolset._postgres.sending import send

__all__ = [
    "Contents",
    "MovedSequence",
    "Relation",
    "contents_of",
    "filled_and_moved",
    "flags",
]

#: The advisory lock of a cleaning. Two at a time would deadlock: each would have read the tables
#: that the other wants to truncate.
_CLEANING = 0x70675F636C65616E

_PG_CLASS, _PG_ATTRDEF = (
    f"CAST('pg_catalog.{name}' AS pg_catalog.regclass)" for name in ("pg_class", "pg_attrdef")
)

#: The settings that a cleaning changes. Its statements are planned once, for any tables.
_SETTINGS = ("lock_timeout", "row_security", "plan_cache_mode")

#: The tables of a metadata, and with them their partitions (`top` is the table of the metadata).
#: `begun` comes first, so that every lock is waited for within the limit.
_MEMBERS = f"""
begun AS MATERIALIZED (
  SELECT pg_catalog.current_setting('lock_timeout') AS lock_timeout,
         pg_catalog.current_setting('row_security') AS row_security,
         pg_catalog.set_config('lock_timeout', :timeout, true),
         pg_catalog.current_setting('plan_cache_mode') AS plan_cache_mode,
         pg_catalog.set_config('row_security', 'off', true),
         pg_catalog.set_config('plan_cache_mode', 'force_generic_plan', true),
         pg_catalog.pg_advisory_xact_lock({_CLEANING})),
ours AS MATERIALIZED (
  SELECT c.oid, c.relkind, c.relhasrules, c.relname, c.relnamespace, c.relowner
  FROM begun AS b CROSS JOIN pg_catalog.pg_class AS c
  WHERE b.lock_timeout IS NOT NULL AND c.relkind {EQ} ANY ('{{r,p}}') AND c.oid {EQ} ANY (ARRAY(
    SELECT CAST(pg_catalog.to_regclass(given.name) AS pg_catalog.oid)
    FROM pg_catalog.unnest(
      CAST(CAST(:names AS pg_catalog.text) AS pg_catalog.text[])) AS given(name)))),
member AS MATERIALIZED (
  SELECT o.oid, o.oid AS top FROM ours AS o
  UNION
  SELECT CAST(p.relid AS pg_catalog.oid), o.oid FROM ours AS o,
    pg_catalog.pg_partition_tree(CAST(o.oid AS pg_catalog.regclass)) AS p
  WHERE o.relkind {EQ} 'p')"""


def _published(of_schema: str) -> str:
    """The tables from which PostgreSQL may refuse a DELETE, or refuse an UPDATE.

    A table or a partition of it is published with such changes and has no replica identity, or the
    publication has conditions that the identity must satisfy.
    """
    return f"""
published AS MATERIALIZED (
  SELECT DISTINCT m.top AS oid
  FROM pg_catalog.pg_publication AS p CROSS JOIN member AS m
  JOIN pg_catalog.pg_class AS c ON c.oid {EQ} m.oid
  WHERE EXISTS (SELECT FROM pg_catalog.pg_publication)
  AND (p.pubdelete OR p.pubupdate) AND c.relkind {EQ} 'r'
  AND (p.puballtables AND c.relpersistence {EQ} 'p' OR EXISTS (
    SELECT FROM (SELECT c.oid UNION ALL
      SELECT CAST(a.relid AS pg_catalog.oid) FROM pg_catalog.pg_partition_ancestors(
        CAST(c.oid AS pg_catalog.regclass)) AS a(relid)) AS line(oid)
    WHERE EXISTS (SELECT FROM pg_catalog.pg_publication_rel AS r
                  WHERE r.prpubid {EQ} p.oid AND r.prrelid {EQ} line.oid){of_schema}))
  AND NOT (
    (c.relreplident {EQ} 'f' OR EXISTS (
      SELECT FROM pg_catalog.pg_index AS i WHERE i.indrelid {EQ} c.oid
      AND i.indisvalid AND i.indimmediate
      AND (c.relreplident {EQ} 'd' AND i.indisprimary
           OR c.relreplident {EQ} 'i' AND i.indisreplident)))
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute AS a
      WHERE a.attrelid {EQ} c.oid AND a.attgenerated {NE} '')
    AND NOT EXISTS (SELECT FROM pg_catalog.pg_publication_rel AS r
      WHERE r.prpubid {EQ} p.oid
      AND (pg_catalog.to_jsonb(r) OPERATOR(pg_catalog.->>) 'prqual' IS NOT NULL
        OR pg_catalog.to_jsonb(r) OPERATOR(pg_catalog.->>) 'prattrs' IS NOT NULL))))"""


#: From PostgreSQL 15 on.
_OF_SCHEMA = f"""
    OR EXISTS (SELECT FROM pg_catalog.pg_publication_namespace AS n
               JOIN pg_catalog.pg_class AS k ON k.relnamespace {EQ} n.pnnspid
               WHERE n.pnpubid {EQ} p.oid AND k.oid {EQ} line.oid)"""

#: The tables that have pages.
_SIZES = f"""
sized AS MATERIALIZED (
  SELECT m.top AS oid,
         CAST(pg_catalog.sum(pg_catalog.pg_relation_size(CAST(m.oid AS pg_catalog.regclass)))
              AS bigint) AS bytes
  FROM member AS m GROUP BY m.top),
candidate AS MATERIALIZED (
  SELECT o.oid, pg_catalog.format('%I.%I', n.nspname, o.relname) AS name,
    o.relkind {EQ} 'p' AS partitioned,
    s.bytes OPERATOR(pg_catalog./)
      CAST(pg_catalog.current_setting('block_size') AS bigint) AS pages,
    EXISTS (SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid {EQ} o.oid
            AND NOT {IS_USERS} AND (t.tgtype OPERATOR(pg_catalog.&) 8) {NE} 0) AS referenced,
    o.relhasrules AS ruled,
    pg_catalog.row_security_active(o.oid) AS hidden,
    NOT pg_catalog.has_table_privilege(o.oid, 'DELETE')
      OR NOT pg_catalog.pg_has_role(o.relowner, 'USAGE') AND EXISTS (
        SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgrelid {EQ} o.oid AND {IS_USERS})
      OR o.oid {EQ} ANY (ARRAY(SELECT p.oid FROM published AS p)) AS undeletable,
    pg_catalog.has_table_privilege(o.oid, 'TRUNCATE') AS truncatable
  FROM sized AS s JOIN ours AS o ON o.oid {EQ} s.oid
  JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} o.relnamespace
  WHERE s.bytes {GT} 0 AND NOT EXISTS (
    SELECT FROM member AS m WHERE m.oid {EQ} o.oid AND m.top {NE} o.oid))"""


def _sequences(moved: str) -> str:
    """The sequences of the tables: a column owns it or has it in its default, or a `Sequence()`.

    One that is not owned is left alone where a column of another table owns it or uses it too.
    """
    return f"""
part AS MATERIALIZED (
  SELECT d.classid, d.objid FROM pg_catalog.pg_depend AS d
  WHERE d.refclassid {EQ} {_PG_CLASS}
    AND d.refobjid {EQ} ANY (ARRAY(SELECT m.oid FROM member AS m))
    AND d.refobjsubid {GT} 0 AND d.deptype {EQ} ANY ('{{a,i}}')),
owned AS (SELECT p.objid AS oid FROM part AS p WHERE p.classid {EQ} {_PG_CLASS}),
used AS (
  SELECT d.refobjid AS oid FROM pg_catalog.pg_depend AS d
  WHERE d.classid {EQ} {_PG_ATTRDEF} AND d.refclassid {EQ} {_PG_CLASS} AND d.deptype {EQ} 'n'
    AND d.objid {EQ} ANY (ARRAY(SELECT p.objid FROM part AS p WHERE p.classid {EQ} {_PG_ATTRDEF}))
  UNION ALL
  SELECT CAST(pg_catalog.to_regclass(given.name) AS pg_catalog.oid)
  FROM pg_catalog.unnest(
    CAST(CAST(:sequences AS pg_catalog.text) AS pg_catalog.text[])) AS given(name)),
found AS MATERIALIZED (
  SELECT q.seqrelid AS oid, q.seqstart AS start FROM pg_catalog.pg_sequence AS q
  WHERE q.seqrelid {EQ} ANY (ARRAY(
      SELECT w.oid FROM owned AS w UNION ALL SELECT u.oid FROM used AS u))),
moved AS MATERIALIZED ({moved}),
restarted AS (
  SELECT v.oid, v.start, pg_catalog.format('%I.%I', n.nspname, c.relname) AS name
  FROM moved AS v JOIN pg_catalog.pg_class AS c ON c.oid {EQ} v.oid
  JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
  WHERE v.oid {EQ} ANY (ARRAY(SELECT w.oid FROM owned AS w)) OR NOT EXISTS (
    SELECT FROM pg_catalog.pg_depend AS d
    JOIN pg_catalog.pg_attrdef AS a ON a.oid {EQ} d.objid
    JOIN pg_catalog.pg_class AS k ON k.oid {EQ} a.adrelid
    WHERE d.refclassid {EQ} {_PG_CLASS} AND d.refobjid {EQ} v.oid AND d.classid {EQ} {_PG_ATTRDEF}
      AND k.relkind {EQ} ANY ('{{r,p,f}}')
      AND a.adrelid {NE} ALL (ARRAY(SELECT m.oid FROM member AS m)))
   AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_depend AS d
    WHERE d.classid {EQ} {_PG_CLASS} AND d.objid {EQ} v.oid AND d.refclassid {EQ} {_PG_CLASS}
      AND d.refobjsubid {GT} 0 AND d.deptype {EQ} ANY ('{{a,i}}')))"""


#: From PostgreSQL 18 on. NULL, where the role may not read the sequence, counts as moved, so that
#: the error of the restart says why.
_MOVED = f"""
  SELECT f.oid, f.start FROM (
    SELECT f.oid, f.start, pg_catalog.pg_get_sequence_data(CAST(f.oid AS pg_catalog.regclass)) AS d
    FROM found AS f OFFSET 0) AS f
  WHERE coalesce((f.d).is_called OR (f.d).last_value {NE} f.start, true)"""
#: Before, each has to be asked by its name.
_ALL = "SELECT f.oid, f.start FROM found AS f"


@dataclass(frozen=True, slots=True)
class Relation:
    """A table of the metadata that has pages. A partitioned one stands for its partitions.

    Attributes:
        oid: its object id.
        name: quoted and qualified.
        partitioned: whether it has partitions in place of rows.
        pages: its size in pages, with its partitions.
        is_referenced: whether a foreign key refers to it.
        has_rules: whether it has rewrite rules.
        hides_rows: whether row-level security may hide rows from this role.
        refuses_delete: whether PostgreSQL may refuse a DELETE, or to disable the triggers on it.
        allows_truncate: whether this role has the privilege for TRUNCATE.
    """

    oid: int
    name: str
    partitioned: bool
    pages: int = 0
    is_referenced: bool = False
    has_rules: bool = False
    hides_rows: bool = False
    refuses_delete: bool = False
    allows_truncate: bool = True

    @property
    def only(self) -> str:
        """The name for statements that must spare the rows of inheritance children."""
        return self.name if self.partitioned else f"ONLY {self.name}"

    @property
    def is_for_truncate(self) -> bool:
        """Whether a TRUNCATE may be allowed where a DELETE is not."""
        refuses = self.has_rules or self.hides_rows or self.refuses_delete
        return refuses and self.allows_truncate


@dataclass(frozen=True, slots=True)
class MovedSequence:
    """A sequence to restart, or one that may have moved, and its first value."""

    oid: int
    name: str
    start: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What the database has of a metadata.

    Attributes:
        settings: the settings that the cleaning changes, as they were.
        tables: the oids of the tables that exist.
        partitioned: the oids of the partitioned ones.
        published: the oids of those where PostgreSQL may refuse a DELETE or an UPDATE.
        candidates: the tables that have pages. A partition is left out where its partitioned
            table is one of ours.
        sequences: the ones that have moved; before PostgreSQL 18 all.
    """

    settings: dict[str, str]
    tables: list[int]
    partitioned: list[int]
    published: frozenset[int]
    candidates: list[Relation]
    sequences: list[MovedSequence]


def contents_of(
    connection: Connection,
    inventory: Inventory,
    milliseconds: int | None,
) -> Contents:
    """Wait for other cleanings, and look at the tables and sequences.

    From then on `row_security` is off: a policy that would hide rows from this role is an error.

    Args:
        connection: in a transaction.
        inventory: the names of the tables and sequences.
        milliseconds: how long to wait for each lock from now on; `None` waits without limit.
    """
    parameters = {
        "names": inventory.tables,
        "sequences": inventory.sequences,
        "timeout": str(milliseconds or 0),
    }
    version: Any = connection.dialect.server_version_info
    statement = _statement(version >= (18,), version >= (15,))
    row = tuple(connection.execute(statement, parameters).one())
    return Contents(
        settings=dict(zip(_SETTINGS, row[:3], strict=True)),
        tables=row[3] or [],
        partitioned=row[4] or [],
        published=frozenset(row[5]),
        candidates=[Relation(*each) for each in _rows(row[6:-3])],
        sequences=[MovedSequence(*each) for each in _rows(row[-3:])],
    )


def _rows(columns: Sequence[list[Any] | None]) -> Iterable[tuple[Any, ...]]:
    return zip(*columns, strict=True) if columns[0] else ()


# One row of arrays: SQLAlchemy takes longer for a row than PostgreSQL does for a table.
@cache
def _statement(has_sequence_data: bool, has_schemas: bool) -> TextClause:
    published = _published(_OF_SCHEMA if has_schemas else "")
    sequences = _sequences(_MOVED if has_sequence_data else _ALL)
    return text(f"""
WITH {_MEMBERS}, {published}, {_SIZES}, {sequences}
SELECT b.lock_timeout, b.row_security, b.plan_cache_mode, o.*, c.*, s.*
FROM begun AS b,
 (SELECT pg_catalog.array_agg(o.oid),
         pg_catalog.array_agg(o.oid) FILTER (WHERE o.relkind {EQ} 'p'),
         ARRAY(SELECT p.oid FROM published AS p)
  FROM ours AS o) AS o(tables, partitioned, published),
 (SELECT {_arrays("c", _CANDIDATE)} FROM candidate AS c) AS c({_CANDIDATE}),
 (SELECT {_arrays("s", _SEQUENCE)} FROM restarted AS s) AS s({_SEQUENCE})""")


_CANDIDATE = "oid, name, partitioned, pages, referenced, ruled, hidden, undeletable, truncatable"
_SEQUENCE = "oid, name, start"


def _arrays(alias: str, columns: str) -> str:
    order = f"ORDER BY {alias}.name"
    return ", ".join(
        f"pg_catalog.array_agg({alias}.{column} {order})" for column in columns.split(", ")
    )


def filled_and_moved(
    connection: Connection, found: Contents
) -> tuple[list[Relation], list[MovedSequence]]:
    """Return the tables that have rows and the sequences that have moved.

    A table whose rows are hidden from this role counts as filled while it has pages, if TRUNCATE
    can empty it.
    """
    asked = [each for each in found.candidates if not (each.hides_rows and each.allows_truncate)]
    has_rows = [f"EXISTS (SELECT FROM {each.only})" for each in asked]
    version: Any = connection.dialect.server_version_info
    unknown = [] if version >= (18,) else found.sequences
    has_moved = [
        f"(SELECT is_called OR last_value {NE} {each.start} FROM {each.name})" for each in unknown
    ]
    answers = flags(connection, [*has_rows, *has_moved])
    empty = {each.oid for each, answer in zip(asked, answers, strict=False) if not answer}
    still = {
        each.oid for each, answer in zip(unknown, answers[len(asked) :], strict=True) if not answer
    }
    return (
        [each for each in found.candidates if each.oid not in empty],
        [each for each in found.sequences if each.oid not in still],
    )


def flags(connection: Connection, expressions: Sequence[str]) -> list[bool]:
    """Return the values of so many conditions, by one statement; by none where there are none."""
    if not expressions:
        return []
    array = f"SELECT CAST(ARRAY[{', '.join(expressions)}] AS boolean[])"
    answers: list[bool] = send(connection, array).scalar_one()
    return answers
