"""Keys of every type: the row that `AsyncSession.get` finds is the one that is watched."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from sqlalchemy import (
    CHAR,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    SmallInteger,
    String,
    Text,
    Time,
    TypeDecorator,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, DOMAIN, INET, INT4RANGE, Range
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase

from pgtoolset import RowNotFoundError, RowWatcher, row_change_trigger, wait_for_row_change
from pgtoolset.watch import _known_rows
from tests.support import until
from tests.watch.crowd import every_connection, queued, small

#: SQLAlchemy 2.1 warns of its own DOMAIN.
pytestmark = pytest.mark.filterwarnings("ignore:Type object:DeprecationWarning")


class Base(DeclarativeBase):
    pass


class Colour(enum.Enum):
    RED = "red"
    GREEN = "it's green"


class Lowered(TypeDecorator[str]):
    """Stored in lower case, by an expression that binds it."""

    impl = String
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return func.lower(bindvalue)


class Shifted(TypeDecorator[int]):
    """Stored as another number, and read back, by expressions."""

    impl = Integer
    cache_ok = True

    def bind_expression(self, bindvalue: Any) -> Any:
        return bindvalue.op("+")(text("1000"))

    def column_expression(self, column: Any) -> Any:
        return column.op("-")(text("1000"))


class Prefixed(TypeDecorator[str]):
    """Stored with a prefix, which Python adds and removes."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else f"p:{value}"

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value[2:]


class Encoded(TypeDecorator[str]):
    """Stored as bytes on PostgreSQL, whatever `impl` is elsewhere."""

    impl = String
    cache_ok = True

    def load_dialect_impl(self, dialect: Any) -> Any:
        return dialect.type_descriptor(LargeBinary())

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.encode()

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.decode()


class Numbers(TypeDecorator[tuple[int, ...]]):
    """An array as a tuple."""

    impl = ARRAY(Integer)
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else tuple(value)


class Case(NamedTuple):
    """A type, and keys of two rows of it.

    Attributes:
        missing: a key that finds no row, although a cast or a cut would find one.
        spelling: how a caller may spell the first key, where not as it is stored.
    """

    types: list[Any]
    one: Any
    two: Any
    missing: Any
    spelling: Any = None


MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

CASES: dict[str, Case] = {
    "smallint": Case([SmallInteger], -1, 2, 3),
    "integer": Case([Integer], 2**31 - 1, 2, 3),
    "bigint": Case([BigInteger], 2**63 - 1, 2, 3),
    "varchar(3)": Case([String(3)], "USA", "U,", "USAX"),
    "text": Case([Text], 'a"\\{},', "NULL", ""),
    "char(3)": Case([CHAR(3)], "ab", "abc", "abcd"),
    "numeric(6,2)": Case([Numeric(6, 2)], Decimal("1.20"), Decimal(-7), Decimal("1.2100"), 1.2),
    "numeric": Case([Numeric], Decimal("1.23456789012345678901"), Decimal(2), Decimal("1.23")),
    "float": Case([Float], 0.1, -2.5, 0.2),
    "boolean": Case([Boolean], True, False, None),
    "date": Case([Date], date(2026, 1, 2), date(1, 1, 1), date(2026, 1, 3)),
    "time": Case([Time], time(1, 2, 3, 4), time(0), time(1, 2, 3)),
    "timestamp": Case([DateTime], datetime(2026, 1, 2, 3), datetime(1, 1, 1), datetime(2026, 1, 2)),
    "timestamptz": Case(
        [DateTime(timezone=True)], MOMENT, MOMENT.replace(year=1), MOMENT.replace(microsecond=0)
    ),
    "interval": Case([Interval], timedelta(days=1, seconds=2), timedelta(0), timedelta(days=1)),
    "bytea": Case([LargeBinary], b"\x00\\n", b"", b"\x00", bytearray(b"\x00\\n")),
    "uuid": Case([Uuid], UUID(int=1), UUID(int=2**127), UUID(int=3), str(UUID(int=1))),
    "uuid as text": Case(
        [Uuid(as_uuid=False)], *(str(UUID(int=n)) for n in (1, 2, 3)), UUID(int=1)
    ),
    "enum": Case([Enum(Colour, name="key_colour")], Colour.GREEN, Colour.RED, None, "GREEN"),
    "domain": Case([DOMAIN("key_positive", Integer, check=text("VALUE > 0"))], 1, 2, 3),
    "inet": Case([INET], "10.0.0.1", "::1", "10.0.0.2"),
    "range": Case([INT4RANGE], Range(1, 5), Range(2, 3), Range(1, 4), Range(1, 4, bounds="[]")),
    "array": Case([ARRAY(Integer, as_tuple=True)], (1, 2), (3,), (1,), [1, 2]),
    "array of text": Case([ARRAY(Text, as_tuple=True)], ('a"', "b,"), ("NULL",), ('a"',)),
    "decorated array": Case([Numbers], (1, 2), (3,), (1,)),
    "other impl on PostgreSQL": Case([Encoded], "a", "b", "c"),
    "variant": Case([Integer().with_variant(BigInteger(), "postgresql")], 2**40, 2, 3),
    "bind_expression": Case([Lowered(20)], "news", "old", "newsy", "News"),
    "shifted": Case([Shifted], 1, 1001, -999),
    "decorated": Case([Prefixed(5)], "abc", "p:c", "abcd"),
    "two": Case(
        [String(3), Numeric(6, 2)], ("USA", Decimal("1.2")), ("US", Decimal(1)), ("USAX", 1)
    ),
    "two by expression": Case(
        [Lowered(9), ARRAY(Integer, as_tuple=True), Uuid],
        ("a", (1, 2), UUID(int=1)),
        ("b", (1,), UUID(int=1)),
        ("a", (1,), UUID(int=1)),
        ("A", [1, 2], str(UUID(int=1))),
    ),
}

