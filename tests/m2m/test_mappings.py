"""Whatever the mapping: composite keys, self-reference, inheritance, schemas, types of keys, extra
columns."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql import Range
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.schema import CreateTable

from pgtoolset import RowNotFoundError, get_transaction, m2m_add, m2m_add_many, m2m_remove, m2m_set
from tests.m2m.models import (
    KEY_TYPES,
    KEYED,
    SINCE,
    Box,
    Car,
    CompositeA,
    CompositeB,
    Course,
    Driver,
    Group,
    Person,
    Post,
    Reserved,
    Student,
    Tag,
    Taxi,
    Thing,
    User,
    box_thing,
    car_driver,
    composite_link,
    course_student,
    friendship,
    pairs,
    recorded,
    selection,
    user_group,
)


async def test_composite_keys(session: AsyncSession) -> None:
    """Tuples in the mapper's order, whatever the order of the association table's columns."""
    a, other = CompositeA(two=2, one=1), CompositeA(two=1, one=2)
    bs = [CompositeB(number=number, text=letter) for number in (1, 2) for letter in "xy"]
    session.add_all([a, other, *bs])
    await session.commit()
    assert await m2m_add(session, a, CompositeA.bs, bs[0], pks=[(1, "y"), (1, "x")]) == 2
    assert await pairs(session, composite_link) == {(1, "x", 1, 2), (1, "y", 1, 2)}
    assert await m2m_set(session, a, CompositeA.bs, pks=[(1, "y"), (2, "x")]) == (1, 1)
    assert await m2m_add_many(session, CompositeA.bs, [((1, 2), (2, "y")), (other, bs[3])]) == 1
    assert await m2m_remove(session, bs[1], CompositeB.as_, a, pks=[(2, 1)]) == 1
    assert await pairs(session, composite_link) == {(2, "x", 1, 2), (2, "y", 2, 1)}


async def test_a_column_of_both_keys(session: AsyncSession) -> None:
    """A column that both ends share is written once, and both must agree on it."""
    session.add_all(
        [Course(school=1, number=7), Student(school=1, name="ann"), Student(school=2, name="bob")]
    )
    await session.commit()
    course = await session.get_one(Course, (7, 1))
    assert await m2m_add(session, course, Course.students, pks=[(1, "ann")]) == 1
    assert await pairs(session, course_student) == {(1, 7, "ann")}
    assert await m2m_set(session, course, Course.students, pks=[(1, "ann")]) == (0, 0)
    with pytest.raises(ValueError, match=r"^pks: .*share the column school"):
        await m2m_add(session, course, Course.students, pks=[(2, "bob")])
    with pytest.raises(ValueError, match=r"^links: .*share the column school"):
        await m2m_add_many(session, Course.students, [(course, (2, "bob"))])
    assert await m2m_set(session, course, Course.students) == (0, 1)


async def test_self_reference(session: AsyncSession) -> None:
    """In both directions, the backref's side included, and to oneself."""
    people = [Person(id=number) for number in (1, 2, 3)]
    session.add_all(people)
    await session.commit()
    one, two, three = people
    followers: Any = Person.followers  # type: ignore[attr-defined]
    assert await m2m_add(session, one, Person.follows, two, three, one) == 3
    assert await m2m_add(session, one, followers, two) == 1
    assert await pairs(session, friendship) == {(1, 1), (1, 2), (1, 3), (2, 1)}
    assert await m2m_set(session, one, followers, three) == (1, 2)
    assert await m2m_remove(session, one, Person.follows, two) == 1
    assert await pairs(session, friendship) == {(1, 3), (3, 1)}


async def test_joined_inheritance(session: AsyncSession, engine: AsyncEngine) -> None:
    """A subclass of the owner, whose key has a name of its own in the joined table; nothing is
    looked up for it."""
    taxi, car, driver = Taxi(id=1), Car(id=2), Driver(id=1)
    session.add_all([taxi, car, driver])
    await session.commit()
    session.expire_all()
    with recorded(engine) as statements:
        assert await m2m_add(session, taxi, Car.drivers, driver) == 1
        assert await m2m_add(session, taxi, Taxi.drivers, driver, ignore_conflicts=True) == 0
        assert await m2m_set(session, driver, Driver.cars, taxi, pks=[2]) == (1, 0)
    assert statements.verbs == ["INSERT", "SELECT", "INSERT", "SELECT", "WITH"]
    assert await pairs(session, car_driver) == {(1, 1), (2, 1)}


