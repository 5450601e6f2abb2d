"""`_arguments.keys`: a key is taken exactly where `AsyncSession.get` would find exactly its row."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import (
    ARRAY,
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
    MetaData,
    Numeric,
    SmallInteger,
    String,
    Table,
    Time,
    TypeDecorator,
    Uuid,
    text,
)
from sqlalchemy import inspect as inspect_orm
from sqlalchemy.dialects.postgresql import BYTEA, CITEXT, INET, INTERVAL, TIME, TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import registry

from pgtoolset._arguments import KeyParser, parse_key, parse_keys

ID = UUID("00112233-4455-6677-8899-aabbccddeeff")


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Index:
    """What NumPy's integers are: an integer by `__index__`, and not an `int`."""

    def __index__(self) -> int:
        return 7

    def __hash__(self) -> int:
        return 7


class Hexadecimal(TypeDecorator[int]):
    """Stores an integer as text."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else f"{value:x}"

    def process_result_value(self, value: Any, dialect: Any) -> int | None:
        return None if value is None else int(value, 16)


class Scaled(TypeDecorator[float]):
    """Stores tenths as an integer: what it makes of a value may not fit."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value * 10

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value // 10


class Renamed(TypeDecorator[str]):
    """Changes nothing."""

    impl = String
    cache_ok = True


@dataclass
class Case:
    """A type of a key, values that are keys (with what they become), and values that are none."""

    type: Any
    taken: list[Any]
    wrong_type: list[Any]
    wrong_value: list[Any] = field(default_factory=list)


AWARE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NAIVE = datetime(2026, 1, 2, 3, 4, 5)
SPLIT = NAIVE.replace(microsecond=1)

CASES = {
    "integer": Case(
        Integer(), [0, -5, 2**31 - 1, Index()], [1.5, True, "1", b"1", Decimal(1)], [2**31]
    ),
    "smallint": Case(SmallInteger(), [7, 2**15 - 1], [1.0, False], [2**15, -(2**15) - 1]),
    "bigint": Case(BigInteger(), [2**40, -(2**63)], ["x", 1e3], [2**63]),
    "string": Case(String(3), ["a", "", "USAX"], [1, b"a", Color.RED], ["a\0", "\ud800"]),
    "citext": Case(CITEXT(), ["News"], [1], ["\0"]),
    "enum": Case(Enum(Color, name="color"), [Color.RED, "BLUE"], [1, None.__class__], ["GREEN"]),
    "labels": Case(Enum("a", "b", name="labels"), ["a"], [1, Color.RED], ["c"]),
    "uuid": Case(Uuid(), [ID, str(ID), str(ID).upper(), ID.hex], [1, ID.bytes], ["x", ""]),
    "uuid as text": Case(Uuid(as_uuid=False), [str(ID), str(ID).upper(), ID], [1], ["no"]),
    "numeric": Case(
        Numeric(6, 2),
        [Decimal("1.5"), 3, 1.25, Decimal("1.50"), 9999, Decimal("1E+3"), Decimal("0.00")],
        [True, "1.5"],
        [Decimal("1.499"), 0.001, 10000, Decimal("12345.6")],
    ),
    "numeric without a scale": Case(Numeric(4), [1234], ["1"], [Decimal("1.5"), 12345]),
    "numeric of any scale": Case(Numeric(), [Decimal("1.4999"), 10**30, Decimal("NaN")], [True]),
    "timestamp of seconds": Case(TIMESTAMP(precision=0), [NAIVE], [1], [SPLIT, AWARE]),
    "time of milliseconds": Case(TIME(precision=3), [time(1, 2, 3, 4000)], [1], [time(1, 2, 3, 4)]),
    "interval of seconds": Case(
        INTERVAL(precision=0), [timedelta(seconds=1)], [1], [timedelta(microseconds=1)]
    ),
    "float": Case(Float(), [1.5, 2], [True, "1.5"]),
    "boolean": Case(Boolean(), [True, False], [1, 0, "true"]),
    "date": Case(Date(), [date(2026, 1, 2)], [NAIVE, "2026-01-02", 1]),
    "timestamp": Case(DateTime(), [NAIVE], [date(2026, 1, 2), "2026-01-02"], [AWARE]),
    "timestamptz": Case(DateTime(timezone=True), [AWARE], [date(2026, 1, 2), 1.0]),
    "time": Case(Time(), [time(3, 4)], [NAIVE, "03:04"]),
    "interval": Case(Interval(), [timedelta(seconds=5)], [5, "5s"]),
    "bytea": Case(BYTEA(), [b"\x00\xff"], ["text", 1]),
    "bytes": Case(LargeBinary(), [b"ab"], ["ab"]),
    "variant": Case(Integer().with_variant(BigInteger(), "postgresql"), [2**40], ["a"], [2**63]),
    "variant of another kind": Case(String().with_variant(Integer(), "postgresql"), [7], ["a"]),
    "inet": Case(INET(), ["10.0.0.1"], [{1}, [[1]], text("x")]),
    "decorated": Case(Hexadecimal(), [255], [], [1.5, "ff"]),
    "decorated, behind": Case(Scaled(), [5], [1.05], [2**30, object()]),
    "decorated, nothing": Case(Renamed(), ["a"], [1]),
}


