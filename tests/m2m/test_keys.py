"""Keys: which are refused, and which are one key in several spellings, for both ends alike."""

from __future__ import annotations

import enum
import uuid
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import inspect, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from pgtoolset import get_transaction, m2m_add, m2m_add_many, m2m_remove, m2m_set
from tests.m2m.models import (
    KEY_TYPES,
    KEYED,
    Colour,
    CompositeA,
    Group,
    Lamp,
    Post,
    Tag,
    User,
    composite_link,
    lamp_lamp,
    pairs,
    post_tag,
    recorded,
    user_group,
)


class Number(enum.IntEnum):
    ONE = 1


#: Keys of a 32-bit integer that `AsyncSession.get` would not find exactly.
WRONG_KEYS: list[tuple[Any, type[Exception]]] = [
    (1.5, TypeError),
    (1.0, TypeError),
    (True, TypeError),
    ("x", TypeError),
    ("1", TypeError),
    (b"1", TypeError),
    (Decimal(1), TypeError),
    (2**31, ValueError),
    (2**40, ValueError),
    (-(2**31) - 1, ValueError),
    (None, ValueError),
    ((1, 2), ValueError),
    ((), ValueError),
    ((True,), TypeError),
    ({1}, TypeError),
    ({"nothing": 1}, ValueError),
    ("postgresql://user:secret@host/database", TypeError),
]


@pytest.mark.parametrize(("key", "error"), WRONG_KEYS)
async def test_refused(
    session: AsyncSession, engine: AsyncEngine, key: Any, error: type[Exception]
) -> None:
    """A key that is not exactly one of its column is refused before any SQL, by argument."""
    post = Post(id=1)
    session.add_all([post, Tag(key=1)])
    await session.commit()
    session.add(Tag(key=2))  # a flush would be SQL
    with recorded(engine) as statements:
        for call in (m2m_add, m2m_remove, m2m_set):
            for keys in ([key], [1, key], [1] * 1000 + [key]):
                with pytest.raises(error, match=r"^pks: ") as caught:
                    await call(session, post, Post.tags, pks=keys)
                assert "secret" not in str(caught.value)
        for link in ((post, key), (1, key), (key, 1)):
            for links in ([link], [(1, 1), link]):
                with pytest.raises(error, match=r"^links: ") as caught:
                    await m2m_add_many(session, Post.tags, links)
                assert "secret" not in str(caught.value)
    assert statements == []
    await session.rollback()
    assert await pairs(session, post_tag) == set()


async def test_refused_where_a_unique_column_is_referenced(
    session: AsyncSession, engine: AsyncEngine
) -> None:
    """The same where the keys are only used to read another column."""
    user = User(id=1, mail="1@x")
    session.add_all([user, Group(id=1, name="g1")])
    await session.commit()
    with recorded(engine) as statements:
        for call in (m2m_add, m2m_remove, m2m_set):
            with pytest.raises(TypeError, match=r"^pks: Group\.id is an integer, not 1\.5"):
                await call(session, user, User.groups, pks=[1, 1.5])
        with pytest.raises(ValueError, match=r"^links: User\.id is an integer of 32 bits"):
            await m2m_add_many(session, User.groups, [(2**40, 1)])
    assert statements == []
    assert await m2m_add(session, user, User.groups, pks=[{"id": 1}, 1, (1,)]) == 1
    assert await pairs(session, user_group) == {("1@x", "g1")}


async def test_mappings(session: AsyncSession) -> None:
    """A key may be a mapping of attribute names, as everywhere, and counts once with the others."""
    session.add_all([Post(id=1), Tag(key=1), Tag(key=2)])
    await session.commit()
    post = await session.get_one(Post, 1)
    assert await m2m_add(session, post, Post.tags, pks=[{"key": 1}, 1, (1,), [1], Number.ONE]) == 1
    assert await m2m_add_many(session, Post.tags, [({"id": 1}, {"key": 2}), (post, 2)]) == 1
    assert await m2m_remove(session, post, Post.tags, pks=[{"key": 1}]) == 1
    assert await pairs(session, post_tag) == {(1, 2)}
    a = CompositeA(two=2, one=1)
    session.add(a)
    for key in ({"number": 1, "text": "x"}, {"text": "x", "number": 1}):
        with pytest.raises(IntegrityError):  # there is no such row; the columns are in their places
            async with get_transaction(session):
                await m2m_add(session, a, CompositeA.bs, pks=[key, (1, "x")])
    with pytest.raises(ValueError, match=r"^pks: .* 2 columns \(number, text\)"):
        await m2m_add(session, a, CompositeA.bs, pks=[{"number": 1}])
    assert await pairs(session, composite_link) == set()


