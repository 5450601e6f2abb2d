"""Many-to-Many associations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pytest
from sqlalchemy import inspect
from sqlalchemy.exc import IntegrityError

from pgtoolset import M2MChange, get_transaction
from pgtoolset.protocols import AssociationWriter, SessionFactory
from pgtoolset.testing.contracts.harness import missing, opened
from pgtoolset.testing.doubles import MemoryDatabase

__all__ = ["AssociationWriterContract", "LinkedRows", "LinksHarness", "MemoryLinks"]

Pairs = set[tuple[int, int]]


class LinksHarness(Protocol):
    """For the contract of associations: two mapped classes and the relationship between them.

    Attributes:
        relationship: `Post.tags`.
        owner: makes an instance of the owner's class, for a number of 1 to 4.
        related: the same of the related class.
    """

    relationship: Any
    owner: Callable[[int], Any]
    related: Callable[[int], Any]

    def session(self) -> Any:
        """Return a new session."""
        ...

    async def write(self, session: Any, number: int) -> None: ...

    async def stored(self) -> set[int]: ...

    async def create(self) -> None:
        """Store four owners and four related, without associations."""
        ...

    def key(self, make: Callable[[int], Any], number: int) -> Any:
        """Return the primary key of a number: a scalar, or a tuple for a composite one."""
        ...

    async def get(self, session: Any, make: Callable[[int], Any], number: int) -> Any:
        """Return the instance of a number, as the session has it."""
        ...

    async def pairs(self) -> Pairs:
        """Return the numbers of the associations that are committed."""
        ...


class _Links:
    """Two mapped classes and the relationship between them; the part that needs no session."""

    def __init__(
        self, relationship: Any, owner: Callable[[int], Any], related: Callable[[int], Any]
    ) -> None:
        self.relationship = relationship
        self.owner = owner
        self.related = related

    async def write(self, session: Any, number: int) -> None:
        raise NotImplementedError

    async def stored(self) -> set[int]:
        raise NotImplementedError

    def key(self, make: Callable[[int], Any], number: int) -> Any:
        instance = make(number)
        key = inspect(type(instance)).primary_key_from_instance(instance)
        return key[0] if len(key) == 1 else tuple(key)


class LinkedRows(_Links):
    """The `LinksHarness` of every kind of `AsyncSession`.

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
        super().__init__(relationship, owner, related)
        self.session_maker = session_maker
        self.attribute: str = relationship.key
        self.reverse = reverse
        self.values = values

    def session(self) -> Any:
        return self.session_maker()

    async def create(self) -> None:
        async with opened(self) as session:
            session.add_all(
                [make(number) for make in (self.owner, self.related) for number in (1, 2, 3, 4)]
            )
            await session.commit()

    async def get(self, session: Any, make: Callable[[int], Any], number: int) -> Any:
        return await session.get_one(type(make(number)), self.key(make, number))

    async def pairs(self) -> Pairs:
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


class MemoryLinks(_Links):
    """The `LinksHarness` of the sessions of a `MemoryDatabase`.

    Args:
        database: the sessions' database.
        relationship: `Post.tags`.
        owner: makes an instance of the owner's class, for a number of 1 to 4.
        related: the same of the related class.
    """

    def __init__(
        self,
        database: MemoryDatabase,
        relationship: Any,
        owner: Callable[[int], Any],
        related: Callable[[int], Any],
    ) -> None:
        super().__init__(relationship, owner, related)
        self.database = database

    def session(self) -> Any:
        return self.database.session()

    async def create(self) -> None:
        pass  # the doubles know no foreign keys

    async def get(self, session: Any, make: Callable[[int], Any], number: int) -> Any:
        return make(number)

    async def pairs(self) -> Pairs:
        owners, related = (
            {self.key(make, number): number for number in (1, 2, 3, 4)}
            for make in (self.owner, self.related)
        )
        found = self.database.associations(self.relationship)
        return {(owners[owner], related[each]) for owner, each in found}