async def test_unique_column_in_place_of_the_key(
    session: AsyncSession, engine: AsyncEngine
) -> None:
    """A referenced column that is not the key is taken where it is loaded, and fetched by one
    SELECT otherwise."""
    users = [User(id=number, mail=f"{number}@x") for number in (1, 2)]
    groups = [Group(id=number, name=f"g{number}") for number in (1, 2, 3)]
    session.add_all([*users, *groups, User(id=3)])
    await session.commit()
    with recorded(engine) as statements:
        assert await m2m_add(session, users[0], User.groups, *groups[:2]) == 2
    assert statements.verbs == ["INSERT"]
    session.expire_all()
    with recorded(engine) as statements:
        assert await m2m_add(session, users[1], User.groups, groups[0], pks=[2, 3, 1]) == 3
    assert statements.verbs == ["SELECT", "SELECT", "INSERT"]
    assert await m2m_set(session, groups[2], Group.users, pks=[1]) == (1, 1)
    assert (
        await m2m_add_many(
            session, User.groups, [(2, groups[2]), (users[0], 3)], ignore_conflicts=True
        )
        == 1
    )
    assert await m2m_remove(session, users[0], User.groups, pks=[1]) == 1
    expected = {("1@x", "g2"), ("1@x", "g3"), ("2@x", "g1"), ("2@x", "g2"), ("2@x", "g3")}
    assert await pairs(session, user_group) == expected
    with pytest.raises(RowNotFoundError, match="no Group with the primary key 99"):
        await m2m_add(session, users[0], User.groups, pks=[1, 99])
    with pytest.raises(ValueError, match="is NULL"):
        await m2m_add(session, groups[0], Group.users, pks=[3])


async def test_schema_and_reserved_names(session: AsyncSession) -> None:
    """Another schema, names in mixed case and reserved words."""
    session.add_all([Reserved(user=1), Tag(key=1), Tag(key=2)])
    await session.commit()
    owner = await session.get_one(Reserved, 1)
    assert await m2m_add(session, owner, Reserved.tags, pks=[1]) == 1
    assert await m2m_set(session, owner, Reserved.tags, pks=[2]) == (1, 1)
    assert await m2m_add_many(session, Reserved.tags, [(1, 1), (1, 2)], ignore_conflicts=True) == 1
    assert await m2m_remove(session, owner, Reserved.tags, pks=[1]) == 1
    assert await pairs(session, selection) == {(1, 2)}


async def test_schema_translate_map(engine: AsyncEngine, session: AsyncSession) -> None:
    """Tables are where schema_translate_map says, the owner that is locked included."""
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA IF EXISTS m2m_tenant CASCADE"))
        await connection.execute(text("CREATE SCHEMA m2m_tenant"))
        tenant = await connection.execution_options(
            schema_translate_map={"m2m_Schema": "m2m_tenant", None: "m2m_tenant"}
        )
        for table in (Tag.__table__, Reserved.__table__, selection):
            await tenant.execute(CreateTable(table))  # type: ignore[arg-type]
    translated = engine.execution_options(
        schema_translate_map={"m2m_Schema": "m2m_tenant", None: "m2m_tenant"}
    )
    async with AsyncSession(translated) as other, get_transaction(other):
        owner = Reserved(user=1)
        other.add_all([owner, Tag(key=1), Tag(key=2)])
        assert await m2m_add(other, owner, Reserved.tags, pks=[1]) == 1
        assert await m2m_set(other, owner, Reserved.tags, pks=[2]) == (1, 1)
        assert await pairs(other, selection) == {(1, 2)}
    assert await pairs(session, selection) == set()
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA m2m_tenant CASCADE"))


