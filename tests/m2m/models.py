"""Mappings of every kind that a Many-to-Many relationship can have, and small tools for tests of
them."""

from __future__ import annotations

import enum
import itertools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from ipaddress import ip_address
from typing import Any

from sqlalchemy import (
    ARRAY,
    CHAR,
    Column,
    Date,
    DateTime,
    Enum,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    and_,
    event,
    func,
    select,
    text,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import (
    INET,
    INT4MULTIRANGE,
    INT4RANGE,
    INT8RANGE,
    JSONB,
    TSTZRANGE,
    Range,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, WriteOnlyMapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator


class Base(DeclarativeBase):
    pass


# -- plain, both sides, with attributes that are called otherwise than their columns


post_tag = Table(
    "m2m_post_tag",
    Base.metadata,
    Column("post", ForeignKey("m2m_post.post_id"), primary_key=True),
    Column("tag", ForeignKey("m2m_tag.tag_id"), primary_key=True),
)


class Post(Base):
    __tablename__ = "m2m_post"

    id: Mapped[int] = mapped_column("post_id", primary_key=True)
    title: Mapped[str] = mapped_column(default="")
    tags: Mapped[list[Tag]] = relationship(secondary=post_tag, back_populates="posts")
    seen: Mapped[list[Tag]] = relationship(secondary=post_tag, viewonly=True)
    tag_query: WriteOnlyMapped[Tag] = relationship(secondary=post_tag, overlaps="tags,posts")
    comments: Mapped[list[Comment]] = relationship()


class Tag(Base):
    __tablename__ = "m2m_tag"

    key: Mapped[int] = mapped_column("tag_id", primary_key=True)
    posts: Mapped[list[Post]] = relationship(
        secondary=post_tag, back_populates="tags", overlaps="tag_query"
    )


class Comment(Base):
    __tablename__ = "m2m_comment"

    id: Mapped[int] = mapped_column(primary_key=True)
    post_id: Mapped[int] = mapped_column(ForeignKey("m2m_post.post_id"))


# -- composite keys, one column of which both ends share


course_student = Table(
    "m2m_course_student",
    Base.metadata,
    Column("school", Integer, primary_key=True),
    Column("course", Integer, primary_key=True),
    Column("student", String(5), primary_key=True),
    ForeignKeyConstraint(["school", "course"], ["m2m_course.school", "m2m_course.number"]),
    ForeignKeyConstraint(["school", "student"], ["m2m_student.school", "m2m_student.name"]),
)


class Course(Base):
    __tablename__ = "m2m_course"

    number: Mapped[int] = mapped_column(primary_key=True)
    school: Mapped[int] = mapped_column(primary_key=True)
    students: Mapped[list[Student]] = relationship(
        secondary=course_student,
        primaryjoin=lambda: and_(
            Course.school == course_student.c.school, Course.number == course_student.c.course
        ),
        secondaryjoin=lambda: and_(
            Student.school == course_student.c.school, Student.name == course_student.c.student
        ),
        back_populates="courses",
    )


class Student(Base):
    __tablename__ = "m2m_student"

    school: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(5), primary_key=True)
    courses: Mapped[list[Course]] = relationship(
        secondary=course_student,
        primaryjoin=lambda: and_(
            Student.school == course_student.c.school, Student.name == course_student.c.student
        ),
        secondaryjoin=lambda: and_(
            Course.school == course_student.c.school, Course.number == course_student.c.course
        ),
        back_populates="students",
    )


composite_link = Table(
    "m2m_composite_link",
    Base.metadata,
    Column("b1", Integer, primary_key=True),
    Column("b2", String(4), primary_key=True),
    Column("a1", Integer, primary_key=True),
    Column("a2", Integer, primary_key=True),
    ForeignKeyConstraint(["a1", "a2"], ["m2m_composite_a.one", "m2m_composite_a.two"]),
    ForeignKeyConstraint(["b2", "b1"], ["m2m_composite_b.text", "m2m_composite_b.number"]),
)


class CompositeA(Base):
    __tablename__ = "m2m_composite_a"

    two: Mapped[int] = mapped_column(primary_key=True)
    one: Mapped[int] = mapped_column(primary_key=True)
    bs: Mapped[list[CompositeB]] = relationship(secondary=composite_link, back_populates="as_")
    __table_args__ = (UniqueConstraint("one", "two"),)


class CompositeB(Base):
    __tablename__ = "m2m_composite_b"

    number: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(4), primary_key=True)
    as_: Mapped[list[CompositeA]] = relationship(secondary=composite_link, back_populates="bs")
    __table_args__ = (UniqueConstraint("text", "number"),)