class AssociationWriterContract:
    """What `AssociationWriter` promises. Fixtures: `associations`, and `links`, a
    `LinksHarness`."""

    @pytest.fixture
    def associations(self) -> AssociationWriter:
        missing("associations", "the AssociationWriter")

    @pytest.fixture
    def links(self) -> LinksHarness:
        missing("links", "a LinksHarness, such as LinkedRows(session_maker, Post.tags, ...)")

    async def test_add(self, associations: AssociationWriter, links: LinksHarness) -> None:
        """Instances and keys are associated, each pair once, and counted."""
        await links.create()
        async with opened(links) as session:
            async with get_transaction(session):
                owner = await links.get(session, links.owner, 1)
                one = await links.get(session, links.related, 1)
                keys = [links.key(links.related, number) for number in (2, 3, 2)]
                add = associations.m2m_add
                assert await add(session, owner, links.relationship, one, one, pks=keys) == 3
                assert await add(session, owner, links.relationship) == 0
                assert await links.pairs() == set()
        assert await links.pairs() == {(1, 1), (1, 2), (1, 3)}

    async def test_an_association_that_exists(
        self, associations: AssociationWriter, links: LinksHarness
    ) -> None:
        """An existing association is an `IntegrityError`, which undoes its own level; with
        `ignore_conflicts` it is skipped."""
        await links.create()
        async with opened(links) as session:
            async with get_transaction(session):
                owner = await links.get(session, links.owner, 1)
                related = [await links.get(session, links.related, number) for number in (1, 2)]
                add = associations.m2m_add
                await add(session, owner, links.relationship, related[0])
                with pytest.raises(IntegrityError) as caught:
                    async with get_transaction(session):
                        await add(session, owner, links.relationship, *related)
                assert getattr(caught.value.orig, "sqlstate", None) == "23505"
                skipped = await add(
                    session, owner, links.relationship, *related, ignore_conflicts=True
                )
                assert skipped == 1
        assert await links.pairs() == {(1, 1), (1, 2)}

    async def test_remove(self, associations: AssociationWriter, links: LinksHarness) -> None:
        """Associations are removed and counted; a missing one is not counted."""
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

    async def test_set(self, associations: AssociationWriter, links: LinksHarness) -> None:
        """The owner has exactly the given set, and no other owner changes; gains and losses are
        counted."""
        await links.create()
        async with opened(links) as session:
            async with get_transaction(session):
                one, two = [await links.get(session, links.owner, number) for number in (1, 2)]
                keys = {number: links.key(links.related, number) for number in (1, 2, 3, 4)}
                change = associations.m2m_set
                attribute = links.relationship
                assert await change(session, two, attribute, pks=[keys[1]]) == M2MChange(1, 0)
                first = await change(session, one, attribute, pks=[keys[1], keys[2]])
                assert first == M2MChange(2, 0)
                again = await change(
                    session, one, attribute, pks=[keys[2], keys[3], keys[4], keys[2]]
                )
                assert again == M2MChange(2, 1)
                kept = await change(session, one, attribute, pks=[keys[4]], keep_existing=True)
                assert kept == (0, 2)
                assert await change(session, two, attribute) == M2MChange(0, 1)
        assert await links.pairs() == {(1, 4)}

    async def test_add_many(self, associations: AssociationWriter, links: LinksHarness) -> None:
        """Pairs of instances and keys in any mix are associated, each once."""
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

    async def test_a_level_that_rolls_back(
        self, associations: AssociationWriter, links: LinksHarness
    ) -> None:
        """The rollback of a level undoes the writes of that level alone."""
        await links.create()
        keys = {number: links.key(links.related, number) for number in (1, 2, 3)}
        async with opened(links) as session:
            async with get_transaction(session):
                owner = await links.get(session, links.owner, 1)
                await associations.m2m_add(session, owner, links.relationship, pks=[keys[1]])
                with pytest.raises(KeyError):
                    async with get_transaction(session):
                        await associations.m2m_set(
                            session, owner, links.relationship, pks=[keys[2]]
                        )
                        raise KeyError
                await associations.m2m_add(session, owner, links.relationship, pks=[keys[3]])
        assert await links.pairs() == {(1, 1), (1, 3)}

    async def test_bad_arguments(
        self, associations: AssociationWriter, links: LinksHarness
    ) -> None:
        """A wrong argument is refused before a transaction begins."""
        await links.create()
        async with opened(links) as session:
            owner = await links.get(session, links.owner, 1)
            related = await links.get(session, links.related, 1)
            await session.rollback()
            attribute: Any = links.relationship
            column = getattr(type(owner), next(iter(inspect(type(owner)).column_attrs)).key)
            anything: Any = associations
            add, add_many, change = anything.m2m_add, anything.m2m_add_many, anything.m2m_set
            wrong: list[tuple[Any, Callable[[], Any]]] = [
                (TypeError, lambda: add(session, owner, column, related)),
                (TypeError, lambda: add(session, object(), attribute, related)),
                (TypeError, lambda: add(session, owner, attribute, 1)),
                (TypeError, lambda: add(session, owner, attribute, pks="12")),
                ((TypeError, ValueError), lambda: add(session, owner, attribute, pks=[None])),
                (ValueError, lambda: add(session, owner, attribute, pks=[(1, 2, 3)])),
                (TypeError, lambda: change(session, owner, attribute, related, values=[1])),
                (TypeError, lambda: add(session, owner, attribute, ignore_conflicts=1)),
                (TypeError, lambda: add_many(session, attribute, [1])),
                (ValueError, lambda: add_many(session, attribute, [(1, 2, 3)])),
            ]
            for error, call in wrong:
                with pytest.raises(error):
                    await call()
                assert not session.in_transaction()
        assert await links.pairs() == set()

    async def test_sets_of_one_owner_wait(
        self, associations: AssociationWriter, links: LinksHarness
    ) -> None:
        """Of two sets of one owner the second waits for the first one's transaction, and replaces
        its set."""
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
