"""Any sequence of calls and rolled-back savepoints does to the table what it does to a set of
pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import inspect, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import selectinload

from pgtoolset import M2MChange, get_transaction, m2m_add, m2m_add_many, m2m_remove, m2m_set
from tests.m2m import models
from tests.support import examples

SIZE = 4


def plainly(key: Any, how: int) -> Any:
    """A key as it is, and with the tuple around it that every key can have."""
    return (key,) if how % 2 and not isinstance(key, tuple) else key


@dataclass(frozen=True)
class Shape:
    """A mapping, the keys of its instances by number, and the pair of numbers of a row.

    `owner_spelling` and `related_spelling` give a key in one of its spellings, chosen by a number.
    """

    owner: Any
    attribute: str
    related: Any
    reverse: str | None
    owner_keys: list[Any]
    related_keys: list[Any]
    table: Any
    columns: tuple[str, ...]
    owner_spelling: Callable[[Any, int], Any] = plainly
    related_spelling: Callable[[Any, int], Any] = plainly


def keyed(name: str, keys: list[Any], spelling: Callable[[Any, int], Any]) -> Shape:
    """The mapping with keys of a type in `KEY_TYPES`."""
    left, right, table = models.KEYED[name]
    columns = ("left", "right")
    return Shape(left, "rights", right, "lefts", keys, keys, table, columns, spelling, spelling)


numbers = list(range(1, SIZE + 1))
composite_b = [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
SHAPES = {
    "plain": Shape(
        models.Post, "tags", models.Tag, "posts", numbers, numbers, models.post_tag, ("post", "tag")
    ),
    "composite": Shape(
        models.CompositeA,
        "bs",
        models.CompositeB,
        "as_",
        [(1, 2), (2, 1), (2, 2), (3, 3)],
        composite_b,
        models.composite_link,
        ("a2", "a1", "b1", "b2"),
        lambda key, how: (key, {"one": key[1], "two": key[0]}, list(key))[how % 3],
        lambda key, how: (key, {"text": key[1], "number": key[0]}, list(key))[how % 3],
    ),
    "self-referential": Shape(
        models.Person,
        "follows",
        models.Person,
        "followers",
        numbers,
        numbers,
        models.friendship,
        ("follower", "followed"),
    ),
    "extra columns": Shape(
        models.Box,
        "things",
        models.Thing,
        "boxes",
        numbers,
        numbers,
        models.box_thing,
        ("box", "thing"),
    ),
    "no unique constraint": Shape(
        models.Shelf, "loose", models.Thing, None, numbers, numbers, models.loose, ("box", "thing")
    ),
    "lower case": keyed(
        "bind_expression",
        list("abcd"),
        lambda key, how: (key, key.upper(), (key.upper(),))[how % 3],
    ),
    "lower case, with a default for each row": Shape(
        models.Lamp,
        "others",
        models.Lamp,
        None,
        list("abcd"),
        list("abcd"),
        models.lamp_lamp,
        ("one", "other"),
        lambda key, how: (key, key.upper())[how % 2],
        lambda key, how: (key, key.upper())[how % 2],
    ),
    "hexadecimal": keyed("hexadecimal", [b"a", b"", b"61", b"\xff"], plainly),
    "UUID": keyed(
        "uuid",
        [UUID(int=number) for number in numbers],
        lambda key, how: (key, str(key), key.hex, {"id": str(key)})[how % 4],
    ),
    "array": keyed(
        "array",
        [((),), ((1,),), ((1, 2),), ((2, 1),)],
        lambda key, how: (key, key[0], list(key[0]), {"id": key[0]})[how % 4],
    ),
}

index = st.integers(0, SIZE - 1)
indexes = st.lists(index, max_size=6)
#: Which spelling of the first key, of the next the next one; `None`: instances.
by_key = st.none() | st.integers(0, 3)
operations = st.recursive(
    st.one_of(
        st.tuples(st.just("add"), index, indexes, by_key),
        st.tuples(st.just("remove"), index, indexes, by_key),
        st.tuples(st.just("set"), index, indexes, by_key),
        st.tuples(
            st.just("add_many"),
            st.lists(st.tuples(index, index), max_size=8),
            st.just(None),
            by_key,
        ),
        st.tuples(st.just("load"), index, st.just(None), st.just(None)),
    ),
    lambda inner: st.tuples(
        st.sampled_from(["rolled back", "released"]),
        st.lists(inner, max_size=4),
        st.just(None),
        st.just(None),
    ),
    max_leaves=12,
)


class Undone(Exception):
    """Rolls a savepoint back."""


class Run:
    """The same operations on the database and on a set of pairs of numbers."""

    def __init__(
        self, session: AsyncSession, shape: Shape, owners: list[Any], related: list[Any]
    ) -> None:
        self.session = session
        self.shape = shape
        self.owners = owners
        self.related = related
        self.attribute = getattr(shape.owner, shape.attribute)
        self.pairs: set[tuple[int, int]] = set()

    async def do(self, operation: Any) -> None:
        name, first, second, by_key = operation
        if name in ("rolled back", "released"):
            before = set(self.pairs)
            try:
                async with get_transaction(self.session):
                    for each in first:
                        await self.do(each)
                    if name == "rolled back":
                        raise Undone
            except Undone:
                self.pairs = before
        elif name == "load":
            for instance, attribute in (
                (self.owners[first], self.shape.attribute),
                (self.related[first], self.shape.reverse),
            ):
                if attribute is not None:
                    await self.session.refresh(instance, [attribute])
        elif name == "add_many":
            new = set(first)
            links = [self.link(o, r, by_key, at) for at, (o, r) in enumerate(first)]
            added = await m2m_add_many(self.session, self.attribute, links, ignore_conflicts=True)
            assert added == len(new - self.pairs)
            self.pairs |= new
        else:
            await self.of_one_owner(name, first, second, by_key)
        await self.check()

    def link(self, owner: int, related: int, by_key: int | None, at: int) -> tuple[Any, Any]:
        shape = self.shape
        if by_key is None:
            return self.owners[owner], self.related[related]
        return (
            shape.owner_spelling(shape.owner_keys[owner], by_key + at),
            shape.related_spelling(shape.related_keys[related], by_key + 2 * at),
        )

    async def of_one_owner(
        self, name: str, owner: int, numbers: list[int], by_key: int | None
    ) -> None:
        instance = self.owners[owner]
        links = [self.link(owner, number, by_key, at) for at, number in enumerate(numbers)]
        given = [related for _, related in links]
        args, pks = (tuple(given), []) if by_key is None else ((), given)
        new = {(owner, number) for number in numbers}
        mine = {pair for pair in self.pairs if pair[0] == owner}
        if name == "add":
            added = await m2m_add(
                self.session, instance, self.attribute, *args, pks=pks, ignore_conflicts=True
            )
            assert added == len(new - self.pairs)
            self.pairs |= new
        elif name == "remove":
            assert await m2m_remove(self.session, instance, self.attribute, *args, pks=pks) == len(
                new & self.pairs
            )
            self.pairs -= new
        else:
            change = await m2m_set(self.session, instance, self.attribute, *args, pks=pks)
            assert change == M2MChange(len(new - mine), len(mine - new))
            self.pairs = self.pairs - mine | new

    async def check(self) -> None:
        """The table, and every collection that is loaded."""
        shape = self.shape
        columns = [shape.table.c[name] for name in shape.columns]
        rows = [tuple(row) for row in await self.session.execute(select(*columns))]
        flat = {
            (*_tuple(shape.owner_keys[owner]), *_tuple(shape.related_keys[related]))
            for owner, related in self.pairs
        }
        assert set(rows) == flat and len(rows) == len(flat)
        for at, (one, other) in enumerate(zip(self.owners, self.related, strict=True)):
            wanted = {self.related[related] for owner, related in self.pairs if owner == at}
            assert (
                vars(one).get(shape.attribute) is None or set(vars(one)[shape.attribute]) == wanted
            )
            if shape.reverse is not None and vars(other).get(shape.reverse) is not None:
                assert set(vars(other)[shape.reverse]) == {
                    self.owners[o] for o, r in self.pairs if r == at
                }


def _tuple(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def made(class_: Any, keys: list[Any]) -> list[Any]:
    names = [
        class_.__mapper__.get_property_by_column(column).key
        for column in class_.__mapper__.primary_key
    ]
    return [class_(**dict(zip(names, _tuple(key), strict=True))) for key in keys]


@pytest.mark.parametrize("name", SHAPES)
@settings(
    max_examples=examples(10),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(sequence=st.lists(operations, max_size=8))
async def test_sequences(engine: AsyncEngine, tables: None, name: str, sequence: list[Any]) -> None:
    """The rows, the counts and the loaded collections are those of the model after every step."""
    shape = SHAPES[name]
    await models.empty(engine)
    async with AsyncSession(engine, expire_on_commit=False) as session:
        owners = made(shape.owner, shape.owner_keys)
        related = (
            owners if shape.related is shape.owner else made(shape.related, shape.related_keys)
        )
        session.add_all([*owners, *related])
        await session.commit()
        await session.begin()
        run = Run(session, shape, owners, related)
        for operation in sequence:
            await run.do(operation)
        await session.rollback()
        loaded = getattr(shape.owner, shape.attribute)
        found = (await session.scalars(select(shape.owner).options(selectinload(loaded)))).all()
        assert all(not getattr(each, shape.attribute) for each in found)
        assert all(not inspect(each).expired for each in found)
