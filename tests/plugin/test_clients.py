"""The fixture pg_client: Starlette's TestClient in sync tests, whose changes are rolled back."""

from __future__ import annotations

from tests.plugin.projects import ANYIO, ASYNCIO, Project
from tests.plugin.test_loops import QUIET

APP = """
    from contextlib import asynccontextmanager
    from typing import Annotated

    from fastapi import Depends, FastAPI, Request, WebSocket
    from models import Item
    from sqlalchemy import func, select
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from pgtoolset import create_db_dependency

    seen = []

    @asynccontextmanager
    async def lifespan(app):
        seen.append("startup")
        yield {"greeting": "hello"}
        seen.append("shutdown")

    get_db = create_db_dependency(session_maker=async_sessionmaker())
    app = FastAPI(lifespan=lifespan)
    Session = Annotated[AsyncSession, Depends(get_db)]

    async def count(session):
        return await session.scalar(select(func.count()).select_from(Item))

    @app.post("/items/{name}", status_code=201)
    async def add_item(name: str, session: Session, request: Request) -> str:
        session.add(Item(name=name))
        return request.state.greeting

    @app.websocket("/count")
    async def send_count(socket: WebSocket, session: Session) -> None:
        await socket.accept()
        number = await count(session)
        await session.commit()  # a client that leaves cancels the application
        await socket.send_json(number)
        await socket.close()
"""

TESTS = """
    import pytest
    from app import app, count, get_db, seen
    from models import Item
    from sqlalchemy import create_engine, text
    from sqlalchemy.ext.asyncio import AsyncSession

    from pgtoolset import create_db_dependency

    @pytest.fixture(autouse=True)
    def put_back():
        yield
        assert app.dependency_overrides == {}
        assert seen in ([], ["startup", "shutdown"])
        seen.clear()

    @pytest.fixture
    def client(put_back, pg_client, pg_session_maker):
        override = create_db_dependency(session_maker=pg_session_maker)
        with pg_client(app, dependency_overrides={get_db: override}) as client:
            yield client

    async def add_table(session):
        session.add(Item(name="table"))
        await session.commit()

    @pytest.mark.parametrize("number", range(3))
    def test_rolled_back(client, pg_session, pg_engine, number):
        assert seen == ["startup"]
        client.portal.call(add_table, pg_session)
        response = client.post("/items/lamp")
        assert (response.status_code, response.json()) == (201, "hello")
        with client.websocket_connect("/count") as socket:
            assert socket.receive_json() == 2
        assert client.portal.call(count, pg_session) == 2

        async def seen_by_others():
            async with AsyncSession(pg_engine) as other:
                return await count(other)

        assert client.portal.call(seen_by_others) == 0

    @pytest.mark.pg_commit
    @pytest.mark.parametrize("number", range(2))
    def test_committed(client, pg_session, pg_engine, number):
        client.portal.call(add_table, pg_session)
        assert client.post("/items/lamp").status_code == 201

        async def seen_by_others():
            async with AsyncSession(pg_engine) as other:
                return await count(other)

        assert client.portal.call(seen_by_others) == 2

    def test_options(pg_client):
        client = pg_client(app, lifespan=False, base_url="http://shop.example")
        assert client.base_url == "http://shop.example"
        assert seen == []
        with pytest.raises(TypeError, match="dependency_overrides must"):
            pg_client(app, dependency_overrides=[get_db])

    def test_without_a_client():
        assert seen == []
"""


def test_sync_tests(project: Project) -> None:
    """The requests of a sync test share the transaction of its sessions, which is rolled back, or
    commit with pg_commit; the lifespan runs, WebSockets work, and the overrides are put back."""
    project.write(app=APP, test_it=TESTS)
    for options in (ASYNCIO, ANYIO):
        outcome = project.run(*options, *QUIET)
        assert outcome.counts == {"passed": 7}, outcome.output


def test_failures_are_of_their_test(project: Project) -> None:
    """A violation of a deferred constraint, and an async test that asks for it, are errors of that
    test alone."""
    project.write(
        app=APP,
        test_it="""
            import pytest
            from app import app, count, get_db
            from sqlalchemy import text

            from pgtoolset import create_db_dependency

            async def test_async(pg_client): ...

            async def violate(session):
                await session.execute(
                    text("CREATE TABLE one (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
                )
                await session.execute(text("INSERT INTO one VALUES (1), (1)"))

            def test_violation(pg_client, pg_session):
                pg_client(app).portal.call(violate, pg_session)

            def test_next(pg_client, pg_session):
                assert pg_client(app).portal.call(count, pg_session) == 0

            async def test_next_async(pg_session):
                assert await count(pg_session) == 0
        """,
    )
    outcome = project.run(*QUIET)
    assert outcome.counts == {"passed": 3, "error": 2}, outcome.output
    assert "pg_client is for sync tests, and test_async runs in an event loop" in outcome.output
    assert "ERROR at teardown of test_violation" in outcome.output
