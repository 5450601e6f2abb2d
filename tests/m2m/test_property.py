"""Any sequence of calls and rolled-back savepoints does to the table what it does to a set of
pairs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import inspect, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import selectinload

from pgtoolset import M2MChange, get_transaction, m2m_add, m2m_add_many, m2m_remove, m2m_set
from tests.m2m import models

SIZE = 4


@dataclass(frozen=True)
class Shape:
    """A mapping, the keys of its instances by number, and the pair of numbers of a row."""

    owner: Any
    attribute: str
    related: Any
    reverse: str | None
    owner_keys: list[Any]
    related_keys: list[Any]
    table: Any
    columns: tuple[str, ...]
    values: tuple[dict[str, Any] | None, ...] = (None,)


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
        (None, {"note": "n"}),
    ),
    "no unique constraint": Shape(
        models.Shelf, "loose", models.Thing, None, numbers, numbers, models.loose, ("box", "thing")
    ),
}

index = st.integers(0, SIZE - 1)
indexes = st.lists(index, max_size=6)
by_key = st.booleans()
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
        st.tuples(st.just("load"), index, st.just(None), st.just(False)),
    ),
    lambda inner: st.tuples(
        st.sampled_from(["rolled back", "released"]),
        st.lists(inner, max_size=4),
        st.just(None),
        st.just(False),
    ),
    max_leaves=12,
)


@pytest.fixture
async def tables(engine: AsyncEngine) -> AsyncIterator[None]:
    await models.create(engine)
    yield
    await models.empty(engine)


class Undone(Exception):
    pass


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
            links = [
                (self.shape.owner_keys[o], self.shape.related_keys[r])
                if by_key
                else (self.owners[o], self.related[r])
                for o, r in first
            ]
            added = await m2m_add_many(self.session, self.attribute, links, ignore_conflicts=True)
            assert added == len(new - self.pairs)
            self.pairs |= new
        else:
            await self.of_one_owner(name, first, second, by_key)
        await self.check()

    async def of_one_owner(self, name: str, owner: int, numbers: list[int], by_key: bool) -> None:
        instance = self.owners[owner]
        args = () if by_key else tuple(self.related[number] for number in numbers)
        pks = [self.shape.related_keys[number] for number in numbers] if by_key else []
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
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
