"""`m2m._analysis`: an association is analysed once, and forgotten with its mapping."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Column, ForeignKey, MetaData, Table
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from pgtoolset import m2m_add, m2m_add_many, m2m_remove, m2m_set
from pgtoolset.m2m._analysis import association_of
from tests.m2m.models import KEYED, Car, CompositeA, Group, Post, Tag, Taxi, User


def test_analysed_once() -> None:
    """One relationship has one association, through a subclass too; two have two."""
    assert association_of(Post.tags) is association_of(Post.tags)
    assert association_of(Taxi.drivers) is association_of(Car.drivers)
    assert association_of(Post.tags) is not association_of(Tag.posts)


def test_a_copied_info() -> None:
    """An `info` that was copied from another relationship does not bring its association."""
    association_of(Post.tags)

    class Base(DeclarativeBase):
        pass

    links = Table(
        "link",
        Base.metadata,
        Column("one", ForeignKey("one.id"), primary_key=True),
        Column("other", ForeignKey("other.id"), primary_key=True),
    )

    class Other(Base):
        __tablename__ = "other"
        id: Mapped[int] = mapped_column(primary_key=True)

    class One(Base):
        __tablename__ = "one"
        id: Mapped[int] = mapped_column(primary_key=True)
        others: Mapped[list[Other]] = relationship(
            secondary=links, info={**Post.tags.property.info, "mine": 1}
        )

    assert association_of(One.others).table is links
    assert association_of(One.others) is association_of(One.others)
    assert One.others.property.info["mine"] == 1


@pytest.mark.parametrize(
    ("rel_attr", "one", "other"),
    [
        (Post.tags, True, True),
        (CompositeA.bs, True, True),
        (User.groups, True, True),
        (Group.users, True, True),
        (KEYED["uuid"][0].rights, True, True),
        (KEYED["uuid_text"][0].rights, False, False),
        (KEYED["char"][0].rights, False, False),
        (KEYED["native_enum"][0].rights, False, False),
        (KEYED["schema_enum"][0].rights, True, True),
        (KEYED["bind_expression"][0].rights, False, False),
        (KEYED["variant"][0].rights, False, False),
        (KEYED["char_variant"][0].rights, False, False),
        (KEYED["decorated"][0].rights, False, False),
        (KEYED["array"][0].rights, False, False),
    ],
)
def test_spellings(rel_attr: Any, one: bool, other: bool) -> None:
    """Only where a key has one spelling are collections expired by key."""
    association = association_of(rel_attr)
    assert association.owner.has_one_spelling is one
    assert association.related.has_one_spelling is other


def mapped() -> tuple[Any, Any, MetaData]:
    """A mapping that nothing else refers to."""

    class Base(DeclarativeBase):
        pass

    links = Table(
        "forgotten_link",
        Base.metadata,
        Column("owner", ForeignKey("forgotten_owner.id"), primary_key=True),
        Column("related", ForeignKey("forgotten_related.id"), primary_key=True),
    )

    class Related(Base):
        __tablename__ = "forgotten_related"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Owner(Base):
        __tablename__ = "forgotten_owner"
        id: Mapped[int] = mapped_column(primary_key=True)
        others: Mapped[list[Related]] = relationship(Related, secondary=links)

    return Owner, Related, Base.metadata


async def used(engine: AsyncEngine) -> list[weakref.ref[Any]]:
    """Write with a mapping of its own, and return what must not outlive it."""
    owner_class, related_class, metadata = mapped()
    async with engine.connect() as connection, AsyncSession(connection) as session:
        await connection.run_sync(metadata.create_all)
        owner, related = owner_class(id=1), related_class(id=1)
        session.add_all([owner, related])
        attribute = owner_class.others
        async with session.begin_nested():
            assert await m2m_add(session, owner, attribute, related) == 1
        assert await m2m_set(session, owner, attribute, pks=[1]) == (0, 0)
        assert await m2m_remove(session, owner, attribute, pks=[1, 2]) == 1
        assert await m2m_add_many(session, attribute, [(1, 1)]) == 1
        await session.rollback()
    association = association_of(attribute)
    return [weakref.ref(each) for each in (owner_class, related_class, association.table)]


async def test_forgotten_with_the_mapping(engine: AsyncEngine) -> None:
    """A mapped class that is deleted is collected, and all that was known of its relationships."""
    # SQLAlchemy's own cache of compiled statements belongs to an engine.
    own = create_async_engine(engine.url)
    references = await used(own)
    await own.dispose()
    del own
    gc.collect()
    owner_class, related_class, table = (reference() for reference in references)
    assert (owner_class, related_class) == (None, None)
    # SQLAlchemy 2.0 itself keeps a table after a flush.
    assert table is None or sqlalchemy.__version__ < "2.1"
