"""Associations and the ORM: states of instances, loaded collections, pending changes, foreign keys.

On every shape of relationship of the contract in `pgtoolset.testing.contracts`, which says what
holds without the ORM too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import inspect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import (
    RowNotFoundError,
    get_transaction,
    m2m_add,
    m2m_remove,
    m2m_set,
)
from pgtoolset.testing.contracts import LinkedRows
from tests.m2m import models
from tests.testing.linked import SHAPES, linked


class Undone(Exception):
    """Leaves a block that is to be undone."""


@pytest.fixture(params=SHAPES)
async def links(
    engine: AsyncEngine,
    session_maker: async_sessionmaker[AsyncSession],
    request: pytest.FixtureRequest,
) -> AsyncIterator[LinkedRows]:
    await models.create(engine)
    await models.empty(engine)
    yield linked(session_maker, request.param)
    await models.empty(engine)


async def test_values_of_extra_columns(links: LinkedRows) -> None:
    """With the values of the extra columns, each pair is added once, and counted."""
    await links.create()
    async with links.session() as session:
        async with get_transaction(session):
            owner = await links.get(session, links.owner, 1)
            one = await links.get(session, links.related, 1)
            keys = [links.key(links.related, number) for number in (2, 3, 2)]
            attribute = links.relationship
            added = await m2m_add(
                session, owner, attribute, one, one, pks=keys, values=links.values
            )
            assert added == 3
            assert await links.pairs() == set()
    assert await links.pairs() == {(1, 1), (1, 2), (1, 3)}


async def test_a_row_that_is_missing(links: LinkedRows) -> None:
    """To associate a row that does not exist is an `IntegrityError`, also where existing
    associations are skipped.

    Where the association table refers to another column than the key, it is a `RowNotFoundError`.
    """
    async with links.session() as session:
        session.add(links.owner(1))
        await session.commit()
        owner = await links.get(session, links.owner, 1)
        keys = [links.key(links.related, 1)]
        for skip in (False, True):
            with pytest.raises((IntegrityError, RowNotFoundError)):
                async with get_transaction(session):
                    await m2m_add(
                        session, owner, links.relationship, pks=keys, ignore_conflicts=skip
                    )


async def test_instances_in_any_state(links: LinkedRows) -> None:
    """Pending instances are flushed; expired and detached ones work without being loaded."""
    await links.create()
    async with links.session() as other:
        detached = await links.get(other, links.related, 1)
    async with links.session() as session:
        async with get_transaction(session):
            expired = await links.get(session, links.owner, 1)
            session.expire(expired)
            new = links.related(5)
            session.add(new)
            assert await m2m_add(session, expired, links.relationship, detached, new) == 2
            assert inspect(new).persistent
            await session.delete(new)
            with pytest.raises(ValueError, match="deleted"):
                await m2m_add(session, expired, links.relationship, new)
            session.expunge(new)
            keys = [links.key(links.related, 5)]
            await m2m_remove(session, expired, links.relationship, pks=keys)
    assert await links.pairs() == {(1, 1)}


async def test_bad_instances_and_values(links: LinkedRows) -> None:
    """A transient instance and an unknown column are refused before a transaction begins, also by a
    session that has forgotten the owner."""
    await links.create()
    async with links.session() as session:
        owner = await links.get(session, links.owner, 1)
        related = await links.get(session, links.related, 1)
        await session.rollback()
        session.expunge_all()
        attribute = links.relationship
        wrong: list[Callable[[], Any]] = [
            lambda: m2m_add(session, owner, attribute, links.related(9)),
            lambda: m2m_set(session, owner, attribute, related, values={"no such": 1}),
        ]
        for call in wrong:
            with pytest.raises(ValueError):
                await call()
            assert not session.in_transaction()
    assert await links.pairs() == set()


async def test_loaded_collections_are_never_stale(links: LinkedRows) -> None:
    """A loaded collection shows the associations or is expired: after a call, and after its
    rollback."""
    await links.create()
    async with links.session() as session:
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
            await m2m_add(session, owner, links.relationship, one)
            assert shows(one)
            await load()
            with pytest.raises(Undone):
                async with get_transaction(session):
                    await m2m_set(session, owner, links.relationship, two)
                    assert shows(two)
                    await load()
                    raise Undone
            assert shows(one)
            await load()
        with pytest.raises(Undone):
            async with get_transaction(session):
                await load()
                await m2m_remove(session, owner, links.relationship, one)
                assert shows()
                await load()
                raise Undone
        assert shows(one)
    assert await links.pairs() == {(1, 1)}


async def test_pending_changes_are_flushed(links: LinkedRows) -> None:
    """A pending change of a collection is written first, and not lost."""
    await links.create()
    async with links.session() as session:
        async with get_transaction(session):
            owner = await links.get(session, links.owner, 1)
            one, two, three = [
                await links.get(session, links.related, number) for number in (1, 2, 3)
            ]
            await session.refresh(owner, [links.attribute])
            getattr(owner, links.attribute).append(one)
            await m2m_add(session, owner, links.relationship, two)
            await session.refresh(owner, [links.attribute])
            getattr(owner, links.attribute).remove(two)
            await m2m_add(session, owner, links.relationship, three)
    assert await links.pairs() == {(1, 1), (1, 3)}
