"""The SQL that empties tables: its obstacles, and the one statement that does it.

https://www.postgresql.org/docs/current/catalogs.html,
https://www.postgresql.org/docs/current/sql-truncate.html and
https://www.postgresql.org/docs/current/queries-with.html#QUERIES-WITH-MODIFYING
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, TextClause, text

from pgtoolset._postgres.catalog import EQ, GT, IS_USERS, MINUS, NE
from pgtoolset._postgres.contents import MovedSequence, Relation, flags
from pgtoolset._postgres.quoting import do_block, literal, quoted
from pgtoolset._postgres.sending import send

#: Of the bits in pg_trigger.tgtype.
_ON_DELETE, _ON_TRUNCATE = 8, 32

#: An index by which PostgreSQL finds the rows of `leaf` that reference a row: its first columns are
#: those of the key, in any order, or it is unique and has no other columns.
_HAS_INDEX = f"""EXISTS (
  SELECT FROM pg_catalog.pg_index AS i JOIN pg_catalog.pg_class AS k ON k.oid {EQ} i.indexrelid
  JOIN pg_catalog.pg_am AS m ON m.oid {EQ} k.relam
  WHERE i.indrelid {EQ} leaf.oid AND i.indisvalid AND i.indpred IS NULL
    AND m.amname {EQ} ANY ('{{btree,hash}}')
    AND (key.columns OPERATOR(pg_catalog.<@) ARRAY(
        SELECT a.attname FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid {EQ} leaf.oid AND a.attnum {EQ} ANY (
          (CAST(i.indkey AS pg_catalog.int2[]))
            [0:LEAST(pg_catalog.cardinality(key.columns), i.indnkeyatts) {MINUS} 1]))
      OR i.indisunique AND i.indexprs IS NULL AND ARRAY(
        SELECT a.attname FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid {EQ} leaf.oid AND a.attnum {EQ} ANY (
          (CAST(i.indkey AS pg_catalog.int2[]))[0:i.indnkeyatts {MINUS} 1])
      ) OPERATOR(pg_catalog.<@) key.columns))"""

#: The pages of the table `c` and its partitions, and those of them without an index for the foreign
#: key `f`. A partition may have an index that the others lack.
_PAGES = f"""
  SELECT coalesce(CAST(pg_catalog.sum(leaf.pages) AS bigint), 0) AS pages,
         coalesce(CAST(pg_catalog.sum(leaf.pages) FILTER (
             WHERE leaf.pages {GT} 0 AND NOT {_HAS_INDEX}) AS bigint), 0) AS unindexed
  FROM (SELECT ARRAY(SELECT a.attname FROM pg_catalog.pg_attribute AS a
          WHERE a.attrelid {EQ} f.conrelid AND a.attnum {EQ} ANY (f.conkey))) AS key(columns),
   (SELECT t.oid, pg_catalog.pg_relation_size(CAST(t.oid AS pg_catalog.regclass))
        OPERATOR(pg_catalog./) CAST(pg_catalog.current_setting('block_size') AS bigint)
    FROM (SELECT c.oid WHERE c.relkind {NE} 'p' UNION ALL
      SELECT CAST(p.relid AS pg_catalog.oid) FROM pg_catalog.pg_partition_tree(
        CAST(CASE WHEN c.relkind {EQ} 'p' THEN c.oid END AS pg_catalog.regclass)) AS p
      WHERE p.isleaf) AS t(oid)) AS leaf(oid, pages)"""


# The foreign keys by way of pg_depend, because pg_constraint has no index for those to a table. One
# to a partitioned table has copies for its partitions: they count where that table is not emptied.
def _details(has_sizes: bool) -> TextClause:
    size = f"CROSS JOIN LATERAL ({_PAGES}) AS size" if has_sizes else ""
    sizes = "size.pages, size.unindexed" if has_sizes else "0, 0"
    return text(f"""
WITH filled AS MATERIALIZED (
  SELECT t.oid FROM pg_catalog.unnest(CAST(:filled AS pg_catalog.oid[])) AS t(oid)),