_ID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")

#: Spellings of one key, by the name of a type in `KEY_TYPES`; the first is the one that is stored.
SPELLINGS: dict[str, list[Any]] = {
    "bind_expression": ["a", "A", ("A",), {"id": "A"}],
    "variant": ["a", "A"],
    "hexadecimal": [b"a", (b"a",)],
    "uuid": [_ID, str(_ID), str(_ID).upper(), _ID.hex],
    "uuid_text": [str(_ID), str(_ID).upper(), _ID, _ID.hex],
    "array": [(1, 2), [1, 2], ([1, 2],), {"id": [1, 2]}],
    "array_of_text": [("a", "b"), ["a", "b"]],
    "decorated_array": [(1,), [1], ((1,),)],
    "native_enum": [Colour.RED, "RED"],
    "char": ["ab  ", "ab"],
    "numeric": [Decimal("1.50"), Decimal("1.5"), 1.5],
    "decorated": ["a", ("a",)],
}


@pytest.mark.parametrize("name", SPELLINGS)
async def test_spellings(session: AsyncSession, name: str) -> None:
    """Set semantics hold whatever the spelling of a key, for all functions and from both sides."""
    left, right, table = KEYED[name]
    key, *_ = keys = SPELLINGS[name]
    other = KEY_TYPES[name][1][-1]
    owner, related = left(id=key), right(id=key)
    session.add_all([owner, related, left(id=other), right(id=other)])
    await session.flush()
    for this, attribute, that in ((owner, left.rights, related), (related, right.lefts, owner)):
        assert await m2m_add(session, this, attribute, that, pks=keys) == 1
        assert await m2m_add(session, this, attribute, pks=keys, ignore_conflicts=True) == 0
        assert len(await pairs(session, table)) == 1
        for each in keys:
            assert await m2m_set(session, this, attribute, pks=[each]) == (0, 0)
            added = await m2m_add(session, this, attribute, pks=[each], ignore_conflicts=True)
            assert added == 0
            with pytest.raises(IntegrityError):
                async with get_transaction(session):
                    await m2m_add(session, this, attribute, pks=[each])
        assert await m2m_set(session, this, attribute, pks=[*keys, other]) == (1, 0)
        assert await m2m_set(session, this, attribute, pks=keys) == (0, 1)
        links = [(one, another) for one in keys for another in keys]
        assert await m2m_add_many(session, attribute, links, ignore_conflicts=True) == 0
        assert await m2m_remove(session, this, attribute, pks=keys[-1:]) == 1
        assert await m2m_add_many(session, attribute, links) == 1
        assert await m2m_remove(session, this, attribute, that, pks=keys) == 1
        assert await m2m_remove(session, this, attribute, pks=keys) == 0
        assert await pairs(session, table) == set()


@pytest.mark.parametrize("name", SPELLINGS)
async def test_loaded_collections(session: AsyncSession, name: str) -> None:
    """A collection that is loaded is expired, in whatever spelling the key of its owner was."""
    left, right, _ = KEYED[name]
    key, *_ = keys = SPELLINGS[name]
    owner, related = left(id=key), right(id=key)
    session.add_all([owner, related])
    await session.flush()

    async def check(*expected: Any) -> None:
        for instance, attribute in ((owner, "rights"), (related, "lefts")):
            if attribute in inspect(instance).unloaded:
                await session.refresh(instance, [attribute])
            assert list(getattr(instance, attribute)) == list(expected) or len(expected) == 2

    await session.refresh(owner, ["rights"])
    await session.refresh(related, ["lefts"])
    for each in keys:
        await m2m_add(session, owner, left.rights, pks=[each])
        assert "rights" in inspect(owner).unloaded and "lefts" in inspect(related).unloaded
        await check(related, owner)
        await m2m_set(session, owner, left.rights)
        assert "rights" in inspect(owner).unloaded and "lefts" in inspect(related).unloaded
        await check()
        await m2m_add_many(session, left.rights, [(each, each)])
        assert "rights" in inspect(owner).unloaded and "lefts" in inspect(related).unloaded
        await check(related, owner)
        await m2m_remove(session, related, right.lefts, pks=[each])
        assert "rights" in inspect(owner).unloaded and "lefts" in inspect(related).unloaded
        await check()


