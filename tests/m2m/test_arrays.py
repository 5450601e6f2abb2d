"""`_postgres.arrays`: a key in an array finds the row that the ORM finds by the same key alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from enum import IntEnum
from typing import Any

import pytest
from sqlalchemy import (
    ARRAY,
    CHAR,
    Column,
    Float,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    bindparam,
    insert,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import BIT, DOMAIN, asyncpg, psycopg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgtoolset._postgres.arrays import Elements, among, equals, is_bound_as_it_is, unnest
from tests.m2m.models import Hexadecimal, Lowered, Numbers


class Number(IntEnum):
    ONE = 1
    TWO = 2


#: A type, a key that is stored, other spellings of it, and keys that a cast would make of it.
CASES: dict[str, tuple[Any, Any, list[Any], list[Any]]] = {
    "varchar": (String(3), "abc", [], ["abcd", "ABC"]),
    "lowered": (Lowered(), "abc", ["ABC", "aBc"], ["abcd"]),
    "hexadecimal": (Hexadecimal(), b"a", [], [b"61", b"A"]),
    "variant": (String(9).with_variant(Lowered(), "postgresql"), "abc", ["ABC"], ["ab"]),
    "float in numeric": (Numeric(6, 2, asdecimal=False), 1.49, [Decimal("1.490")], [1.5, 1.48]),
    "integer": (Integer(), 1, [Number.ONE], [Number.TWO, 3, 70_000]),
    "numeric": (Numeric(6, 2), Decimal("1.00"), [1, Decimal(1)], [2, Decimal("1.01"), None]),
    "float": (Float(), 1.5, [Decimal("1.5")], [1, 1.25, Decimal("1.75")]),
    "array": (ARRAY(Integer), [1, 2], [(1, 2)], [[2, 1], [1], []]),
    "array of varchar": (ARRAY(String(3)), ["abc"], [], [["abcd"], ["abc", "abc"]]),
    "array of char": (ARRAY(CHAR(3)), ["abc"], [["abc  "]], [["abcd"]]),
    "array of numeric": (ARRAY(Numeric(4, 1)), [Decimal("1.5")], [["1.50"]], [["1.54"]]),
    "decorated array": (Numbers(), (1, 2), [[1, 2]], [[1]]),
}


@pytest.fixture
async def connection(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection:
        yield connection


@pytest.mark.parametrize("name", CASES)
async def test_found_as_alone(connection: AsyncConnection, name: str) -> None:
    """Every spelling of a key finds its row, and a key that a cast would cut finds no row."""
    type_, stored, spellings, others = CASES[name]
    # SQLAlchemy 2.0 makes a SERIAL of a number that is not a Decimal.
    key = Column("key", type_, primary_key=True, autoincrement=False)
    table = Table("arrays_key", MetaData(), key, prefixes=["TEMPORARY"])
    await connection.run_sync(table.create)
    await connection.execute(insert(table), {"key": stored})
    rows = unnest("rows", {"wanted": key})
    joined = select(key).join_from(table, rows, equals(key, rows.c.wanted))
    for statement in (select(key).where(among({"wanted": key})), joined):
        for spelling in (stored, *spellings):
            found = await connection.execute(statement, {"wanted": [*others, spelling]})
            assert len(found.all()) == 1
        assert (await connection.execute(statement, {"wanted": others})).all() == []
        assert (await connection.execute(statement, {"wanted": []})).all() == []


async def test_composite(connection: AsyncConnection) -> None:
    """Each column of a composite key is compared as its own type wants it."""
    name, numbers = Column("name", Lowered()), Column("numbers", ARRAY(Integer))
    table = Table("arrays_key", MetaData(), name, numbers, prefixes=["TEMPORARY"])
    await connection.run_sync(table.create)
    await connection.execute(insert(table), [{"name": "a", "numbers": [1]}])
    statement = select(table).where(among({"k0": name, "k1": numbers}))
    for keys, count in (((["A"], [[1]]), 1), ((["A"], [[2]]), 0), ((["B", "A"], [[1], [2]]), 0)):
        found = await connection.execute(statement, {"k0": keys[0], "k1": keys[1]})
        assert len(found.all()) == count


async def test_ordinality(connection: AsyncConnection) -> None:
    """Rows can be counted from 1, in the order of the arrays."""
    rows = unnest("rows", {"wanted": Column("key", Integer)}, ordinality="position")
    found = await connection.execute(
        select(rows.c.position, rows.c.wanted).order_by(rows.c.position), {"wanted": [5, 3, 5]}
    )
    assert [tuple(row) for row in found] == [(1, 5), (2, 3), (3, 5)]


@pytest.mark.parametrize(
    ("type_", "rendered"),
    [
        (String(3), "pg_catalog.text[]"),
        (CHAR(3), "pg_catalog.bpchar[]"),
        (Numeric(4, 1), "NUMERIC[]"),
        (BIT(3), "BIT VARYING[]"),
        (DOMAIN("word", String(3)), "pg_catalog.text[]"),
        (ARRAY(Integer), "pg_catalog.text[]"),
    ],
)
@pytest.mark.parametrize("dialect", [asyncpg.dialect, psycopg.dialect])
def test_types_without_limits(dialect: Any, type_: Any, rendered: str) -> None:
    """The type of the array has no length, precision or scale, and is PostgreSQL's own."""
    parameter = bindparam("keys", type_=Elements(type_))
    assert f"::{rendered}" in str(select(parameter).compile(dialect=dialect()))


async def test_a_plain_key_is_one_array(connection: AsyncConnection) -> None:
    """A column of a plain type is compared with the array itself, so an index can be used."""
    assert is_bound_as_it_is(Column("key", Integer))
    assert not is_bound_as_it_is(Column("key", Lowered()))
    condition = among({"wanted": Column("key", Integer)})
    assert "key = ANY (" in str(condition.compile(dialect=connection.dialect))
    assert await connection.scalar(text("SELECT 1")) == 1
