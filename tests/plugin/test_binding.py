"""The fixture pg_bind, and how a test and its requests share sessions."""

from __future__ import annotations

from tests.plugin.projects import ANYIO, ASYNCIO_OF_THE_SESSION, Project

APP = """
    from fastapi import FastAPI
    from models import Base, Item
    from sqlalchemy import func, select
    from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine

    nowhere = create_async_engine("postgresql+asyncpg://nobody:x@127.0.0.1:9/nothing")
    session_maker = async_sessionmaker(
        nowhere, binds={Base: nowhere}, autoflush=False, info={"of": "the application"}
    )
    app = FastAPI()

    @app.post("/items/{name}")
    async def add_item(name: str) -> int:
        async with session_maker() as session, session.begin():
            session.add(Item(name=name))
        async with session_maker() as session:
            return await session.scalar(select(func.count()).select_from(Item))
"""


def test_code_that_opens_sessions_itself(project: Project) -> None:
    """pg_bind joins the sessions of a factory to the test; what else it is configured with stays,
    and after the test it is as before."""
    project.write(
        app=APP,
        conftest="""
            import pytest

            @pytest.fixture
            def anyio_backend():
                return "asyncio"
        """,
        test_it="""
            import pytest
            from app import app, nowhere, session_maker
            from models import Base, Item
            from sqlalchemy import event, func, select
            from sqlalchemy.ext.asyncio import AsyncSession

            from pgtoolset.testing import create_test_client

            before = dict(session_maker.kw)

            @pytest.fixture(autouse=True)
            def unchanged():
                yield
                assert session_maker.kw == before
                assert session_maker.kw["binds"] == {Base: nowhere}

            @pytest.fixture
            def bound(unchanged, pg_bind):
                pg_bind(session_maker)
                pg_bind(session_maker)

            async def count(session):
                return await session.scalar(select(func.count()).select_from(Item))

            @pytest.mark.parametrize("number", range(2))
            async def test_rolled_back(bound, pg_session, pg_engine, number):
                pg_session.add(Item(name="table"))
                await pg_session.commit()
                async with create_test_client(app) as client:
                    assert (await client.post("/items/lamp")).json() == 2
                assert await count(pg_session) == 2
                async with AsyncSession(pg_engine) as other:
                    assert await count(other) == 0
                session = session_maker()
                assert not session.sync_session.autoflush
                assert session.sync_session.expire_on_commit
                assert session.info["of"] == "the application"

            @pytest.mark.pg_commit
            async def test_committed(bound, pg_session, pg_engine):
                async with create_test_client(app) as client:
                    assert (await client.post("/items/lamp")).json() == 1
                async with AsyncSession(pg_engine) as other:
                    assert await count(other) == 1

            async def test_something_else(pg_bind):
                for wrong in (nowhere, None, "session_maker"):
                    with pytest.raises(TypeError, match="pg_bind takes an async_sessionmaker"):
                        pg_bind(wrong)
        """,
    )
    quiet = ("-W", "ignore:Unknown config option")  # of pytest-asyncio
    for options in (ASYNCIO_OF_THE_SESSION, (*ANYIO, *quiet)):
        outcome = project.run(*options)
        assert outcome.counts == {"passed": 4}, outcome.output


def test_one_session_for_test_and_request(project: Project) -> None:
    """With sessions of its own a request leaves the instances of the test as they were loaded; with
    the session of the test it changes them."""
    project.write(
        test_it="""
            from typing import Annotated

            import pytest
            from fastapi import Depends, FastAPI
            from models import Item
            from sqlalchemy import select
            from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

            from pgtoolset import create_db_dependency
            from pgtoolset.testing import create_test_client

            get_db = create_db_dependency(session_maker=async_sessionmaker())
            app = FastAPI()

            @app.put("/items/{id}/{name}")
            async def rename(
                id: int, name: str, session: Annotated[AsyncSession, Depends(get_db)]
            ) -> None:
                (await session.get_one(Item, id)).name = name

            @pytest.fixture
            async def item(pg_session):
                item = Item(name="lamp")
                pg_session.add(item)
                await pg_session.commit()
                return item

            async def test_two_sessions(pg_session, pg_session_maker, item):
                override = create_db_dependency(session_maker=pg_session_maker)
                async with create_test_client(
                    app, dependency_overrides={get_db: override}
                ) as client:
                    assert (await client.put(f"/items/{item.id}/chair")).status_code == 200
                assert item.name == "lamp"
                await pg_session.refresh(item)
                assert item.name == "chair"

            async def test_one_session(pg_session, item):
                async with create_test_client(
                    app, dependency_overrides={get_db: lambda: pg_session}
                ) as client:
                    assert (await client.put(f"/items/{item.id}/chair")).status_code == 200
                assert item.name == "chair"
                await pg_session.commit()
                assert list(await pg_session.scalars(select(Item.name))) == ["chair"]
        """
    )
    outcome = project.run()
    assert outcome.counts == {"passed": 2}, outcome.output