@pytest.mark.parametrize("name", KEY_TYPES)
async def test_types_of_keys(session: AsyncSession, name: str) -> None:
    """Keys of every type travel in arrays as they do alone."""
    left, right, table = KEYED[name]
    values = KEY_TYPES[name][1]
    owner = left(id=values[0])
    related = [right(id=value) for value in values]
    session.add_all([owner, *related])
    await session.flush()
    assert await m2m_add(session, owner, left.rights, *related[1:], pks=values[:1]) == len(values)
    assert await pairs(session, table) == {(values[0], value) for value in values}
    assert await m2m_set(session, owner, left.rights, related[0]) == (0, len(values) - 1)
    assert await m2m_set(session, owner, left.rights, *related) == (len(values) - 1, 0)
    links = [(values[0], value) for value in values]
    assert await m2m_add_many(session, left.rights, links, ignore_conflicts=True) == 0
    assert await m2m_remove(session, related[0], right.lefts, owner) == 1
    assert await m2m_remove(session, owner, left.rights, pks=values) == len(values) - 1


async def rows(session: AsyncSession) -> dict[int, Any]:
    found = await session.execute(select(box_thing).order_by(box_thing.c.thing))
    return {row.thing: row for row in found}


async def stored(session: AsyncSession) -> tuple[Box, list[Thing]]:
    box, things = Box(id=1), [Thing(id=number) for number in (1, 2, 3)]
    session.add_all([box, *things])
    await session.commit()
    return box, things


async def test_defaults(session: AsyncSession) -> None:
    """Python-side defaults are evaluated once per row, in the context of the row; the server's own
    as well."""
    box, things = await stored(session)
    assert await m2m_add(session, box, Box.things, *things) == 3
    found = await rows(session)
    assert {row.note for row in found.values()} == {"scalar"}
    assert {row.colour for row in found.values()} == {"grey"}
    assert (
        len({row.number for row in found.values()})
        == len({row.serial for row in found.values()})
        == 3
    )
    assert len({row.at for row in found.values()}) == 3
    assert [row.pair for row in found.values()] == ["1/1/scalar", "1/2/scalar", "1/3/scalar"]
    assert {tuple(row.labels) for row in found.values()} == {("a", 'b"\\,{', None)}
    assert [row.payload for row in found.values()] == [{"a": [1, None]}] * 3
    for row in found.values():
        assert row.ranges == [Range(1, 5), Range(empty=True), None]
        assert row.times == [Range(SINCE, None, bounds="()")]
        assert list(row.spans) == [Range(1, 3), Range(7, None)] and list(row.no_spans) == []


async def test_values(session: AsyncSession) -> None:
    """values= goes into every row, and what it names has no default."""
    box, things = await stored(session)
    values = {
        "note": "given",
        "number": 7,
        "labels": ["x", "y"],
        "payload": [1],
        "plain": "p",
        "colour": None,
    }
    assert await m2m_add(session, box, Box.things, *things[:2], values=values) == 2
    assert await m2m_add_many(session, Box.things, [(1, 3)], values=values) == 1
    for row in (await rows(session)).values():
        assert row.note == "given" and row.number == 7 and row.labels == ["x", "y"]
        assert row.payload == [1] and row.plain_key == "p" and row.colour is None
        assert row.pair == f"1/{row.thing}/given"


async def test_rewriting(session: AsyncSession) -> None:
    """Rows that stay are as if inserted anew, unless keep_existing; they count as neither added nor
    removed."""
    box, (one, two, three) = await stored(session)
    await m2m_add(
        session, box, Box.things, one, two, values={"note": "old", "colour": "red", "plain": "p"}
    )
    before = await rows(session)
    assert await m2m_set(
        session, box, Box.things, two, three, values={"note": "new"}, keep_existing=True
    ) == (1, 1)
    kept = await rows(session)
    assert kept[2] == before[2] and kept[3].note == "new" and 1 not in kept
    assert await m2m_set(session, box, Box.things, two, three, values={"note": "newer"}) == (0, 0)
    rewritten = await rows(session)
    for row in rewritten.values():
        assert row.note == "newer" and row.colour == "grey" and row.plain_key is None
    assert rewritten[2].number > kept[2].number and rewritten[2].at > kept[2].at
    assert rewritten[2].serial > kept[3].serial and rewritten[2].pair == "1/2/newer"
    assert await m2m_set(session, box, Box.things) == (0, 2)


async def test_key_of_a_pending_change(session: AsyncSession) -> None:
    """A primary key that was changed and not flushed yet is the new one."""
    post = Post(id=1)
    session.add_all([post, Tag(key=1)])
    await session.commit()
    post.id = 2
    assert await m2m_add(session, post, Post.tags, pks=[1]) == 1
    assert await m2m_remove(session, post, Post.tags, pks=[1]) == 1
