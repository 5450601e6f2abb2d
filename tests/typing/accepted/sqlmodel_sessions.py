"""Checked by mypy and pyright, never run: SQLModel's session class reaches the caller typed."""

from collections.abc import Sequence
from typing import assert_type

from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlmodel import Field, Relationship, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from pgtoolset import (
    create_db_context,
    get_transaction,
    lock_rows,
    m2m_set,
    run_transaction,
    wait_for_row_change,
)

session_maker = async_sessionmaker(class_=AsyncSession, expire_on_commit=False)
db_context = create_db_context(session_maker=session_maker)


class Member(SQLModel, table=True):
    hero_id: int = Field(foreign_key="hero.id", primary_key=True)
    team_id: int = Field(foreign_key="team.id", primary_key=True)


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    teams: list["Team"] = Relationship(link_model=Member)


class Team(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)


async def work(session: AsyncSession) -> Sequence[Hero]:
    return (await session.exec(select(Hero).order_by(col(Hero.id)))).all()


async def calls() -> None:
    async with db_context() as session:
        assert_type(session, AsyncSession)
        async with get_transaction(session) as same:
            assert_type(same, AsyncSession)
        [hero] = await lock_rows(session, Hero, [1])
        assert_type(hero, Hero)
        await m2m_set(session, hero, col(Hero.teams), Team(id=1), pks=[2])
        assert_type(await wait_for_row_change(session, Hero, 1, columns=["id"]), Hero)
    assert_type(await run_transaction(session_maker, work), Sequence[Hero])