async def test_an_identity_in_another_spelling(session: AsyncSession) -> None:
    """An instance whose identity is not what PostgreSQL has stored is the stored row."""
    left, right, table = KEYED["bind_expression"]
    owner, related = left(id="A"), right(id="B")
    session.add_all([owner, related])
    await session.flush()
    assert inspect(owner).identity == ("A",)
    assert await m2m_add(session, owner, left.rights, related, pks=["b", "B"]) == 1
    assert await pairs(session, table) == {("a", "b")}
    assert await m2m_set(session, owner, left.rights, pks=["b"]) == (0, 0)
    assert await m2m_set(session, related, right.lefts, owner) == (0, 0)
    assert await m2m_add_many(session, left.rights, [(owner, "b")], ignore_conflicts=True) == 0
    assert await m2m_remove(session, owner, left.rights, related) == 1


async def test_spellings_and_defaults_for_each_row(session: AsyncSession) -> None:
    """Duplicates in two spellings count once where each row has a Python-side default too."""
    lamps = [Lamp(id=name) for name in "abc"]
    session.add_all(lamps)
    await session.flush()
    lamp = lamps[0]
    assert await m2m_add(session, lamp, Lamp.others, pks=["b", "B", "c"]) == 2
    assert await m2m_set(session, lamp, Lamp.others, pks=["B", "b"]) == (0, 1)
    links = [("A", "b"), ("a", "B"), ("b", "C"), ("B", "c")]
    assert await m2m_add_many(session, Lamp.others, links, ignore_conflicts=True) == 1
    rows = (await session.execute(select(lamp_lamp.c.one, lamp_lamp.c.other))).all()
    assert sorted(map(tuple, rows)) == [("a", "b"), ("b", "c")]
    assert await m2m_set(session, lamp, Lamp.loose, pks=["B", "b"]) == (1, 0)
    assert await m2m_set(session, lamp, Lamp.loose, pks=["C", "b", "c"]) == (1, 0)
    assert await m2m_add(session, lamp, Lamp.loose, pks=["B", "C"], ignore_conflicts=True) == 0
    assert await m2m_set(session, lamp, Lamp.loose, pks=["C"], keep_existing=True) == (0, 1)
    assert await m2m_remove(session, lamp, Lamp.loose, pks=["C"]) == 1


async def test_keys_that_read_another_column(session: AsyncSession) -> None:
    """A key in another spelling reads the unique column that the association table refers to."""
    lamps = [Lamp(id=name, code=name * 2) for name in "ab"]
    session.add_all(lamps)
    await session.flush()
    assert await m2m_add(session, lamps[0], Lamp.coded, pks=["B", "b", "A"]) == 2
    assert await m2m_add_many(session, Lamp.coded, [("B", "A"), (lamps[1], "a")]) == 1
    assert await m2m_remove(session, lamps[0], Lamp.coded, pks=["B"]) == 1
    assert await m2m_set(session, lamps[0], Lamp.coded, lamps[0]) == (0, 0)


async def test_a_longer_key_is_not_cut_off(session: AsyncSession) -> None:
    """A key that is longer than its column is not taken for the row that begins like it."""
    left, right, table = KEYED["varchar"]
    owner = left(id="abc")
    session.add_all([owner, right(id="abc")])
    await m2m_add(session, owner, left.rights, pks=["abc"])
    assert await m2m_remove(session, owner, left.rights, pks=["abcd"]) == 0
    assert len(await pairs(session, table)) == 1