def model_of(name: str, *types: Any) -> type[Any]:
    mappings = registry(metadata=MetaData())
    keys = [Column(f"k{at}", type_, primary_key=True) for at, type_ in enumerate(types)]
    for key in keys:
        key.autoincrement = False

    class Keyed:
        pass

    mappings.map_imperatively(Keyed, Table(f"keyed {name}", mappings.metadata, *keys))
    return Keyed


MODELS = {name: model_of(name, case.type) for name, case in CASES.items()}
TAKEN = [(name, value) for name, case in CASES.items() for value in case.taken]
WRONG = [(name, value, TypeError) for name, case in CASES.items() for value in case.wrong_type] + [
    (name, value, ValueError) for name, case in CASES.items() for value in case.wrong_value
]


@pytest.fixture
async def session(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine) as session:
        yield session
        await session.rollback()


# The embedded PostgreSQL has no citext.
@pytest.mark.parametrize("name", [name for name in CASES if name != "citext"])
async def test_found_exactly(session: AsyncSession, name: str) -> None:
    """A key that is taken finds its row by `get`, under the identity that the parser gives."""
    model = MODELS[name]
    connection = await session.connection()
    await connection.run_sync(model.__table__.metadata.create_all)
    too_long = {"string": ["USAX"]}.get(name, [])
    for value in CASES[name].taken:
        (key,) = parse_key("pk", inspect_orm(model), value)
        if value in too_long:
            assert await session.get(model, key) is None
            continue
        row = await session.get(model, key)
        if row is None:
            await connection.execute(model.__table__.insert().values(k0=key))
            row = await session.get_one(model, key)
        stored = row.k0
        if isinstance(stored, enum.Enum):
            assert key in (stored, stored.name)
        elif name == "inet":
            assert str(stored) == key
        else:
            assert stored == key or (stored != stored and key != key)  # NaN is not itself
            assert isinstance(stored, type(key) | Decimal | float)


@pytest.mark.parametrize(("name", "value", "error"), WRONG)
def test_refused(name: str, value: Any, error: type[Exception]) -> None:
    """What is not exactly a value of the type is an error that names argument and attribute."""
    mapper = inspect_orm(MODELS[name])
    with pytest.raises(error, match=r"^pk_value: Keyed\.k0 is "):
        parse_key("pk_value", mapper, value)
    with pytest.raises(error, match=r"^pks: Keyed\.k0 is "):
        parse_keys("pks", mapper, [*CASES[name].taken, value])


@pytest.mark.parametrize(("name", "value"), TAKEN)
def test_many_are_as_one(name: str, value: Any) -> None:
    """The fast look at many keys gives what each key gives by itself."""
    mapper = inspect_orm(MODELS[name])
    others = CASES[name].taken
    assert parse_keys("pks", mapper, [value, *others]) == [
        parse_key("pks", mapper, each) for each in (value, *others)
    ]


