"""`lock_rows` on keys of every type: exactly the rows of these keys, and no row of another."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import (
    ARRAY,
    CHAR,
    BigInteger,
    Column,
    Date,
    DateTime,
    Enum,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    TypeDecorator,
    Uuid,
    func,
    insert,
    select,
)
from sqlalchemy.dialects.postgresql import INET, INTERVAL, TIME, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import registry

from pgtoolset import LockTimeoutError, lock_rows

Maker = async_sessionmaker[AsyncSession]


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


class Lowered(TypeDecorator[str]):
    """Stores text in lower case, by a function of PostgreSQL."""

    impl = String
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return func.lower(bindvalue, type_=self)


class Reversed(TypeDecorator[str]):
    """Stores three letters in reverse, by Python and with a length."""

    impl = String(3)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else str(value)[::-1]

    def process_result_value(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else str(value)[::-1]


@dataclass(frozen=True)
class Case:
    """Key columns, the keys of some rows, and keys that must not find one of them.

    Attributes:
        types: of the columns of the key.
        rows: the keys of the rows.
        strangers: other keys, most of which a cast to the column's type would turn into one of the
            rows.
        spelled: how the caller gives the keys, where that differs.
    """

    types: tuple[Any, ...]
    rows: list[Any]
    strangers: list[Any] = field(default_factory=list)
    spelled: list[Any] | None = None


MOMENT = datetime(2026, 11, 29, 12, 0, 1)
ZONED = MOMENT.replace(tzinfo=UTC)

Integers: Any = ARRAY(Integer, as_tuple=True)
Texts: Any = ARRAY(String(3), as_tuple=True)

CASES = {
    "integer": Case((Integer,), [-1, 1, 2], [1.5, True, "1", 2**40, Decimal(1)]),
    "bigint": Case((BigInteger,), [1, 2**40], [2**64]),
    "varchar": Case((String(3),), ["UKR", "USA", "é"], ["USAX", "usa", "US", "USA ", "UKRé"]),
    "text": Case((String,), ["", "NULL", 'a"b', "a\\b", "{x,y}"], ["null", "a", "{x}"]),
    "char": Case((CHAR(2),), ["U ", "US"], ["USA", "us"], ["U", "US"]),
    "timestamp": Case(
        (TIMESTAMP(precision=0),),
        [MOMENT, MOMENT + timedelta(seconds=1)],
        [MOMENT + timedelta(microseconds=400_000), MOMENT - timedelta(microseconds=1), ZONED],
    ),
    "timestamptz": Case(
        (DateTime(timezone=True),), [ZONED, ZONED + timedelta(microseconds=1)], [date(2026, 11, 29)]
    ),
    "time": Case((TIME(precision=0),), [time(1, 2, 3)], [time(1, 2, 3, 400_000)]),
    "date": Case((Date,), [date(2026, 11, 29)], [MOMENT]),
    "interval": Case(
        (INTERVAL(precision=0),), [timedelta(seconds=5)], [timedelta(seconds=5, milliseconds=400)]
    ),
    "numeric": Case(
        (Numeric(6, 2),),
        [Decimal("1.49"), Decimal("1.50")],
        [Decimal("1.499"), 1.499, "1.50", Decimal("1.501"), Decimal("10001.50")],
        [1.49, Decimal("1.500")],
    ),
    "float": Case((Float,), [0.1, 1.5], [0.1000000001]),
    "uuid": Case((Uuid,), [UUID(int=1), UUID(int=2)], ["1"], [UUID(int=1), str(UUID(int=2))]),
    "enum": Case((Enum(Color, name="lock_color"),), [Color.RED, Color.BLUE], ["red"]),
    "labels": Case((Enum("a", "b", name="lock_label"),), ["a", "b"], ["c", "A"]),
    "varchar enum": Case((Enum(Color, native_enum=False, length=5),), [Color.BLUE, Color.RED]),
    "bytes": Case((LargeBinary,), [b"\0", b"\xff"], ["\0", b""]),
    "inet": Case(
        (INET,), [ip_address("10.0.0.1"), ip_address("10.0.0.2")], [ip_address("10.0.0.3")]
    ),
    "bind_expression": Case((Lowered,), ["usa", "usb"], ["usc"], ["USA", "uSb"]),
    "decorator": Case((Reversed,), ["CBA", "AAB"], ["ABCX", "XCBA", "ABC"]),
    "array": Case((Integers,), [(1,), (1, 2)], [[2, 1], [], [1, 2, 3]], [[1], ((1, 2),)]),
    "array of varchar": Case((Texts,), [("USA",), ("USA", "b,{")], [["USAX"], ["usa"]]),
    "composite": Case(
        (Integer, String(3), Numeric(6, 2)),
        [(1, "UKR", Decimal("1.50")), (1, "USA", Decimal("1.49")), (2, "UKR", Decimal("1.49"))],
        [
            (1, "UKRX", Decimal("1.50")),
            (1, "UKR", Decimal("1.499")),
            (1, "UKR", Decimal("1.49")),
            (1.0, "UKR", Decimal("1.50")),
            (2, "USA", Decimal("1.50")),
        ],
    ),
    "composite of all": Case(
        (TIMESTAMP(precision=0), CHAR(2), Lowered, Integers),
        [(MOMENT, "US", "a", (1,)), (MOMENT, "US", "b", (1, 2))],
        [
            (MOMENT, "USA", "a", [1]),
            (MOMENT + timedelta(milliseconds=400), "US", "a", [1]),
            (MOMENT, "US", "a", [1, 2]),
            (MOMENT, "US", "c", [1]),
        ],
        [(MOMENT, "US", "A", [1]), (MOMENT, "US", "B", (1, 2))],
    ),
}


@pytest.fixture(params=CASES)
async def case(engine: AsyncEngine, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """A mapped class for one of the cases, with its rows stored in reverse order."""
    case = CASES[request.param]
    columns = [
        Column(f"k{number}", type_, primary_key=True, autoincrement=False)
        for number, type_ in enumerate(case.types)
    ]
    table = Table("lock_key", MetaData(), *columns)
    model = type("Keyed", (), {})
    mapping = registry()
    mapping.map_imperatively(model, table)
    stored = [row if len(columns) > 1 else (row,) for row in reversed(case.rows)]
    async with engine.begin() as connection:
        await connection.run_sync(table.metadata.create_all)
        for row in stored:
            values = {f"k{number}": value for number, value in enumerate(row)}
            await connection.execute(insert(table).values(values))
    yield case, model
    mapping.dispose()
    async with engine.begin() as connection:
        await connection.run_sync(table.metadata.drop_all)


def key_of(row: Any, case: Case) -> Any:
    values = tuple(getattr(row, f"k{number}") for number in range(len(case.types)))
    return values if len(values) > 1 else values[0]


async def locked(engine: AsyncEngine, model: Any, case: Case) -> list[Any]:
    """Return the keys of the rows that another session has locked, in their order."""
    async with AsyncSession(engine) as session:
        order = [getattr(model, f"k{number}") for number in range(len(case.types))]
        rows = (await session.scalars(select(model).order_by(*order))).all()
        free = await session.scalars(
            select(model).order_by(*order).with_for_update(skip_locked=True)
        )
        keys = [key_of(row, case) for row in free]
        return [key for key in (key_of(row, case) for row in rows) if key not in keys]


def shown(key: Any) -> str:
    """What a key is, type included. psycopg gives a time the zone of the server by its name."""
    is_aware = isinstance(key, datetime) and key.tzinfo is not None
    return repr(key.astimezone(UTC) if is_aware else key)


async def test_exactly_these_rows(engine: AsyncEngine, session_maker: Maker, case: Any) -> None:
    """The rows of the keys are locked and returned in key order, each key alone and all of them."""
    case, model = case
    spelled = case.spelled or case.rows
    for given, expected in [
        *(([key], [row]) for key, row in zip(spelled, case.rows, strict=True)),
        (spelled[::-1], case.rows),
        (spelled + spelled, case.rows),
    ]:
        async with session_maker() as session:
            rows = await lock_rows(session, model, given, nowait=True)
            keys = [key_of(row, case) for row in rows]
            assert sorted(map(shown, keys)) == sorted(map(shown, expected))
            # In PostgreSQL's order of the keys, whatever the collation is.
            assert keys == await locked(engine, model, case)


async def test_no_other_row(engine: AsyncEngine, session_maker: Maker, case: Any) -> None:
    """A key that the column's type would cut, round or convert is refused or finds no row."""
    case, model = case
    for stranger in case.strangers:
        async with session_maker() as session:
            try:
                rows = await lock_rows(session, model, [stranger])
            except (TypeError, ValueError):
                assert not session.in_transaction()
            else:
                assert list(rows) == [], stranger
                assert await locked(engine, model, case) == [], stranger


async def test_blockers(
    engine: AsyncEngine, session_maker: Maker, other: asyncpg.Connection, case: Any
) -> None:
    """Whatever the type of the key is, the error of `nowait` names the holder of the row."""
    case, model = case
    key = (case.spelled or case.rows)[0]
    async with other.transaction(), session_maker() as session:
        await other.execute("SELECT FROM lock_key FOR UPDATE")
        with pytest.raises(LockTimeoutError) as caught:
            await lock_rows(session, model, [key], nowait=True)
    assert [blocker.pid for blocker in caught.value.blockers] == [other.get_server_pid()]
