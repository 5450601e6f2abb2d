"""Tables whose keys are SMALLINT, the one type whose operators are not planted."""

from __future__ import annotations

import itertools
from typing import Any

from sqlalchemy import Column, ForeignKey, MetaData, SmallInteger, String, Table, func, type_coerce
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

numbers = itertools.count(1)


class Base(DeclarativeBase):
    metadata = MetaData()


class Absolute(TypeDecorator[int]):
    """A key that an expression finds: -1 is 1."""

    impl = SmallInteger
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> Any:
        return type_coerce(func.pg_catalog.abs(type_coerce(bindparam, SmallInteger)), self)


def _key(type_: Any = SmallInteger) -> Any:
    return mapped_column(type_, primary_key=True, autoincrement=False)


book_tag = Table(
    "book_tag",
    Base.metadata,
    Column("book_id", SmallInteger, ForeignKey("book.id"), primary_key=True),
    Column("tag_id", SmallInteger, ForeignKey("tag.id"), primary_key=True),
)
loose_tag = Table(
    "loose_tag",
    Base.metadata,
    Column("book_id", SmallInteger, ForeignKey("book.id")),
    Column("tag_id", SmallInteger, ForeignKey("tag.id")),
)
noted_tag = Table(
    "noted_tag",
    Base.metadata,
    Column("book_id", SmallInteger, ForeignKey("book.id"), primary_key=True),
    Column("tag_id", SmallInteger, ForeignKey("tag.id"), primary_key=True),
    Column("note", String, default="by hand"),
    Column("number", SmallInteger, default=lambda: next(numbers) % 1000),
)
seat_tag = Table(
    "seat_tag",
    Base.metadata,
    Column("row", SmallInteger, ForeignKey("seat_number.row"), primary_key=True),
    Column("tag_id", SmallInteger, ForeignKey("tag.id"), primary_key=True),
)


class Tag(Base):
    __tablename__ = "tag"

    id: Mapped[int] = _key()


class Book(Base):
    __tablename__ = "book"

    id: Mapped[int] = _key()
    title: Mapped[str] = mapped_column(default="")
    tags: Mapped[list[Tag]] = relationship(secondary=book_tag, lazy="raise")
    loose: Mapped[list[Tag]] = relationship(secondary=loose_tag, lazy="raise")
    noted: Mapped[list[Tag]] = relationship(secondary=noted_tag, lazy="raise")


class Seat(Base):
    """The association table refers to a unique column that is not the key."""

    __tablename__ = "seat_number"

    id: Mapped[int] = _key()
    row: Mapped[int] = mapped_column(SmallInteger, unique=True)
    tags: Mapped[list[Tag]] = relationship(secondary=seat_tag, lazy="raise")


class Pair(Base):
    __tablename__ = "pair"

    a: Mapped[int] = _key()
    b: Mapped[int] = _key()
    name: Mapped[str] = mapped_column(default="")


class Given(Base):
    __tablename__ = "given"

    id: Mapped[int] = _key(Absolute())
    name: Mapped[str] = mapped_column(default="")
