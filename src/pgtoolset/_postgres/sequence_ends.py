"""Sequences, and how far each is from the last value that it or its column can have.

https://www.postgresql.org/docs/current/catalog-pg-sequence.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._postgres.catalog import EQ, GT
from pgtoolset._postgres.checkup import limited
from pgtoolset._postgres.nodes import IS_STANDBY

__all__ = ["SequenceEnd", "sequence_ends"]


@dataclass(frozen=True, slots=True)
class SequenceEnd:
    """A sequence that counts up or down to an end.

    Attributes:
        name: its name, quoted and with its schema.
        column: the column that it numbers, as `table.column`; `None` where no column uses it.
        type: the type of that column, or of the sequence.
        first: the end where it begins.
        last: its last possible value; where the column ends before, that of the column.
        is_readable: whether this role may see how far it is.
        value: its last value; `None` before the first, or where the role may not see it.
    """

    name: str
    column: str | None
    type: str
    first: int
    last: int
    is_readable: bool
    value: int | None


#: The largest values of the types of columns; the smallest are one less than their negatives.
_LARGEST = {"smallint": 2**15 - 1, "integer": 2**31 - 1, "bigint": 2**63 - 1}

#: A column uses the sequence that it owns, or that its default names. A column of another type has
#: no end. The values of unlogged sequences cannot be read on a standby, nor those of another
#: session's temporary ones.
_SEQUENCES = text(f"""
SELECT CAST(c.oid AS pg_catalog.int8), pg_catalog.format('%I.%I', n.nspname, c.relname),
       used.name, coalesce(used.type, pg_catalog.format_type(s.seqtypid, NULL)),
       s.seqincrement, s.seqmin, s.seqmax, s.seqcycle,
       pg_catalog.has_sequence_privilege(c.oid, 'USAGE, SELECT')
FROM pg_catalog.pg_sequence AS s
JOIN pg_catalog.pg_class AS c ON c.oid {EQ} s.seqrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
LEFT JOIN LATERAL (
    SELECT pg_catalog.format('%I.%I.%I', tn.nspname, t.relname, a.attname) AS name,
           pg_catalog.format_type(
               CASE WHEN y.typtype {EQ} 'd' THEN y.typbasetype ELSE y.oid END, NULL) AS type
    FROM (
        SELECT d.refobjid AS relid, d.refobjsubid AS attnum FROM pg_catalog.pg_depend AS d
        WHERE d.classid {EQ} CAST('pg_catalog.pg_class' AS pg_catalog.regclass)
          AND d.refclassid {EQ} CAST('pg_catalog.pg_class' AS pg_catalog.regclass)
          AND d.objid {EQ} c.oid AND d.refobjsubid {GT} 0
        UNION
        SELECT def.adrelid, def.adnum FROM pg_catalog.pg_depend AS d
        JOIN pg_catalog.pg_attrdef AS def ON def.oid {EQ} d.objid
        WHERE d.classid {EQ} CAST('pg_catalog.pg_attrdef' AS pg_catalog.regclass)
          AND d.refclassid {EQ} CAST('pg_catalog.pg_class' AS pg_catalog.regclass)
          AND d.refobjid {EQ} c.oid
    ) AS found
    JOIN pg_catalog.pg_class AS t ON t.oid {EQ} found.relid
    JOIN pg_catalog.pg_namespace AS tn ON tn.oid {EQ} t.relnamespace
    JOIN pg_catalog.pg_attribute AS a ON a.attrelid {EQ} found.relid AND a.attnum {EQ} found.attnum
    JOIN pg_catalog.pg_type AS y ON y.oid {EQ} a.atttypid
    ORDER BY a.attlen LIMIT 1
) AS used ON true
WHERE c.relpersistence {EQ} 'p' OR (c.relpersistence {EQ} 'u' AND NOT {IS_STANDBY})
ORDER BY n.nspname, c.relname
""")

_VALUES = text("""
SELECT CAST(given.oid AS pg_catalog.int8), pg_catalog.pg_sequence_last_value(
    CAST(given.oid AS pg_catalog.regclass))
FROM pg_catalog.unnest(CAST(:oids AS pg_catalog.oid[])) AS given(oid)
""")

#: Sequences whose values one transaction reads. It locks each, and the table of locks has an end.
_AT_ONCE = 500


async def sequence_ends(connection: AsyncConnection) -> list[SequenceEnd]:
    """Return the sequences that come to an end, with their values."""
    async with limited(connection):
        rows = (await connection.execute(_SEQUENCES)).all()
    readable = [row[0] for row in rows if row[-1]]
    values: dict[int, int | None] = {}
    for start in range(0, len(readable), _AT_ONCE):
        async with limited(connection):
            batch = {"oids": readable[start : start + _AT_ONCE]}
            values.update((row[0], row[1]) for row in await connection.execute(_VALUES, batch))
    return [each for row in rows if (each := _sequence(row, values.get(row[0])))]


def _sequence(row: Any, value: int | None) -> SequenceEnd | None:
    _, name, column, type_, increment, least, most, cycles, is_readable = row
    largest = _LARGEST[type_] if type_ in _LARGEST else most
    if cycles and least >= -largest - 1 and most <= largest:
        return None  # it begins again before the column ends
    first, last = (least, min(most, largest)) if increment > 0 else (most, max(least, -largest - 1))
    return SequenceEnd(name, column, type_, first, last, is_readable, value)
