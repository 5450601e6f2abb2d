"""The SQL that finds what is not empty, and empties it.

https://www.postgresql.org/docs/current/catalogs.html,
https://www.postgresql.org/docs/current/sql-truncate.html and
https://www.postgresql.org/docs/current/queries-with.html#QUERIES-WITH-MODIFYING
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, text

from pgtoolset._postgres.quoting import do_block, literal, quoted

#: What one cleaning at a time in a database holds. Two would each read what the other wants to
#: truncate.
_TURN = 0x70675F636C65616E

_BEGIN = text(f"""
SELECT current_setting('lock_timeout') AS lock_timeout, current_setting('row_security') AS row_security,
       set_config('lock_timeout', :timeout, true), set_config('row_security', 'off', true),
       pg_advisory_xact_lock({_TURN})
""")

_STRUCTURE = text("""
WITH ours AS MATERIALIZED (
  SELECT DISTINCT c.oid, c.relkind, quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name
  FROM unnest(CAST(:names AS text[])) AS given(name)
  JOIN pg_class AS c ON c.oid = to_regclass(given.name) JOIN pg_namespace AS n ON n.oid = c.relnamespace
  WHERE c.relkind IN ('r', 'p'))
SELECT array_agg(f.kind), array_agg(f.oid), array_agg(f.name), array_agg(f.start) FROM (
SELECT o.relkind::text AS kind, o.oid, o.name, NULL::bigint AS start FROM ours AS o
UNION ALL
SELECT s.relkind::text, s.oid, quote_ident(n.nspname) || '.' || quote_ident(s.relname), q.seqstart
FROM pg_depend AS d
JOIN pg_class AS s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_namespace AS n ON n.oid = s.relnamespace
JOIN pg_sequence AS q ON q.seqrelid = s.oid
-- An array, because the planner takes the tables for fewer than they are, and would go through them for each sequence.
WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY (ARRAY(SELECT o.oid FROM ours AS o))
  AND d.refobjsubid > 0 AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
ORDER BY name) AS f
""")

_DETAILS = text("""
WITH member AS MATERIALIZED (
  SELECT t.oid, t.oid AS root FROM unnest(CAST(:dirty AS oid[])) AS t(oid)
  UNION
  SELECT p.relid::oid, t.oid FROM unnest(CAST(:partitioned AS oid[])) AS t(oid), pg_partition_tree(t.oid) AS p
)
SELECT 'member' AS kind, m.oid AS a, m.root AS b, '' AS name, '' AS detail,
       CASE WHEN m.root = ANY(CAST(:dirty AS oid[]))
            THEN pg_relation_size(m.oid) / current_setting('block_size')::bigint ELSE 0 END AS pages
FROM member AS m
UNION ALL
SELECT 'reference', f.conrelid, f.confrelid,
       CASE WHEN f.conrelid IN (SELECT m.oid FROM member AS m) THEN '' ELSE
         CASE WHEN c.relkind = 'p' THEN '' ELSE 'ONLY ' END || quote_ident(n.nspname) || '.' || quote_ident(c.relname)
         || ' WHERE ' || (SELECT string_agg(quote_ident(a.attname) || ' IS NOT NULL', ' AND ') FROM pg_attribute AS a
                          WHERE a.attrelid = f.conrelid AND a.attnum = ANY(f.conkey)) END,
       n.nspname || '.' || c.relname || ' (' || f.conname || ')', 0
FROM pg_constraint AS f JOIN pg_class AS c ON c.oid = f.conrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE f.contype = 'f' AND f.conparentid = 0 AND f.confrelid IN (SELECT m.oid FROM member AS m)
UNION ALL
SELECT 'trigger', t.tgrelid, t.oid, quote_ident(n.nspname) || '.' || quote_ident(c.relname), t.tgname,
       CASE t.tgenabled WHEN 'A' THEN 1 ELSE 0 END
FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') AND t.tgtype & 40 <> 0  -- on DELETE (8) or TRUNCATE (32)
  AND t.tgrelid IN (SELECT m.oid FROM member AS m)
