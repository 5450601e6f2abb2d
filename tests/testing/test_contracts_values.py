"""The values that the harness of a contract chooses for the column of a model."""

from __future__ import annotations

import enum
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgtoolset.testing import MemoryDatabase
from pgtoolset.testing.contracts import MappedRows, MemoryRows


class Color(enum.Enum):
    RED = 1
    GREEN = 2
    BLUE = 3


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "row_of_types"

    number: Mapped[int] = mapped_column("id", primary_key=True)
    text: Mapped[str] = mapped_column(sa.Text)
    short: Mapped[str] = mapped_column(sa.String(1))
    char: Mapped[str] = mapped_column(sa.CHAR(5))
    integer: Mapped[int] = mapped_column(sa.SmallInteger)
    price: Mapped[Any] = mapped_column(sa.Numeric(3, 2))
    ratio: Mapped[float] = mapped_column(sa.Float)
    data: Mapped[bytes] = mapped_column(sa.LargeBinary)
    day: Mapped[Any] = mapped_column(sa.Date)
    moment: Mapped[Any] = mapped_column(sa.DateTime)
    zoned: Mapped[Any] = mapped_column(sa.DateTime(timezone=True))
    clock: Mapped[Any] = mapped_column(sa.Time)
    span: Mapped[Any] = mapped_column(sa.Interval)
    uuid: Mapped[Any] = mapped_column(sa.Uuid)
    color: Mapped[Color] = mapped_column(sa.Enum(Color))
    word: Mapped[str] = mapped_column(sa.Enum("a", "b", "c", name="word"))
    flag: Mapped[bool] = mapped_column(sa.Boolean)
    pair: Mapped[str] = mapped_column(sa.Enum("a", "b", name="pair"))
    numbers: Mapped[Any] = mapped_column(postgresql.INT4RANGE)


GIVEN = ["flag", "pair", "numbers"]
CHOSEN = [each.key for each in sa.inspect(Row).column_attrs if each.key not in ("number", *GIVEN)]


@pytest.mark.parametrize("name", CHOSEN)
async def test_chosen(empty_database: str, name: str) -> None:
    """For each common type of a column the three values differ, and PostgreSQL returns them as they
    were written."""
    attribute = getattr(Row, name)
    rows = MappedRows(async_sessionmaker(), Row, key=Row.number, value=attribute)
    assert (rows.key, rows.value) == ("number", name)
    assert len(set(rows.values)) == 3
    assert MemoryRows(MemoryDatabase(), Row, key="number", value=name).values == rows.values
    engine = create_async_engine(empty_database)
    column = sa.Column("value", attribute.type)
    table = sa.Table("values", sa.MetaData(), sa.Column("id", sa.Integer), column)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(table.metadata.create_all)
            for number, value in enumerate(rows.values):
                await connection.execute(table.insert().values(id=number, value=value))
            found = [*(await connection.scalars(sa.select(table.c.value).order_by(table.c.id)))]
            if name == "char":
                found = [each.strip() for each in found]
            assert tuple(found) == rows.values
    finally:
        await engine.dispose()


@pytest.mark.parametrize("name", GIVEN)
def test_given(name: str) -> None:
    """For other types the values must be given, and the error says for which attribute."""
    with pytest.raises(ValueError, match=f"^values: give three values for Row.{name}"):
        MappedRows(async_sessionmaker(), Row, key="number", value=name)
    values = (1, 2, 3)
    assert MappedRows(
        async_sessionmaker(), Row, key="number", value=name, values=values
    ).values == (values)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"key": "nothing"}, ValueError),
        ({"key": Base}, TypeError),
        ({"value": "nothing"}, ValueError),
        ({"value": 7}, TypeError),
        ({"value": "text", "values": ("one", "two")}, ValueError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    """An attribute that the class does not have, and two values, are refused."""
    for make in (
        lambda **given: MappedRows(async_sessionmaker(), Row, **given),
        lambda **given: MemoryRows(MemoryDatabase(), Row, **given),
    ):
        with pytest.raises(error, match=f"^{list(arguments)[-1]}"):
            make(**{"key": "number"} | arguments)
