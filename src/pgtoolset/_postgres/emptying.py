"""The SQL that finds the tables which are not empty, and empties them.

https://www.postgresql.org/docs/current/catalogs.html,
https://www.postgresql.org/docs/current/sql-truncate.html and
https://www.postgresql.org/docs/current/queries-with.html#QUERIES-WITH-MODIFYING
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, text

from pgtoolset._postgres.catalog import EQ, GT, NE
from pgtoolset._postgres.quoting import do_block, literal, quoted

#: The advisory lock of a cleaning. Two at a time would deadlock: each would have read the tables
#: that the other wants to truncate.
_CLEANING = 0x70675F636C65616E

_BEGIN = text(f"""
SELECT pg_catalog.current_setting('lock_timeout') AS lock_timeout,
       pg_catalog.current_setting('row_security') AS row_security,
       pg_catalog.set_config('lock_timeout', :timeout, true),
       pg_catalog.set_config('row_security', 'off', true),
       pg_catalog.pg_advisory_xact_lock({_CLEANING})
""")

_PG_CLASS = "CAST('pg_catalog.pg_class' AS pg_catalog.regclass)"

_STRUCTURE = text(f"""
WITH ours AS MATERIALIZED (
  SELECT DISTINCT c.oid, c.relkind, pg_catalog.format('%I.%I', n.nspname, c.relname) AS name
  FROM pg_catalog.unnest(CAST(:names AS pg_catalog.text[])) AS given(name)
  JOIN pg_catalog.pg_class AS c
    ON c.oid {EQ} CAST(pg_catalog.to_regclass(given.name) AS pg_catalog.oid)
  JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
  WHERE c.relkind {EQ} ANY ('{{r,p}}'))
SELECT pg_catalog.array_agg(f.kind), pg_catalog.array_agg(f.oid), pg_catalog.array_agg(f.name),
       pg_catalog.array_agg(f.start) FROM (
SELECT CAST(o.relkind AS varchar) AS kind, o.oid, o.name, CAST(NULL AS bigint) AS start
FROM ours AS o
UNION ALL
SELECT CAST(s.relkind AS varchar), s.oid, pg_catalog.format('%I.%I', n.nspname, s.relname),
       q.seqstart
FROM pg_catalog.pg_depend AS d
JOIN pg_catalog.pg_class AS s ON s.oid {EQ} d.objid AND s.relkind {EQ} 'S'
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} s.relnamespace
JOIN pg_catalog.pg_sequence AS q ON q.seqrelid {EQ} s.oid
-- An array, because the planner estimates too few tables, and would scan them for each sequence.
WHERE d.refclassid {EQ} {_PG_CLASS}
  AND d.refobjid {EQ} ANY (ARRAY(SELECT o.oid FROM ours AS o)) AND d.refobjsubid {GT} 0
  AND d.classid {EQ} {_PG_CLASS} AND d.deptype {EQ} ANY ('{{a,i}}')
ORDER BY name) AS f
""")

_DETAILS = text(f"""
WITH member AS MATERIALIZED (
  SELECT t.oid, t.oid AS root FROM pg_catalog.unnest(CAST(:filled AS pg_catalog.oid[])) AS t(oid)
  UNION
  SELECT CAST(p.relid AS pg_catalog.oid), t.oid
  FROM pg_catalog.unnest(CAST(:partitioned AS pg_catalog.oid[])) AS t(oid),
       pg_catalog.pg_partition_tree(CAST(t.oid AS pg_catalog.regclass)) AS p
)
SELECT 'member' AS kind, m.oid AS a, m.root AS b, '' AS name, '' AS detail,
       CASE WHEN m.root {EQ} ANY(CAST(:filled AS pg_catalog.oid[]))
            THEN pg_catalog.pg_relation_size(CAST(m.oid AS pg_catalog.regclass))
                 OPERATOR(pg_catalog./) CAST(pg_catalog.current_setting('block_size') AS bigint)
            ELSE 0 END AS pages
FROM member AS m
UNION ALL
SELECT 'reference', f.conrelid, f.confrelid,
       CASE WHEN f.conrelid {EQ} ANY (SELECT m.oid FROM member AS m) THEN '' ELSE
         pg_catalog.format('%s%I.%I WHERE %s',
           CASE WHEN c.relkind {EQ} 'p' THEN '' ELSE 'ONLY ' END, n.nspname, c.relname,
           (SELECT pg_catalog.string_agg(
                pg_catalog.format('%I IS NOT NULL', a.attname), ' AND ' ORDER BY a.attnum)
            FROM pg_catalog.pg_attribute AS a
            WHERE a.attrelid {EQ} f.conrelid AND a.attnum {EQ} ANY(f.conkey))) END,
       pg_catalog.format('%s.%s (%s)', n.nspname, c.relname, f.conname), 0