part AS MATERIALIZED (
  SELECT CAST(p.relid AS pg_catalog.oid) AS oid, t.oid AS top
  FROM pg_catalog.unnest(CAST(:partitioned AS pg_catalog.oid[])) AS t(oid),
       pg_catalog.pg_partition_tree(CAST(t.oid AS pg_catalog.regclass)) AS p),
member AS MATERIALIZED (
  SELECT f.oid FROM filled AS f
  UNION
  SELECT p.oid FROM part AS p WHERE p.top {EQ} ANY (ARRAY(SELECT f.oid FROM filled AS f)))
SELECT 'part' AS kind, p.oid AS a, p.top AS b, '' AS name, '' AS detail, '' AS mode, 0 AS events,
  CAST(0 AS bigint) AS pages, CAST(0 AS bigint) AS unindexed
FROM part AS p
UNION ALL
SELECT 'reference', f.conrelid, f.confrelid,
       pg_catalog.format('%s%I.%I WHERE %s',
         CASE WHEN c.relkind {EQ} 'p' THEN '' ELSE 'ONLY ' END, n.nspname, c.relname,
         (SELECT pg_catalog.string_agg(
              pg_catalog.format('%I IS NOT NULL', a.attname), ' AND ' ORDER BY a.attnum)
          FROM pg_catalog.pg_attribute AS a
          WHERE a.attrelid {EQ} f.conrelid AND a.attnum {EQ} ANY(f.conkey))),
       pg_catalog.format('%s.%s (%s)', n.nspname, c.relname, f.conname),
       CAST(f.confdeltype AS varchar), 0, {sizes}
FROM pg_catalog.pg_constraint AS f
JOIN pg_catalog.pg_class AS c ON c.oid {EQ} f.conrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
{size}
WHERE f.contype {EQ} 'f'
  AND f.confrelid {EQ} ANY (ARRAY(SELECT m.oid FROM member AS m))
  AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint AS above
    WHERE above.oid {EQ} f.conparentid
      AND above.confrelid {EQ} ANY (ARRAY(SELECT m.oid FROM member AS m)))
  AND f.oid {EQ} ANY (ARRAY(
    SELECT d.objid FROM pg_catalog.pg_depend AS d
    WHERE d.refclassid {EQ} CAST('pg_catalog.pg_class' AS pg_catalog.regclass)
      AND d.refobjid {EQ} ANY (ARRAY(SELECT m.oid FROM member AS m))
      AND d.classid {EQ} CAST('pg_catalog.pg_constraint' AS pg_catalog.regclass)))
UNION ALL
SELECT 'TRIGGER', t.tgrelid, t.oid, pg_catalog.format('%I.%I', n.nspname, c.relname),
       t.tgname, CAST(t.tgenabled AS varchar), t.tgtype OPERATOR(pg_catalog.&) 40, 0, 0
FROM pg_catalog.pg_trigger AS t
JOIN pg_catalog.pg_class AS c ON c.oid {EQ} t.tgrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
WHERE {IS_USERS} AND t.tgenabled {NE} 'D'
  AND (t.tgtype OPERATOR(pg_catalog.&) 40) {NE} 0
  AND t.tgrelid {EQ} ANY (ARRAY(SELECT m.oid FROM member AS m))
UNION ALL
SELECT 'RULE', r.ev_class, r.oid, pg_catalog.format('%I.%I', n.nspname, c.relname),
       r.rulename, CAST(r.ev_enabled AS varchar), {_ON_DELETE}, 0, 0
FROM pg_catalog.pg_rewrite AS r
JOIN pg_catalog.pg_class AS c ON c.oid {EQ} r.ev_class
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
WHERE r.ev_type {EQ} '4' AND r.ev_enabled {NE} 'D'
  AND r.ev_class {EQ} ANY (ARRAY(SELECT f.oid FROM filled AS f))
UNION ALL
SELECT 'replaced', given.oid, given.oid, given.name, '', '', 0, 0, 0
FROM ROWS FROM (pg_catalog.unnest(CAST(:filled AS pg_catalog.oid[])),
                pg_catalog.unnest(CAST(:names AS pg_catalog.text[]))) AS given(oid, name)
