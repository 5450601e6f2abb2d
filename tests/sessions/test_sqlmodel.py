"""SQLModel's session class, whose `execute` warns: no function of ours causes the warning."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import registry
from sqlmodel import Field, Relationship, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from pgtoolset import (
    LockTimeoutError,
    M2MChange,
    TransactionAbortedError,
    advisory_lock,
    cleanup_tables,
    create_db_context,
    driver_connection,
    get_transaction,
    lock_rows,
    lock_tables,
    m2m_add,
    m2m_add_many,
    m2m_remove,
    m2m_set,
    release_connection,
    run_transaction,
    wait_for_row_change,
)
from pgtoolset.testing.contracts import MappedRows, TransactionalSessionContract


class Base(SQLModel, registry=registry()):
    pass


class Member(Base, table=True):
    __tablename__ = "sqlmodel_member"

    hero_id: int = Field(foreign_key="sqlmodel_hero.id", primary_key=True)
    team: str = Field(foreign_key="sqlmodel_team.name", primary_key=True)


class Hero(Base, table=True):
    __tablename__ = "sqlmodel_hero"

    id: int | None = Field(default=None, primary_key=True)
    name: str = "new"
    teams: list["Team"] = Relationship(link_model=Member)


class Team(Base, table=True):
    __tablename__ = "sqlmodel_team"

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True)  # the association refers to it, and not to the key


@pytest.fixture
async def empty_tables(engine: AsyncEngine) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)


@pytest.fixture
async def session_maker(
    empty_tables: async_sessionmaker[AsyncSession],
) -> async_sessionmaker[AsyncSession]:
    async with empty_tables.begin() as session:
        session.add_all([Hero(id=1), Hero(id=2), *(Team(id=n, name=f"t{n}") for n in (1, 2, 3))])
    return empty_tables


async def test_the_class_warns(session_maker: async_sessionmaker[AsyncSession]) -> None:
    """The warning that is kept away exists: a user's own call of `execute` causes it."""
    async with session_maker() as session:
        with pytest.warns(DeprecationWarning, match="session.exec"):
            await session.execute(select(Hero))


async def test_associations(session_maker: async_sessionmaker[AsyncSession]) -> None:
    """The four functions write associations, also those that refer to another column."""
    teams: Any = col(Hero.teams)
    async with create_db_context(session_maker)() as session:
        hero = await session.get_one(Hero, 1)
        assert await m2m_add(session, hero, teams, pks=[1, 2]) == 2
        assert await m2m_remove(session, hero, teams, pks=[1]) == 1
        assert await m2m_set(session, hero, teams, pks=[1, 3]) == M2MChange(2, 1)
        assert await m2m_add_many(session, teams, [(2, 1), (hero, 2)]) == 2


async def test_transactions(
    engine: AsyncEngine, session_maker: async_sessionmaker[AsyncSession]
) -> None:
    """Options, settings, savepoints and retries: the session of each is SQLModel's."""
    async with (
        session_maker() as session,
        get_transaction(session, isolation_level="REPEATABLE READ", read_only=True),
        get_transaction(session, settings={"statement_timeout": "5s"}),
    ):
        assert len((await session.exec(select(Hero))).all()) == 2
    async with engine.connect() as connection:
        bound = async_sessionmaker(connection, class_=AsyncSession)
        async with bound() as session, get_transaction(session, read_only=True):
            assert (await session.exec(select(Hero.id))).all()

    async def work(session: AsyncSession) -> int:
        return len((await session.exec(select(Hero))).all())

    assert await run_transaction(session_maker, work, isolation_level="SERIALIZABLE") == 2


async def test_a_swallowed_error(session_maker: async_sessionmaker[AsyncSession]) -> None:
    """An error of `exec` that the block swallows is reported at its end."""
    with pytest.raises(TransactionAbortedError):
        async with create_db_context(session_maker)() as session:
            try:
                await session.exec(select(Hero).where(col(Hero.id) / 0 == 1))
            except Exception:
                pass


async def test_locks_waits_and_connections(
    session_maker: async_sessionmaker[AsyncSession],
) -> None:
    """Locks, waits, a released and a lent connection, and cleaning up work with the class."""
    async with create_db_context(session_maker)() as session:
        async with lock_tables(session, [Hero], mode="SHARE"), advisory_lock(session, "heroes"):
            [hero] = await lock_rows(session, Hero, [1])
            async with session_maker() as other:
                with pytest.raises(LockTimeoutError):
                    await lock_rows(other, Hero, [1], nowait=True)
        assert hero.name == "new"
    async with create_db_context(session_maker)() as session:
        row = await wait_for_row_change(session, Hero, 1, until=lambda row: True, timeout=30)
        assert row.name == "new"
        async with release_connection(session):
            pass
        async with driver_connection(session) as connection:
            assert connection is not None
    async with session_maker() as session:
        await cleanup_tables(session, Base)
        assert (await session.exec(select(Hero))).all() == []


class TestContract(TransactionalSessionContract):
    """The contract of sessions holds for the class, and its tests cause no warning."""

    @pytest.fixture
    def harness(self, empty_tables: async_sessionmaker[AsyncSession]) -> MappedRows:
        return MappedRows(empty_tables, Hero, value=Hero.name, values=("a", "b", "c"))
