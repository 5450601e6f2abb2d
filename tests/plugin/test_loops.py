"""Tests that use a connection in another event loop, as Starlette's TestClient does."""

from __future__ import annotations

import pytest

from tests.plugin.projects import ANYIO, ASYNCIO, ASYNCIO_OF_THE_SESSION, Project

#: Of Starlette, of a version that is newer than httpx or older than anyio, and of the options of
#: pytest-asyncio where anyio runs the tests.
_WARNINGS = ("Using `httpx`", "The anyio.abc.BlockingPortal", "Unknown config option")
QUIET = tuple(part for warning in _WARNINGS for part in ("-W", f"ignore:{warning}"))

SHOP = """
    from typing import Annotated

    from fastapi import Depends, FastAPI
    from models import Item
    from sqlalchemy import func, select
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from pgtoolset import create_db_dependency

    session_maker = async_sessionmaker()
    get_db = create_db_dependency(session_maker=session_maker)
    app = FastAPI()
    Session = Annotated[AsyncSession, Depends(get_db)]

    @app.post("/items/{name}", status_code=201)
    async def add_item(name: str, session: Session) -> None:
        session.add(Item(name=name))

    @app.get("/count")
    async def count_items(session: Session) -> int:
        return await session.scalar(select(func.count()).select_from(Item))
"""

CONFTEST = """
    import pytest
    from shop import app, get_db

    from pgtoolset import create_db_dependency

    @pytest.fixture
    def anyio_backend():
        return "asyncio"

    @pytest.fixture
    def shop(pg_session_maker):
        app.dependency_overrides[get_db] = create_db_dependency(session_maker=pg_session_maker)
        yield app
        app.dependency_overrides.clear()
"""


@pytest.fixture
def shop(project: Project) -> Project:
    """A project with an API."""
    project.write(shop=SHOP, conftest=CONFTEST)
    return project


@pytest.mark.parametrize("options", [ASYNCIO, ASYNCIO_OF_THE_SESSION, ANYIO])
def test_client_with_a_loop_of_its_own(shop: Project, options: tuple[str, ...]) -> None:
    """A TestClient in an async test is refused before its first statement: the error names the
    fixtures and what to do, and the sessions of the test are as before."""
    shop.write(
        test_it="""
            import asyncio

            import pytest
            from fastapi.testclient import TestClient
            from models import Item
            from shop import get_db
            from sqlalchemy import func, select
            from sqlalchemy.exc import MissingGreenlet

            from pgtoolset.errors import TransactionStateError

            async def used(pg_session):
                pg_session.add(Item())
                await pg_session.commit()
                yield
                pg_session.add(Item())
                await pg_session.commit()
                assert await pg_session.scalar(select(func.count()).select_from(Item)) == 2

            async def test_maker(shop, pg_session):
                async for _ in used(pg_session):
                    with pytest.raises(TransactionStateError) as caught:
                        TestClient(shop).post("/items/lamp")
                    assert str(caught.value).startswith(
                        "pg_session and pg_session_maker use a connection of the event loop of the "
                        "test, and this statement runs in another event loop."
                    )
                    assert "pgtoolset.testing.create_test_client(app)" in str(caught.value)
                    assert "pytest.mark.pg_commit" in str(caught.value)

            async def test_session(shop, pg_session):
                shop.dependency_overrides[get_db] = lambda: pg_session
                with pytest.raises(TransactionStateError, match="^pg_session and"):
                    TestClient(shop).get("/count")

            async def test_no_loop(pg_session):
                await pg_session.connection()
                with pytest.raises(MissingGreenlet):
                    await asyncio.to_thread(pg_session.sync_session.scalar, select(1))

            @pytest.mark.pg_commit
            async def test_session_that_commits(shop, pg_session):
                await pg_session.connection()
                shop.dependency_overrides[get_db] = lambda: pg_session
                with pytest.raises(TransactionStateError, match="a connection of pg_engine"):
                    TestClient(shop).get("/count")
                await pg_session.rollback()

            @pytest.mark.pg_commit
            async def test_maker_that_commits(shop, pg_session):
                async for _ in used(pg_session):
                    assert TestClient(shop).get("/count").json() == 1
        """
    )
    outcome = shop.run(*options, *QUIET)
    assert outcome.counts == {"passed": 5}, outcome.output


def test_message_is_what_pytest_prints_last(shop: Project) -> None:
    """The failure of a test that does not expect it ends with our message."""
    shop.write(
        test_it="""
            from fastapi.testclient import TestClient

            async def test_it(shop):
                TestClient(shop).post("/items/lamp")
        """
    )
    outcome = shop.run(*QUIET)
    assert outcome.counts == {"failed": 1}, outcome.output
    errors = [line for line in outcome.output.splitlines() if line.startswith("E  ")]
    assert "TransactionStateError: pg_session and pg_session_maker use" in errors[0]
    assert len(errors) == 1
    assert "different loop" not in outcome.output