# -- self-referential, with a backref


friendship = Table(
    "m2m_follows",
    Base.metadata,
    Column("follower", ForeignKey("m2m_person.id"), primary_key=True),
    Column("followed", ForeignKey("m2m_person.id"), primary_key=True),
)


class Person(Base):
    __tablename__ = "m2m_person"

    id: Mapped[int] = mapped_column(primary_key=True)
    follows: Mapped[list[Person]] = relationship(
        secondary=friendship,
        primaryjoin=lambda: Person.id == friendship.c.follower,
        secondaryjoin=lambda: Person.id == friendship.c.followed,
        backref="followers",
    )


# -- extra columns


counter = itertools.count(1)

SINCE = datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=5, minutes=30)))


def pair_of(context: Any) -> str:
    row = context.get_current_parameters()
    return f"{row['box']}/{row['thing']}/{row['note']}"


box_thing = Table(
    "m2m_box_thing",
    Base.metadata,
    Column("box", ForeignKey("m2m_box.id"), primary_key=True),
    Column("thing", ForeignKey("m2m_thing.id"), primary_key=True),
    Column("note", Text, default="scalar"),
    Column("number", Integer, default=lambda: next(counter)),
    Column("pair", Text, default=pair_of),
    Column("at", DateTime(timezone=True), default=func.clock_timestamp()),
    Column("colour", Text, server_default="grey"),
    Column("serial", Integer, Identity(always=True)),
    Column("labels", ARRAY(Text), default=lambda: ["a", 'b"\\,{', None]),
    Column("payload", JSONB, default=lambda: {"a": [1, None]}),
    Column("ranges", ARRAY(INT4RANGE), default=lambda: [Range(1, 5), Range(empty=True), None]),
    Column("times", ARRAY(TSTZRANGE), default=lambda: [Range(SINCE, None, bounds="()")]),
    Column("spans", INT4MULTIRANGE, default=lambda: [Range(1, 3), Range(7, None)]),
    Column("no_spans", INT4MULTIRANGE, default=list),
    Column("plain", Text, key="plain_key"),
)


class Box(Base):
    __tablename__ = "m2m_box"

    id: Mapped[int] = mapped_column(primary_key=True)
    things: Mapped[list[Thing]] = relationship(secondary=box_thing, back_populates="boxes")


class Thing(Base):
    __tablename__ = "m2m_thing"

    id: Mapped[int] = mapped_column(primary_key=True)
    boxes: Mapped[list[Box]] = relationship(secondary=box_thing, back_populates="things")


# -- tables without a unique constraint on the pair, with another one, and with a surrogate key


loose = Table(
    "m2m_loose",
    Base.metadata,
    Column("box", ForeignKey("m2m_box.id")),
    Column("thing", ForeignKey("m2m_thing.id")),
)

noted = Table(
    "m2m_loose_noted",
    Base.metadata,
    Column("box", ForeignKey("m2m_box.id")),
    Column("thing", ForeignKey("m2m_thing.id")),
    Column("note", Text, server_default="new"),
)

ranked = Table(
    "m2m_ranked",
    Base.metadata,
    Column("id", Integer, primary_key=True),
    Column("box", ForeignKey("m2m_box.id"), nullable=False),
    Column("thing", ForeignKey("m2m_thing.id"), nullable=False),
    Column("rank", Integer, nullable=False),
    UniqueConstraint("box", "thing"),
    Index("m2m_ranked_rank", "box", "rank", unique=True),
)


