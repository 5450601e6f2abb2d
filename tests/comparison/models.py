"""The tables of the programs: those of observe.py, and those that create_tables adds."""

from sqlalchemy import Column, ForeignKey, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from tests.comparison.stacks import Stack, plain


class Base(DeclarativeBase):
    pass


item_tag = Table(
    "item_tag",
    Base.metadata,
    Column("item_id", ForeignKey("item.id"), primary_key=True),
    Column("tag_id", ForeignKey("tag.id"), primary_key=True),
)


class Tag(Base):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    tags: Mapped[list[Tag]] = relationship(secondary=item_tag)


class Order(Base):
    """A table whose name is a word of SQL."""

    __tablename__ = "order"

    id: Mapped[int] = mapped_column(primary_key=True)


class Part(Base):
    """A table for locks, with a name that needs no quotes."""

    __tablename__ = "part"

    id: Mapped[int] = mapped_column(primary_key=True)


def create_tables(stack: Stack, rows: int = 3) -> None:
    """Create the tables of the classes, an item, and tags."""
    with plain(stack.url) as connection:
        connection.execute(
            "CREATE TABLE tag (id int PRIMARY KEY);"
            'CREATE TABLE "order" (id int PRIMARY KEY);'
            "CREATE TABLE item_tag (item_id int REFERENCES item, tag_id int REFERENCES tag,"
            " PRIMARY KEY (item_id, tag_id));"
            "INSERT INTO item VALUES (1, 'new');"
        )
        connection.execute("INSERT INTO tag SELECT generate_series(1, %s)", [rows])
