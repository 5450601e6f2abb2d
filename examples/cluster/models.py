"""The tables of the application under load."""

from sqlalchemy import BigInteger, Identity, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Entry(Base):
    """One write. Its id is deliberately not unique: a write that was done twice is there twice."""

    __tablename__ = "entry"

    number: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    write: Mapped[str] = mapped_column(Text, index=True)
    counter: Mapped[str | None] = mapped_column(Text)


class Counter(Base):
    """A number that is read, and written one higher, under a lock."""

    __tablename__ = "counter"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger, default=0)


class Beat(Base):
    """A number that rises and is watched."""

    __tablename__ = "beat"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger, default=0)