class Shelf(Base):
    """The boxes again, with the tables above."""

    __table__ = Box.__table__
    loose: Mapped[list[Thing]] = relationship(secondary=loose)
    noted: Mapped[list[Thing]] = relationship(secondary=noted)
    ranked: Mapped[list[Thing]] = relationship(secondary=ranked)
    conditional: Mapped[list[Thing]] = relationship(
        secondary=box_thing,
        primaryjoin=lambda: and_(
            Shelf.__table__.c.id == box_thing.c.box, box_thing.c.colour == "red"
        ),
        overlaps="boxes,things",
    )


# -- an association table that is a class too, and that a third class shows


class Entry(Base):
    __tablename__ = "m2m_entry"

    pupil: Mapped[int] = mapped_column(ForeignKey("m2m_pupil.id"), primary_key=True)
    subject: Mapped[int] = mapped_column(ForeignKey("m2m_subject.id"), primary_key=True)
    term: Mapped[int] = mapped_column(ForeignKey("m2m_term.id"))
    mark: Mapped[int | None]


class Pupil(Base):
    __tablename__ = "m2m_pupil"

    id: Mapped[int] = mapped_column(primary_key=True)
    subjects: Mapped[list[Subject]] = relationship(
        secondary=Entry.__table__, overlaps="entries,pupils"
    )
    entries: Mapped[list[Entry]] = relationship(overlaps="subjects,pupils")


class Subject(Base):
    __tablename__ = "m2m_subject"

    id: Mapped[int] = mapped_column(primary_key=True)


class Term(Base):
    __tablename__ = "m2m_term"

    id: Mapped[int] = mapped_column(primary_key=True)
    pupils: Mapped[list[Pupil]] = relationship(secondary=Entry.__table__, viewonly=True)


# -- joined-table inheritance; the key of the joined table has a name of its own


car_driver = Table(
    "m2m_car_driver",
    Base.metadata,
    Column("car", ForeignKey("m2m_car.car_id"), primary_key=True),
    Column("driver", ForeignKey("m2m_driver.id"), primary_key=True),
)


class Vehicle(Base):
    __tablename__ = "m2m_vehicle"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "vehicle"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]


class Car(Vehicle):
    __tablename__ = "m2m_car"
    __mapper_args__ = {"polymorphic_identity": "car"}  # noqa: RUF012

    car_id: Mapped[int] = mapped_column(ForeignKey("m2m_vehicle.id"), primary_key=True)
    drivers: Mapped[list[Driver]] = relationship(secondary=car_driver, back_populates="cars")


class Taxi(Car):
    __mapper_args__ = {"polymorphic_identity": "taxi"}  # noqa: RUF012


class Driver(Base):
    __tablename__ = "m2m_driver"

    id: Mapped[int] = mapped_column(primary_key=True)
    cars: Mapped[list[Car]] = relationship(secondary=car_driver, back_populates="drivers")


# -- a reference to a unique column that is not the primary key


user_group = Table(
    "m2m_user_group",
    Base.metadata,
    Column("user_email", ForeignKey("m2m_user.email"), primary_key=True),
    Column("group_name", ForeignKey("m2m_group.name"), primary_key=True),
)


class User(Base):
    __tablename__ = "m2m_user"

    id: Mapped[int] = mapped_column(primary_key=True)
    mail: Mapped[str | None] = mapped_column("email", String(30), unique=True)
    groups: Mapped[list[Group]] = relationship(secondary=user_group, back_populates="users")


class Group(Base):
    __tablename__ = "m2m_group"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(30), unique=True)
    users: Mapped[list[User]] = relationship(secondary=user_group, back_populates="groups")


# -- another schema, names that need quotes


selection = Table(
    "Select",
    Base.metadata,
    Column("Order", ForeignKey("m2m_Schema.Group.User"), primary_key=True),
    Column("table", ForeignKey("m2m_tag.tag_id"), primary_key=True),
    schema="m2m_Schema",
)


class Reserved(Base):
    __tablename__ = "Group"
    __table_args__ = {"schema": "m2m_Schema"}  # noqa: RUF012

    user: Mapped[int] = mapped_column("User", primary_key=True)
    tags: Mapped[list[Tag]] = relationship(secondary=selection)


# -- types of keys


class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"