FROM pg_catalog.pg_constraint AS f
JOIN pg_catalog.pg_class AS c ON c.oid {EQ} f.conrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
WHERE f.contype {EQ} 'f' AND f.conparentid {EQ} 0
  AND f.confrelid {EQ} ANY (SELECT m.oid FROM member AS m)
UNION ALL
SELECT 'trigger', t.tgrelid, t.oid, pg_catalog.format('%I.%I', n.nspname, c.relname),
       t.tgname, CASE WHEN t.tgenabled {EQ} 'A' THEN 1 ELSE 0 END
FROM pg_catalog.pg_trigger AS t
JOIN pg_catalog.pg_class AS c ON c.oid {EQ} t.tgrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
WHERE NOT t.tgisinternal AND t.tgenabled {EQ} ANY ('{{O,A}}')
  AND (t.tgtype OPERATOR(pg_catalog.&) 40) {NE} 0  -- on DELETE (8) or TRUNCATE (32)
  AND t.tgrelid {EQ} ANY (SELECT m.oid FROM member AS m)
ORDER BY kind, name, detail
""")


@dataclass(slots=True)
class Relation:
    """A table of the metadata. A partitioned one stands for its partitions.

    Attributes:
        oid: its object id.
        name: quoted and qualified.
        partitioned: whether it has partitions in place of rows.
        pages: its size in pages, with its partitions; known where it has rows.
    """

    oid: int
    name: str
    partitioned: bool
    pages: int = 0

    @property
    def only(self) -> str:
        """The name for statements that must spare the rows of inheritance children."""
        return self.name if self.partitioned else f"ONLY {self.name}"


@dataclass(frozen=True, slots=True)
class OwnedSequence:
    """A sequence that a column of one of the tables owns, and its first value."""

    oid: int
    name: str
    start: int


@dataclass(frozen=True, slots=True)
class Reference:
    """A foreign key to one of the tables.

    Attributes:
        referencing: the oid of the table that has the key.
        referenced: the oid of the table, or partition, that the key points to.
        rows: a table and a condition, for the rows that reference some row; empty where the
            referencing table is one of the tables itself.
        label: the table and the constraint, for a message.
    """

    referencing: int
    referenced: int
    rows: str
    label: str


@dataclass(frozen=True, slots=True)
class Trigger:
    """A user trigger that fires on DELETE or TRUNCATE.

    Attributes:
        relation: the oid of its table or partition.
        table: the quoted and qualified name of that.
        name: quoted.
        always: whether it is enabled as ALWAYS.
    """

    relation: int
    table: str
    name: str
    always: bool


@dataclass(slots=True)
class Details:
    """The partitions, foreign keys and triggers of the tables to empty.

    Attributes:
        roots: by the oid of a table or partition: the tables of the metadata that its rows belong
            to. A table belongs to itself.
        references: the foreign keys to one of them.
        triggers: the user triggers on them.
    """

    roots: dict[int, set[int]] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)
    triggers: list[Trigger] = field(default_factory=list)


def begin(connection: Connection, milliseconds: int | None) -> dict[str, str]:
    """Wait for other cleanings, and return the settings that this one changes.

    With `row_security` off, a policy that would hide rows from this role is an error.

    Args:
        connection: in a transaction.
        milliseconds: how long to wait for each lock from now on; `None` waits without limit.
    """
    row = connection.execute(_BEGIN, {"timeout": str(milliseconds or 0)}).one()
    return {"lock_timeout": row.lock_timeout, "row_security": row.row_security}


def structure_of(
    connection: Connection, names: Sequence[str]
) -> tuple[list[Relation], list[OwnedSequence]]:
    """Return the tables that exist, each once, and their sequences, without a lock on them."""
    relations: list[Relation] = []
    sequences: list[OwnedSequence] = []
    # One row of arrays: SQLAlchemy takes longer for a row than PostgreSQL does for a table.
    columns = connection.execute(_STRUCTURE, {"names": list(names)}).one()
    for kind, oid, name, start in zip(*columns, strict=True) if columns[0] else ():
        if kind == "S":
            sequences.append(OwnedSequence(oid, name, start))
        else:
            relations.append(Relation(oid, name, kind == "p"))
    return relations, sequences


def changed(
    connection: Connection, relations: Sequence[Relation], sequences: Sequence[OwnedSequence]
) -> tuple[list[Relation], list[OwnedSequence]]:
    """Return the tables that have rows and the sequences that have moved, by one statement."""
    filled = _array(f"EXISTS (SELECT FROM {relation.only})" for relation in relations)
    version: Any = connection.dialect.server_version_info
    moved = _moved_by_function(sequences) if version >= (18,) else _moved_by_reading(sequences)
    row = connection.exec_driver_sql(f"SELECT {filled}, {moved}").one()
    return (
        [relation for relation, is_filled in zip(relations, row[0], strict=True) if is_filled],
        [each for each, has_moved in zip(sequences, row[1], strict=True) if has_moved],
    )


def details_of(
    connection: Connection, relations: Sequence[Relation], filled: Sequence[Relation]
) -> Details:
    """Return the details of the tables that have rows, and write their pages into them.

    Args:
        connection: in a transaction.
        relations: the tables of the metadata.
        filled: the tables among them that have rows.
    """
    found = Details(roots={relation.oid: {relation.oid} for relation in relations})
    parameters = {
        "partitioned": [relation.oid for relation in relations if relation.partitioned],
        "filled": [relation.oid for relation in filled],
    }
    pages = dict.fromkeys(found.roots, 0)
    for row in connection.execute(_DETAILS, parameters):
        if row.kind == "member":
            pages[row.b] += row.pages
        _add(found, row)
    for relation in filled:
        relation.pages = pages[relation.oid]
    return found


def _add(found: Details, row: Row[Any]) -> None:
    match row.kind:
        case "member":
            found.roots.setdefault(row.a, set()).add(row.b)
        case "reference":
            found.references.append(Reference(row.a, row.b, row.name, row.detail))
        case "trigger":
            found.triggers.append(Trigger(row.a, row.name, quoted(row.detail), row.pages == 1))


def with_rows(connection: Connection, references: Sequence[Reference]) -> list[Reference]:
    """Return the foreign keys by which some row references another."""
    used = _array(f"EXISTS (SELECT FROM {reference.rows})" for reference in references)
    row = connection.exec_driver_sql(f"SELECT {used}").one()
    return [reference for reference, is_used in zip(references, row[0], strict=True) if is_used]


def empty_block(
    truncated: Sequence[Relation],
    deleted: Sequence[Relation],
    sequences: Sequence[OwnedSequence],
    triggers: Sequence[Trigger],
    settings: dict[str, str],
) -> str:
    """Return one statement that empties the tables, fires no user trigger and restores settings.

    The DELETEs are one statement inside it: PostgreSQL checks foreign keys at its end, when the
    rows of all the tables are gone. So their order does not matter, and they may form a cycle.
    """
    # ALTER TABLE and TRUNCATE are refused while a deferred constraint is to be checked.
    statements = ["SET CONSTRAINTS ALL IMMEDIATE"]
    statements += [
        f"ALTER TABLE ONLY {trigger.table} DISABLE TRIGGER {trigger.name}" for trigger in triggers
    ]
    if truncated:
        statements.append(f"TRUNCATE {', '.join(relation.only for relation in truncated)}")
    if deleted:
        parts = ", ".join(
            f"d{n} AS (DELETE FROM {relation.only})" for n, relation in enumerate(deleted)
        )
        # In a WITH, PostgreSQL refuses a rule that would keep the rows.
        statements.append(f"EXECUTE {literal(f'WITH {parts} SELECT')}")
    for trigger in triggers:
        mode = "ALWAYS " if trigger.always else ""
        statements.append(f"ALTER TABLE ONLY {trigger.table} ENABLE {mode}TRIGGER {trigger.name}")
    statements += [f"ALTER SEQUENCE {each.name} RESTART" for each in sequences]
    statements += [
        f"PERFORM pg_catalog.set_config('{name}', {literal(to)}, true)"
        for name, to in settings.items()
    ]
    return do_block(f"BEGIN {'; '.join(statements)}; END")


def _moved_by_reading(sequences: Sequence[OwnedSequence]) -> str:
    return _array(
        f"(SELECT is_called OR last_value {NE} {each.start} FROM {each.name})" for each in sequences
    )


def _moved_by_function(sequences: Sequence[OwnedSequence]) -> str:
    """The same from PostgreSQL 18 on, by a plan that a restart of a sequence does not invalidate.

    The function returns NULL where the role may not read the sequence. That counts as moved, so
    that the error of the restart says why.
    """
    rows = ", ".join(f"({n}, {each.oid}, {each.start})" for n, each in enumerate(sequences))
    if not rows:
        return _array(())
    moved = f"coalesce(d.is_called OR d.last_value {NE} s.start, true)"
    sequence = "CAST(CAST(s.oid AS pg_catalog.oid) AS pg_catalog.regclass)"
    return f"""(SELECT pg_catalog.array_agg({moved} ORDER BY s.n)
        FROM (VALUES {rows}) AS s(n, oid, start),
             pg_catalog.pg_get_sequence_data({sequence}) AS d)"""


def _array(expressions: Iterable[str]) -> str:
    return f"CAST(ARRAY[{', '.join(expressions)}] AS boolean[])"