PAIR = inspect_orm(model_of("pair", Integer(), String()))


@pytest.mark.parametrize("value", [(1, "a"), [1, "a"], {"k0": 1, "k1": "a"}, {"k1": "a", "k0": 1}])
def test_composite(value: Any) -> None:
    """A composite key is a tuple in the mapper's order, a list, or a mapping of attributes."""
    assert parse_key("pk_value", PAIR, value) == (1, "a")
    assert parse_keys("pks", PAIR, [value, (2, "b")]) == [(1, "a"), (2, "b")]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (1, TypeError),
        ("ab", TypeError),
        ((1,), ValueError),
        ((1, "a", 2), ValueError),
        ((1, None), ValueError),
        (("a", 1), TypeError),
        ({"k0": 1}, ValueError),
        ({"k0": 1, "k1": "a", "k2": 2}, ValueError),
        (None, TypeError),
        (model_of("instance", Integer())(), TypeError),
    ],
)
def test_composite_refused(value: Any, error: type[Exception]) -> None:
    """A composite key of a wrong shape is refused, alone and among many."""
    with pytest.raises(error, match=r"^pk_value"):
        parse_key("pk_value", PAIR, value)
    with pytest.raises(error, match=r"^pks"):
        parse_keys("pks", PAIR, [(1, "a"), value])


@pytest.mark.parametrize("pks", ["abc", b"abc", {1: 2}, 5, None, int])
def test_keys_that_are_no_iterable(pks: Any) -> None:
    """A string, a mapping or a scalar in place of an iterable of keys is a `TypeError`."""
    with pytest.raises(TypeError, match=r"^pks must be an iterable of primary keys of Keyed"):
        parse_keys("pks", inspect_orm(MODELS["string"]), pks)


@pytest.mark.parametrize(
    ("value", "parts"), [([1, 2], ([1, 2],)), (([1, 2],), ([1, 2],)), ((1, 2), ((1, 2),))]
)
def test_array(value: Any, parts: Any) -> None:
    """An array is one value: by itself, and as the only element of a tuple."""
    model = model_of("array", ARRAY(Integer, as_tuple=True))
    assert parse_key("pk_value", inspect_orm(model), value) == parts


@pytest.mark.parametrize("value", [bytearray(b"ab"), memoryview(b"ab")])
def test_bytes(value: Any) -> None:
    """Bytes that can be changed become such that can be compared in a set."""
    assert parse_key("pk_value", inspect_orm(MODELS["bytes"]), value) == (b"ab",)
    assert {type(part) for part in parse_key("pk_value", inspect_orm(MODELS["bytes"]), value)} == {
        bytes
    }


def test_null_and_instances() -> None:
    """None is never a key, and an instance is not one."""
    mapper = inspect_orm(MODELS["integer"])
    with pytest.raises(ValueError, match="never None"):
        parse_key("pk_value", mapper, None)
    with pytest.raises(TypeError, match="not an instance"):
        parse_key("pk_value", mapper, MODELS["integer"]())


def test_no_secret_is_shown() -> None:
    """A URL that was given in place of a key is not echoed."""
    for name in MODELS:
        with pytest.raises((TypeError, ValueError)) as caught:
            parse_key("pk_value", inspect_orm(MODELS[name]), ["postgresql://u:secret@h/d", None])
        assert "secret" not in str(caught.value)


@given(st.lists(st.one_of(st.integers(), st.booleans(), st.floats(), st.text(max_size=2))))
def test_exact_is_never_wrong(values: list[Any]) -> None:
    """Where the fast look says that all are exact, each is, one by one."""
    for name in ("integer", "smallint", "bigint", "string", "boolean", "float", "uuid"):
        parser = KeyParser(inspect_orm(MODELS[name]))
        if parser.are_exact([values]):
            assert [parser.parse("pk", value) for value in values] == [(each,) for each in values]