WHERE given.name IS NOT NULL AND (
  CAST(pg_catalog.to_regclass(given.name) AS pg_catalog.oid) {EQ} given.oid) IS NOT TRUE
ORDER BY kind, name, detail
""")


#: By whether the sizes of the referencing tables are asked for.
_DETAILS = {has: _details(has) for has in (False, True)}

#: The setting with which PostgreSQL checks no foreign key.
#: https://www.postgresql.org/docs/current/runtime-config-client.html
UNCHECKED = "session_replication_role"


def _may_set(has_privileges: bool) -> TextClause:
    granted = (
        f"pg_catalog.has_parameter_privilege('{UNCHECKED}', 'SET')"
        if has_privileges
        else f"pg_catalog.current_setting('is_superuser') {EQ} 'on'"
    )
    return text(f"SELECT pg_catalog.current_setting('{UNCHECKED}') WHERE {granted}")


#: By whether the server has privileges for settings, from PostgreSQL 15 on.
_MAY_SET = {has: _may_set(has) for has in (False, True)}

_NAMES = text(f"""
SELECT c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname), c.relkind {EQ} 'p',
       pg_catalog.has_table_privilege(c.oid, 'TRUNCATE')
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
WHERE c.oid {EQ} ANY (CAST(:oids AS pg_catalog.oid[]))
""")


@dataclass(frozen=True, slots=True)
class Reference:
    """A foreign key to one of the tables.

    Attributes:
        referencing: the oid of the table that has the key.
        referenced: the oid of the table, or partition, that the key points to.
        rows: a table and a condition, for the rows that reference some row.
        label: the table and the constraint, for a message.
        writes: whether the DELETE of a row writes rows that refer to it (CASCADE, SET NULL).
        pages: the size of the table that has the key, with its partitions.
        unindexed: the pages of those parts of it that have no index for the key.
    """

    referencing: int
    referenced: int
    rows: str
    label: str
    writes: bool
    pages: int
    unindexed: int


@dataclass(frozen=True, slots=True)
class Reaction:
    """A trigger or a rule of the user that acts on DELETE or TRUNCATE.

    Attributes:
        kind: `TRIGGER` or `RULE`.
        relation: the oid of its table or partition.
        table: the quoted and qualified name of that.
        name: quoted.
        mode: how it is enabled: `ALWAYS`, `REPLICA` or, as usually, empty.
        on_delete: whether a DELETE fires it.
        on_truncate: whether a TRUNCATE fires it.
    """

    kind: str
    relation: int
    table: str
    name: str
    mode: str
    on_delete: bool
    on_truncate: bool


@dataclass(slots=True)
class Details:
    """The partitions, foreign keys, triggers and rules of the tables to empty.

    Attributes:
        tops: by the oid of a table or partition: the table of the metadata that it belongs to. A
            table that is no partition of another one belongs to itself.
        references: the foreign keys to one of them.
        reactions: the triggers and rules of the user on them.
        replaced: the names that mean other tables by now.
    """

    tops: dict[int, int] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)
    reactions: list[Reaction] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)


def details_of(
    connection: Connection,
    tables: Sequence[int],
    partitioned: Sequence[int],
    known: Sequence[Relation],
    others: Collection[int] = (),
    *,
    has_sizes: bool = True,
) -> Details:
    """Return the details of tables.

    Args:
        connection: in a transaction that has locked them, so that no detail changes any more.
        tables: the oids of the tables of the metadata.
        partitioned: the oids of the partitioned ones.
        known: the tables whose details are asked for.
        others: the oids of more of them, which need no lock.
        has_sizes: whether the sizes of the tables that reference them matter.
    """
    parameters = {
        "partitioned": list(partitioned),
        "filled": [*(relation.oid for relation in known), *others],
        "names": [relation.name for relation in known],
    }
    found = Details()
    parts: list[tuple[int, int]] = []
    for row in connection.execute(_DETAILS[has_sizes], parameters):
        if row.kind == "part":
            parts.append((row.a, row.b))
        else:
            _add(found, row)
    found.tops = _tops_of(tables, parts)
    return found


def _tops_of(tables: Sequence[int], parts: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return by table or partition the table of the metadata that is no part of another one."""
    above: dict[int, set[int]] = {}
    for oid, top in parts:
        if oid != top:
            above.setdefault(oid, set()).add(top)
    tops = dict(zip(tables, tables, strict=True))
    tops |= {oid: next(top for top in found if top not in above) for oid, found in above.items()}
    return tops