MODELS: dict[str, Any] = {}
for number, (kind, case) in enumerate(CASES.items()):
    columns = [Column(f"key{n}", each, primary_key=True) for n, each in enumerate(case.types)]
    for each in columns:
        each.autoincrement = False
    attributes: dict[str, Any] = {f"key{n}": each for n, each in enumerate(columns)}
    MODELS[kind] = type(
        f"Keyed{number}",
        (Base,),
        {"__tablename__": f"keyed_{number}", **attributes, "value": Column(Text)},
    )


def instance(model: Any, key: Any, value: str) -> Any:
    parts = enumerate(identity(model, key))
    return model(**{f"key{n}": part for n, part in parts}, value=value)


def identity(model: Any, key: Any) -> Any:
    """A key as `AsyncSession.get` takes it: an array alone would be a composite key."""
    return key if len(model.__table__.primary_key) > 1 else (key,)


@pytest.fixture
async def model(engine: AsyncEngine, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """The model of a kind of keys, its table with two rows in it."""
    model = MODELS[request.param]
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all, [model.__table__])
    try:
        for key in (CASES[request.param].one, CASES[request.param].two):
            async with AsyncSession(engine) as session, session.begin():
                session.add(instance(model, key, "old"))
        yield model
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all, [model.__table__])


async def update(engine: AsyncEngine, model: Any, key: Any, value: str) -> None:
    """Update the row that the ORM finds for a key."""
    async with AsyncSession(engine) as session, session.begin():
        (await session.get_one(model, identity(model, key))).value = value


async def value_of(engine: AsyncEngine, model: Any, key: Any, **options: Any) -> str:
    async with AsyncSession(engine) as session:
        given = {"baseline": {"value": "old"}, "columns": ["value"], "interval": 0.05, **options}
        value: str = (await wait_for_row_change(session, model, key, **given)).value
        return value


EVERY = pytest.mark.parametrize(
    ("model", "kind"), [(kind, kind) for kind in CASES], ids=list(CASES), indirect=["model"]
)


@EVERY
async def test_waiting(engine: AsyncEngine, database_url: str, model: Any, kind: str) -> None:
    """wait_for_row_change finds the row of its key alone and together with others."""
    case = CASES[kind]
    keys = [case.one, case.two, case.one if case.spelling is None else case.spelling]
    async with small(database_url, 1) as pool:
        async with every_connection(pool):
            options = {"interval": 60, "timeout": 60}
            tasks = [asyncio.create_task(value_of(pool, model, key, **options)) for key in keys]
            await until(lambda: queued() == 3)
            await update(engine, model, case.one, "one")
            await update(engine, model, case.two, "two")
        async with asyncio.timeout(20):
            assert await asyncio.gather(*tasks) == ["one", "two", "one"]
        assert await value_of(pool, model, keys[2], timeout=20) == "one"


@pytest.mark.asyncpg(reason="RowWatcher")
@EVERY
@pytest.mark.parametrize("fetched", [_known_rows.FETCHED_ROWS, 0], ids=["fetched", "as text"])
async def test_watching(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, model: Any, kind: str, fetched: int
) -> None:
    """A RowWatcher tells of changes of the key's row, and of no other, by polling."""
    monkeypatch.setattr(_known_rows, "FETCHED_ROWS", fetched)
    await check_streams(engine, model, CASES[kind], RowWatcher(engine, interval=0.02))


@pytest.mark.asyncpg(reason="RowWatcher")
@EVERY
async def test_notifications(engine: AsyncEngine, model: Any, kind: str) -> None:
    """Notifications of a row wake those that watch it, however its key is spelled."""
    async with engine.begin() as connection:
        for ddl in row_change_trigger(model):
            await connection.execute(ddl)
    watcher = RowWatcher(engine, interval=600, notify=True)
    await check_streams(engine, model, CASES[kind], watcher)


async def check_streams(engine: AsyncEngine, model: Any, case: Case, watcher: RowWatcher) -> None:
    spelling = case.one if case.spelling is None else case.spelling
    async with watcher, asyncio.timeout(60):
        streams = [
            watcher.changes(model, key, columns=["value"]) for key in (case.one, case.two, spelling)
        ]
        for stream in streams:
            async with asyncio.timeout(30):
                await stream.__aenter__()
            assert stream.current == {"value": "old"}
        for value in ("new", "newer"):
            await update(engine, model, case.one, value)
            for stream in (streams[0], streams[2]):
                change = await anext(stream)
                assert change.after == {"value": value}
        await update(engine, model, case.two, "other")
        assert (await anext(streams[1])).after == {"value": "other"}
        async with AsyncSession(engine) as session, session.begin():
            await session.delete(await session.get_one(model, identity(model, case.one)))
        assert [(await anext(streams[n])).kind for n in (0, 2)] == ["delete", "delete"]


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.parametrize(
    ("model", "kind"),
    [(kind, kind) for kind, case in CASES.items() if case.missing is not None],
    ids=[kind for kind, case in CASES.items() if case.missing is not None],
    indirect=["model"],
)
async def test_missing(engine: AsyncEngine, model: Any, kind: str) -> None:
    """A key that is cut, rounded or shifted by nothing finds no row but its own."""
    missing = CASES[kind].missing
    with pytest.raises((RowNotFoundError, ValueError)):
        await value_of(engine, model, missing, baseline=None, timeout=0)
    async with RowWatcher(engine, interval=0.02) as watcher:
        with pytest.raises((RowNotFoundError, ValueError)):
            await watcher.wait(model, missing, timeout=10)
