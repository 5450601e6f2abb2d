"""Many-to-Many associations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from sqlalchemy import inspect
from sqlalchemy.exc import IntegrityError

from pgtoolset import M2MChange, RowNotFoundError, get_transaction
from pgtoolset.protocols import AssociationWriter, SessionFactory
from pgtoolset.testing.contracts.harness import missing, opened

__all__ = ["AssociationWriterContract", "LinkedRows"]

Pairs = set[tuple[int, int]]


class Undone(Exception):
    """Leaves a block that is to be undone."""


class LinkedRows:
    """Two mapped classes and the Many-to-Many relationship between them.

    Args:
        session_maker: a factory of `AsyncSession`, with `expire_on_commit=False`.
        relationship: `Post.tags`.
        owner: makes an instance of the owner's class, for a number of 1 to 4.
        related: the same of the related class.
        reverse: the attribute of the other side, where the relationship has two.
        values: values of extra columns of the association table, where it has some.
    """

    def __init__(
        self,
        session_maker: SessionFactory[Any],
        relationship: Any,
        owner: Callable[[int], Any],
        related: Callable[[int], Any],
        *,
        reverse: str | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        self.session_maker = session_maker
        self.relationship = relationship
        self.attribute: str = relationship.key
        self.owner = owner
        self.related = related
        self.reverse = reverse
        self.values = values

    def session(self) -> Any:
        return self.session_maker()

    async def write(self, session: Any, number: int) -> None:
        raise NotImplementedError

    async def stored(self) -> set[int]:
        raise NotImplementedError

    async def create(self) -> None:
        """Store four owners and four related, without associations."""
        async with opened(self) as session:
            session.add_all(
                [make(number) for make in (self.owner, self.related) for number in (1, 2, 3, 4)]
            )
            await session.commit()

    def key(self, make: Callable[[int], Any], number: int) -> Any:
        """The primary key of a number: a scalar, or a tuple for a composite one."""
        instance = make(number)
        key = inspect(type(instance)).primary_key_from_instance(instance)
        return key[0] if len(key) == 1 else tuple(key)

    async def get(self, session: Any, make: Callable[[int], Any], number: int) -> Any:
        return await session.get_one(type(make(number)), self.key(make, number))

    async def pairs(self) -> Pairs:
        """The associations that are committed."""
        async with opened(self) as session:
            found: Pairs = set()
            related = [await self.get(session, self.related, number) for number in (1, 2, 3, 4)]
            for number in (1, 2, 3, 4):
                owner = await self.get(session, self.owner, number)
                await session.refresh(owner, [self.attribute])
                found |= {
                    (number, related.index(each) + 1) for each in getattr(owner, self.attribute)
                }
            return found


class AssociationWriterContract:
    """What `AssociationWriter` promises. Fixtures: `associations`, and `links`, a `LinkedRows`."""

    @pytest.fixture
    def associations(self) -> AssociationWriter:
        missing("associations", "the AssociationWriter")

    @pytest.fixture
    def links(self) -> LinkedRows:
        missing("links", "LinkedRows(session_maker, Post.tags, ...)")

    async def test_add(self, associations: AssociationWriter, links: LinkedRows) -> None:
        """What is named, by instance or by key, is associated; each pair once, and counted."""
        await links.create()
        async with opened(links) as session:
            async with get_transaction(session):
                owner = await links.get(session, links.owner, 1)
                one = await links.get(session, links.related, 1)
                keys = [links.key(links.related, number) for number in (2, 3, 2)]
                add = associations.m2m_add
                assert (
                    await add(
                        session, owner, links.relationship, one, one, pks=keys, values=links.values
                    )
                    == 3
                )
                assert await add(session, owner, links.relationship) == 0
                assert await links.pairs() == set()
        assert await links.pairs() == {(1, 1), (1, 2), (1, 3)}

    async def test_an_association_that_exists(
        self, associations: AssociationWriter, links: LinkedRows
    ) -> None:
        """It is an `IntegrityError`, which undoes its own level; or it is skipped, where that is
        asked for."""
        await links.create()
        async with opened(links) as session:
            async with get_transaction(session):
                owner = await links.get(session, links.owner, 1)
                related = [await links.get(session, links.related, number) for number in (1, 2)]
                await associations.m2m_add(session, owner, links.relationship, related[0])
                with pytest.raises(IntegrityError):
                    async with get_transaction(session):
                        await associations.m2m_add(session, owner, links.relationship, *related)
                add = associations.m2m_add
                assert (
                    await add(session, owner, links.relationship, *related, ignore_conflicts=True)
                    == 1
                )
        assert await links.pairs() == {(1, 1), (1, 2)}

    async def test_a_row_that_is_missing(
        self, associations: AssociationWriter, links: LinkedRows
    ) -> None:
        """To associate what does not exist is an `IntegrityError`, also where existing associations
        are skipped.

        Where the association table refers to another column than the key, it is a
        `RowNotFoundError`.
        """
        async with opened(links) as session:
            session.add(links.owner(1))
            await session.commit()
            owner = await links.get(session, links.owner, 1)
            keys = [links.key(links.related, 1)]
            for skip in (False, True):
                with pytest.raises((IntegrityError, RowNotFoundError)):
                    async with get_transaction(session):
                        await associations.m2m_add(
                            session, owner, links.relationship, pks=keys, ignore_conflicts=skip
                        )

    async def test_remove(self, associations: AssociationWriter, links: LinkedRows) -> None:
        """What is named is removed and counted; what is not associated is no error."""
        await links.create()
        async with opened(links) as session:
            async with get_transaction(session):
                owner = await links.get(session, links.owner, 1)
                one = await links.get(session, links.related, 1)
                keys = [links.key(links.related, number) for number in (2, 3, 4)]
                await associations.m2m_add(session, owner, links.relationship, one, pks=keys[:1])
                remove = associations.m2m_remove
                assert await remove(session, owner, links.relationship, pks=keys) == 1
                assert await remove(session, owner, links.relationship, pks=keys) == 0
                assert await remove(session, owner, links.relationship) == 0
        assert await links.pairs() == {(1, 1)}

    async def test_set(self, associations: AssociationWriter, links: LinkedRows) -> None:
        """The owner has exactly what is named, and nobody else's associations change; gains and
        losses are counted."""
        await links.create()
        async with opened(links) as session:
            async with get_transaction(session):
                one, two = [await links.get(session, links.owner, number) for number in (1, 2)]
                keys = {number: links.key(links.related, number) for number in (1, 2, 3, 4)}
                change = associations.m2m_set
                assert await change(session, two, links.relationship, pks=[keys[1]]) == M2MChange(
                    1, 0
                )
                assert await change(
                    session, one, links.relationship, pks=[keys[1], keys[2]]
                ) == M2MChange(2, 0)
                again = await change(
                    session, one, links.relationship, pks=[keys[2], keys[3], keys[4], keys[2]]
                )
                assert again == M2MChange(2, 1)
                assert await change(
                    session, one, links.relationship, pks=[keys[4]], keep_existing=True
                ) == (0, 2)
                assert await change(session, two, links.relationship) == M2MChange(0, 1)
        assert await links.pairs() == {(1, 4)}

    async def test_add_many(self, associations: AssociationWriter, links: LinkedRows) -> None:
        """Pairs of instances and keys in any mix, each once."""
        await links.create()
        async with opened(links) as session:
            async with get_transaction(session):
                owner = await links.get(session, links.owner, 1)
                related = await links.get(session, links.related, 1)
                owners = {number: links.key(links.owner, number) for number in (1, 2, 3)}
                keys = {number: links.key(links.related, number) for number in (1, 2)}
                pairs = [
                    (owner, related),
                    (owner, keys[2]),
                    (owners[2], related),
                    (owners[3], keys[2]),
                ]
                add = associations.m2m_add_many
                assert await add(session, links.relationship, [*pairs, (owners[1], keys[1])]) == 4
                assert await add(session, links.relationship, pairs, ignore_conflicts=True) == 0
                assert await add(session, links.relationship, []) == 0
                with pytest.raises(IntegrityError):
                    async with get_transaction(session):
                        await add(session, links.relationship, pairs[:1])
        assert await links.pairs() == {(1, 1), (1, 2), (2, 1), (3, 2)}

    async def test_instances_in_any_state(
        self, associations: AssociationWriter, links: LinkedRows
    ) -> None:
        """Pending instances are flushed; expired and detached ones work without being loaded."""
        await links.create()
        async with opened(links) as other:
            detached = await links.get(other, links.related, 1)
        async with opened(links) as session:
            async with get_transaction(session):
                expired = await links.get(session, links.owner, 1)
                session.expire(expired)
                new = links.related(5)
                session.add(new)
                assert (
                    await associations.m2m_add(session, expired, links.relationship, detached, new)
                    == 2
                )
                assert inspect(new).persistent
                await session.delete(new)
                with pytest.raises(ValueError, match="deleted"):
                    await associations.m2m_add(session, expired, links.relationship, new)
                session.expunge(new)
                await associations.m2m_remove(
                    session, expired, links.relationship, pks=[links.key(links.related, 5)]
                )
        assert await links.pairs() == {(1, 1)}

    async def test_bad_arguments(self, associations: AssociationWriter, links: LinkedRows) -> None:
        """What cannot be meant is refused before there is a transaction."""
        await links.create()
        async with opened(links) as session:
            owner = await links.get(session, links.owner, 1)
            related = await links.get(session, links.related, 1)
            await session.rollback()
            session.expunge_all()
            relationship: Any = links.relationship
            text: Any = "12"
            column = getattr(type(owner), next(iter(inspect(type(owner)).column_attrs)).key)
            wrong: list[tuple[type[Exception], Callable[[], Any]]] = [
                (TypeError, lambda: associations.m2m_add(session, owner, column, related)),
                (TypeError, lambda: associations.m2m_add(session, object(), relationship, related)),
                (TypeError, lambda: associations.m2m_add(session, owner, relationship, 1)),
                (TypeError, lambda: associations.m2m_add(session, owner, relationship, pks=text)),
                (
                    ValueError,
                    lambda: associations.m2m_add(session, owner, relationship, pks=[None]),
                ),
                (
                    ValueError,
                    lambda: associations.m2m_add(session, owner, relationship, pks=[(1, 2, 3)]),
                ),
                (
                    ValueError,
                    lambda: associations.m2m_add(session, owner, relationship, links.related(9)),
                ),
                (
                    ValueError,
                    lambda: associations.m2m_set(
                        session, owner, relationship, values={"no such": 1}
                    ),
                ),
                (
                    TypeError,
                    lambda: associations.m2m_set(session, owner, relationship, related, values=[1]),  # type: ignore[arg-type]
                ),
                (
                    TypeError,
                    lambda: associations.m2m_add(session, owner, relationship, ignore_conflicts=1),  # type: ignore[arg-type]
                ),
                (TypeError, lambda: associations.m2m_add_many(session, relationship, [1])),  # type: ignore[list-item]
                (ValueError, lambda: associations.m2m_add_many(session, relationship, [(1, 2, 3)])),  # type: ignore[list-item]
            ]
            for error, call in wrong:
                with pytest.raises(error):
                    await call()
                assert not session.in_transaction()
        assert await links.pairs() == set()

    async def test_loaded_collections_never_lie(
        self, associations: AssociationWriter, links: LinkedRows
    ) -> None:
        """A collection that was loaded shows what is there, or is expired: after a call, and after
        its undoing."""
        await links.create()
        async with opened(links) as session:
            owner = await links.get(session, links.owner, 1)
            one, two = [await links.get(session, links.related, number) for number in (1, 2)]
            await session.commit()
            sides = [(owner, links.attribute)]
            sides += [] if links.reverse is None else [(one, links.reverse), (two, links.reverse)]

            async def load() -> None:
                for instance, attribute in sides:
                    await session.refresh(instance, [attribute])

            def shows(*related: Any) -> bool:
                pairs = {id(owner): set(map(id, related)), id(one): set(), id(two): set()}
                for each in related:
                    pairs[id(each)] = {id(owner)}
                return all(
                    vars(instance).get(attribute) is None
                    or set(map(id, vars(instance)[attribute])) == pairs[id(instance)]
                    for instance, attribute in sides
                )

            async with get_transaction(session):
                await load()
                await associations.m2m_add(session, owner, links.relationship, one)
                assert shows(one)
                await load()
                with pytest.raises(Undone):
                    async with get_transaction(session):
                        await associations.m2m_set(session, owner, links.relationship, two)
                        assert shows(two)
                        await load()
                        raise Undone
                assert shows(one)
                await load()
            with pytest.raises(Undone):
                async with get_transaction(session):
                    await load()
                    await associations.m2m_remove(session, owner, links.relationship, one)
                    assert shows()
                    await load()
                    raise Undone
            assert shows(one)
        assert await links.pairs() == {(1, 1)}

    async def test_pending_changes_are_flushed(
        self, associations: AssociationWriter, links: LinkedRows
    ) -> None:
        """A change to a collection that was still pending is written first, and not lost."""
        await links.create()
        async with opened(links) as session:
            async with get_transaction(session):
                owner = await links.get(session, links.owner, 1)
                one, two, three = [
                    await links.get(session, links.related, number) for number in (1, 2, 3)
                ]
                await session.refresh(owner, [links.attribute])
                getattr(owner, links.attribute).append(one)
                await associations.m2m_add(session, owner, links.relationship, two)
                await session.refresh(owner, [links.attribute])
                getattr(owner, links.attribute).remove(two)
                await associations.m2m_add(session, owner, links.relationship, three)
        assert await links.pairs() == {(1, 1), (1, 3)}

    async def test_sets_of_one_owner_wait(
        self, associations: AssociationWriter, links: LinkedRows
    ) -> None:
        """Of two sets of one owner the second waits for the first one's transaction, and then all
        of it is done."""
        await links.create()
        keys = {number: links.key(links.related, number) for number in (1, 2, 3, 4)}

        async def second() -> M2MChange:
            async with opened(links) as session:
                async with get_transaction(session):
                    owner = await links.get(session, links.owner, 1)
                    return await associations.m2m_set(
                        session, owner, links.relationship, pks=[keys[2], keys[3]]
                    )

        async with opened(links) as session:
            async with get_transaction(session):
                owner = await links.get(session, links.owner, 1)
                await associations.m2m_set(
                    session, owner, links.relationship, pks=[keys[1], keys[2]]
                )
                task = asyncio.create_task(second())
                await asyncio.sleep(0.1)
                assert not task.done()
        assert await task == M2MChange(1, 1)
        assert await links.pairs() == {(1, 2), (1, 3)}