def _add(found: Details, row: Row[Any]) -> None:
    match row.kind:
        case "reference":
            writes = row.mode in ("c", "n", "d")
            found.references.append(
                Reference(row.a, row.b, row.name, row.detail, writes, row.pages, row.unindexed)
            )
        case "replaced":
            found.replaced.append(row.name)
        case kind:
            mode = {"A": "ALWAYS ", "R": "REPLICA "}.get(row.mode, "")
            on_delete, on_truncate = bool(row.events & _ON_DELETE), bool(row.events & _ON_TRUNCATE)
            found.reactions.append(
                Reaction(kind, row.a, row.name, quoted(row.detail), mode, on_delete, on_truncate)
            )


def relations_of(connection: Connection, oids: Iterable[int]) -> list[Relation]:
    """Return tables by their oids."""
    rows = connection.execute(_NAMES, {"oids": list(oids)})
    return [
        Relation(oid, name, is_partitioned, allows_truncate=may)
        for oid, name, is_partitioned, may in rows
    ]


def unchecked(connection: Connection) -> dict[str, str]:
    """Return the setting by which foreign keys are checked, if this role may change it."""
    version: Any = connection.dialect.server_version_info
    value = connection.execute(_MAY_SET[version >= (15,)]).scalar_one_or_none()
    return {} if value is None else {UNCHECKED: value}


def with_rows(connection: Connection, references: Sequence[Reference]) -> list[Reference]:
    """Return the foreign keys by which some row references another."""
    used = flags(connection, [f"EXISTS (SELECT FROM {each.rows})" for each in references])
    return [reference for reference, is_used in zip(references, used, strict=True) if is_used]


def empty(
    connection: Connection,
    *,
    truncated: Sequence[Relation],
    deleted: Sequence[Relation],
    sequences: Sequence[MovedSequence],
    reactions: Sequence[Reaction],
    settings: dict[str, str],
    keeps_plans: bool,
) -> None:
    """Empty the tables and restart the sequences by one statement, and restore the settings.

    The DELETEs are one statement inside it: PostgreSQL checks foreign keys at its end, when the
    rows of all the tables are gone. So their order does not matter, and they may form a cycle.
    Where `settings` has `session_replication_role`, they are not checked: nothing refers to a row
    that stays, because every table with rows is emptied and none from outside has a reference.
    """
    # ALTER TABLE and TRUNCATE are refused while a deferred constraint is to be checked.
    statements = ["SET CONSTRAINTS ALL IMMEDIATE"]
    if not keeps_plans:
        statements.append("DISCARD PLANS")
    statements += [
        f"ALTER TABLE ONLY {each.table} DISABLE {each.kind} {each.name}" for each in reactions
    ]
    if truncated:
        statements.append(f"TRUNCATE {', '.join(relation.only for relation in truncated)}")
    if UNCHECKED in settings:
        statements.append(f"PERFORM pg_catalog.set_config('{UNCHECKED}', 'replica', true)")
    if deleted:
        parts = ", ".join(
            f"d{n} AS (DELETE FROM {relation.only})" for n, relation in enumerate(deleted)
        )
        statements.append(f"EXECUTE {literal(f'WITH {parts} SELECT')}")
    statements += [
        f"ALTER TABLE ONLY {each.table} ENABLE {each.mode}{each.kind} {each.name}"
        for each in reactions
    ]
    statements += [f"ALTER SEQUENCE {each.name} RESTART" for each in sequences]
    statements += [
        f"PERFORM pg_catalog.set_config('{name}', {literal(to)}, true)"
        for name, to in settings.items()
    ]
    send(connection, do_block(f"BEGIN {'; '.join(statements)}; END"))