class Prefixed(TypeDecorator[str]):
    """Stored with a prefix that Python does not see."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else f"p-{value}"

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return None if value is None else value.removeprefix("p-")


class Lowered(TypeDecorator[str]):
    """Stored in lower case, by the database."""

    impl = String(20)
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> Any:
        return func.lower(bindparam, type_=String())


class Hexadecimal(TypeDecorator[bytes]):
    """Stored as hexadecimal text, by the database: encoded twice, it is another key."""

    impl = LargeBinary
    cache_ok = True

    def load_dialect_impl(self, dialect: Any) -> Any:
        return LargeBinary()

    def bind_expression(self, bindparam: Any) -> Any:
        return func.convert_to(func.encode(bindparam, "hex"), "UTF8", type_=LargeBinary())

    def column_expression(self, column: Any) -> Any:
        stored = func.convert_from(type_coerce(column, LargeBinary()), "UTF8")
        return type_coerce(func.decode(stored, "hex"), self)


class Numbers(TypeDecorator[tuple[int, ...]]):
    """An array behind a decorator."""

    impl = ARRAY(Integer, as_tuple=True)
    cache_ok = True


KEY_TYPES: dict[str, tuple[Any, list[Any]]] = {
    "uuid": (Uuid(), [uuid.UUID(int=1), uuid.UUID(int=2), uuid.UUID(int=3)]),
    "uuid_text": (Uuid(as_uuid=False), [str(uuid.UUID(int=number)) for number in (1, 2, 3)]),
    "native_enum": (Enum(Colour, name="m2m_colour"), [Colour.RED, Colour.GREEN]),
    "schema_enum": (Enum("a", "b", name="m2m Letter", schema="m2m_Schema"), ["a", "b"]),
    "text_enum": (Enum(Colour, native_enum=False), [Colour.RED, Colour.GREEN]),
    "decorated": (Prefixed(), ["a", "b", "c"]),
    "numeric": (Numeric(6, 2), [Decimal("1.50"), Decimal("2.00"), Decimal("-3.25")]),
    "date": (Date(), [date(2024, 2, 29), date(1999, 1, 1)]),
    "timestamp": (DateTime(), [datetime(2024, 1, 1, 12, 30, 0, 5), datetime(1970, 1, 1)]),
    "bytes": (LargeBinary(), [b"\x00\xff", b"", b"abc"]),
    "char": (CHAR(4), ["ab  ", "abcd"]),
    "varchar": (String(3), ["abc", 'ä,"', "'"]),
    "text": (Text(), ["", "\\", "{}"]),
    "interval": (Interval(), [timedelta(hours=30), timedelta(0), timedelta(microseconds=-1)]),
    "range": (INT8RANGE(), [Range(1, 5), Range(None, 1, bounds="()"), Range(5, 6)]),
    "inet": (INET(), [ip_address("10.0.0.1"), ip_address("::1")]),
    "float": (Float(), [1.5, float("inf"), -0.25]),
    "bind_expression": (Lowered(), ["a", "b", "c", "d"]),
    "variant": (String(20).with_variant(Lowered(), "postgresql"), ["a", "b", "c"]),
    "char_variant": (String(20).with_variant(CHAR(4), "postgresql"), ["a   ", "b   ", "c   "]),
    "hexadecimal": (Hexadecimal(), [b"a", b"b", b"\xff\x00", b""]),
    "array": (ARRAY(Integer, as_tuple=True), [(1, 2), (2,), (), (2, 1)]),
    "array_of_text": (ARRAY(Text, as_tuple=True), [("abcd", 'ä,"'), ("{}", "NULL")]),
    "decorated_array": (Numbers(), [(1,), (2, 3)]),
}
KEYED: dict[str, tuple[Any, Any, Table]] = {}

lamp_lamp = Table(
    "m2m_lamp_lamp",
    Base.metadata,
    Column("one", Lowered(), ForeignKey("m2m_lamp.id"), primary_key=True),
    Column("other", Lowered(), ForeignKey("m2m_lamp.id"), primary_key=True),
    Column("number", Integer, default=lambda: next(counter)),
)

loose_lamp = Table(
    "m2m_loose_lamp",
    Base.metadata,
    Column("one", Lowered(), ForeignKey("m2m_lamp.id")),
    Column("other", Lowered(), ForeignKey("m2m_lamp.id")),
    Column("number", Integer, default=lambda: next(counter)),
)

coded_lamp = Table(
    "m2m_coded_lamp",
    Base.metadata,
    Column("one", ForeignKey("m2m_lamp.code"), primary_key=True),
    Column("other", ForeignKey("m2m_lamp.code"), primary_key=True),
)


def _lamps(table: Table, column: str) -> Any:
    return relationship(
        "Lamp",
        secondary=table,
        primaryjoin=lambda: Lamp.__table__.c[column] == table.c.one,
        secondaryjoin=lambda: Lamp.__table__.c[column] == table.c.other,
    )


class Lamp(Base):
    """Keys in lower case, with a default for each row, without a constraint, and by a code."""

    __tablename__ = "m2m_lamp"

    id: Mapped[str] = mapped_column(Lowered(), primary_key=True)
    code: Mapped[str | None] = mapped_column(unique=True)
    others: Mapped[list[Lamp]] = _lamps(lamp_lamp, "id")
    loose: Mapped[list[Lamp]] = _lamps(loose_lamp, "id")
    coded: Mapped[list[Lamp]] = _lamps(coded_lamp, "code")


def _keyed(name: str, type_: Any) -> None:
    table = Table(
        f"m2m_keyed_link_{name}",
        Base.metadata,
        Column("left", type_, ForeignKey(f"m2m_keyed_left_{name}.id"), primary_key=True),
        Column("right", type_, ForeignKey(f"m2m_keyed_right_{name}.id"), primary_key=True),
    )
    right = type(
        f"Right_{name}",
        (Base,),
        {
            "__tablename__": f"m2m_keyed_right_{name}",
            "id": mapped_column(type_, primary_key=True, autoincrement=False),
        },
    )
    left = type(
        f"Left_{name}",
        (Base,),
        {
            "__tablename__": f"m2m_keyed_left_{name}",
            "id": mapped_column(type_, primary_key=True, autoincrement=False),
            "rights": relationship(right, secondary=table, backref="lefts"),
        },
    )
    KEYED[name] = (left, right, table)


for _name, (_type, _) in KEY_TYPES.items():
    _keyed(_name, _type)


_created: set[str] = set()


async def create(engine: AsyncEngine) -> None:
    """The tables, which stay: one by one they take seconds."""
    if str(engine.url) not in _created:
        async with engine.begin() as connection:
            await connection.execute(text('CREATE SCHEMA IF NOT EXISTS "m2m_Schema"'))
            await connection.run_sync(Base.metadata.create_all)
        _created.add(str(engine.url))


async def empty(engine: AsyncEngine) -> None:
    """Truncate the tables that have rows."""
    async with engine.begin() as connection:
        format_table = connection.dialect.identifier_preparer.format_table
        names = [format_table(table) for table in Base.metadata.sorted_tables]
        looks = (f"SELECT {at} WHERE EXISTS (SELECT FROM {n})" for at, n in enumerate(names))
        found = await connection.scalars(text(" UNION ALL ".join(looks)))
        if filled := [names[at] for at in found]:
            await connection.execute(text(f"TRUNCATE {', '.join(filled)} RESTART IDENTITY CASCADE"))


async def pairs(session: AsyncSession, table: Table) -> set[tuple[Any, ...]]:
    """All rows of an association table. A pair that is there twice fails the test."""
    found = [tuple(row) for row in await session.execute(select(table))]
    assert len(set(found)) == len(found)
    return set(found)


async def ids(session: AsyncSession, statement: Select[Any]) -> list[Any]:
    return list((await session.scalars(statement)).all())


class Statements(list[tuple[str, Any]]):
    """What an engine was asked to execute."""

    @property
    def verbs(self) -> list[str]:
        return [statement.split()[0] for statement, _ in self]


@contextmanager
def recorded(engine: AsyncEngine) -> Iterator[Statements]:
    statements = Statements()

    def before(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        statements.append((statement, parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", before)
    try:
        yield statements
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", before)