ORDER BY kind, name, detail
""")


@dataclass(slots=True)
class Relation:
    """A table, by its quoted and qualified name. A partitioned one stands for its partitions
    too."""

    oid: int
    name: str
    partitioned: bool
    pages: int = 0

    @property
    def only(self) -> str:
        """The name where SQL means this table's own rows; those of inheritance children belong to
        the children."""
        return self.name if self.partitioned else f"ONLY {self.name}"


@dataclass(frozen=True, slots=True)
class OwnedSequence:
    """A sequence that a column of one of the tables owns, and where it starts."""

    oid: int
    name: str
    start: int


@dataclass(frozen=True, slots=True)
class Reference:
    """A foreign key to one of the tables.

    Attributes:
        referencing: the oid of the table that has it.
        referenced: the oid of the table, or partition, that it points to.
        rows: what finds the rows of the referencing table that point somewhere; empty where it is
            one of the tables.
        label: the table and the constraint, for people.
    """

    referencing: int
    referenced: int
    rows: str
    label: str


@dataclass(frozen=True, slots=True)
class Trigger:
    """A trigger of the user's that an emptying would fire."""

    relation: int
    table: str
    name: str
    always: bool


@dataclass(slots=True)
class Details:
    """What matters for emptying tables, besides their rows. `roots`: the tables that a partition is
    of, and itself."""

    roots: dict[int, set[int]] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)
    triggers: list[Trigger] = field(default_factory=list)


def begin(connection: Connection, milliseconds: int | None) -> dict[str, str]:
    """Wait for the turn, at the most so long, as for every lock from now on; the earlier values of
    the settings.

    With `row_security` off, a policy that would hide rows from this role is an error.
    """
    row = connection.execute(_BEGIN, {"timeout": str(milliseconds or 0)}).one()
    return {"lock_timeout": row.lock_timeout, "row_security": row.row_security}


def structure_of(
    connection: Connection, names: Sequence[str]
) -> tuple[list[Relation], list[OwnedSequence]]:
    """Those of the tables that exist, each once, and the sequences that their columns own. Takes no
    lock on them."""
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
    """Those that have rows, and those that have moved: one statement, whatever their number."""
    filled = _array(f"EXISTS (SELECT FROM {relation.only})" for relation in relations)
    version: Any = connection.dialect.server_version_info
    moved = _moved_by_function(sequences) if version >= (18,) else _moved_by_reading(sequences)
    row = connection.exec_driver_sql(f"SELECT {filled}, {moved}").one()
    return (
        [relation for relation, is_filled in zip(relations, row[0], strict=True) if is_filled],
        [each for each, has_moved in zip(sequences, row[1], strict=True) if has_moved],
    )


def details_of(
    connection: Connection, relations: Sequence[Relation], dirty: Sequence[Relation]
) -> Details:
    """The foreign keys to the `dirty` ones and their triggers; their pages are written into
    them."""
    found = Details(roots={relation.oid: {relation.oid} for relation in relations})
    pages = {relation.oid: 0 for relation in relations}
    parameters = {
        "partitioned": [relation.oid for relation in relations if relation.partitioned],
        "dirty": [relation.oid for relation in dirty],
    }
    for row in connection.execute(_DETAILS, parameters):
        match row.kind:
            case "member":
                found.roots.setdefault(row.a, set()).add(row.b)
                pages[row.b] += row.pages
            case "reference":
                found.references.append(Reference(row.a, row.b, row.name, row.detail))
            case "trigger":
                found.triggers.append(Trigger(row.a, row.name, quoted(row.detail), row.pages == 1))
    for relation in dirty:
        relation.pages = pages[relation.oid]
    return found


def with_rows(connection: Connection, references: Sequence[Reference]) -> list[Reference]:
    """Those foreign keys that some row uses."""
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
    """One statement that empties the tables, fires no trigger of the user's and restores
    `settings`.

    The DELETEs are one statement too: foreign keys are checked at its end, when the rows of all the
    tables are gone, so their order does not matter, and they may form a cycle.
    """
    # A constraint that waits for the commit would be in the way of ALTER TABLE and TRUNCATE.
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
        # In a WITH, a rule that would keep the rows is an error.
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
        f"(SELECT is_called OR last_value <> {each.start} FROM {each.name})" for each in sequences
    )


def _moved_by_function(sequences: Sequence[OwnedSequence]) -> str:
    """The same from PostgreSQL 18 on: the plan does not depend on the sequences, so a restart does
    not throw it away.

    The function gives NULL where the role may not read the sequence. Restarting it will tell the
    reason.
    """
    rows = ", ".join(f"({n}, {each.oid}, {each.start})" for n, each in enumerate(sequences))
    if not rows:
        return "CAST(ARRAY[] AS bool[])"
    return f"""(SELECT array_agg(coalesce(d.is_called OR d.last_value <> s.start, true) ORDER BY s.n)
        FROM (VALUES {rows}) AS s(n, oid, start), pg_get_sequence_data(s.oid::oid::regclass) AS d)"""


def _array(expressions: Iterable[str]) -> str:
    return f"CAST(ARRAY[{', '.join(expressions)}] AS bool[])"
