"""The fixtures of the pytest plugin, in projects that a pytest of their own tests."""

from __future__ import annotations

import pytest

from tests.plugin.projects import ANYIO, ASYNCIO, ASYNCIO_OF_THE_SESSION, Project, databases

SCOPES = ("function", "class", "module", "package", "session")


@pytest.mark.parametrize(
    "options",
    [(*ASYNCIO, "-n", "2"), ASYNCIO_OF_THE_SESSION, ANYIO],
    ids=["asyncio by two workers", "asyncio in one loop", "anyio"],
)
async def test_user_project(
    user_project: Project, server_url: str, before: set[str], options: tuple[str, ...]
) -> None:
    """The fixtures keep their promises under pytest-asyncio and anyio, in one process and two, with
    loops of any scope; no database is left."""
    outcome = user_project.run(*options)
    assert outcome.counts == {"passed": 21}, outcome.output
    assert await databases(server_url) == before


def test_plugins_that_are_named(project: Project) -> None:
    """Where pytest loads no plugin by itself, pytest-asyncio may be named by its module."""
    project.write(
        test_it="""
            from models import Item

            async def test(pg_session):
                pg_session.add(Item())
                await pg_session.commit()
        """
    )
    named = ("-p", "pytest_asyncio.plugin", "-p", "pytest_pgtoolset")
    outcome = project.run(*named, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert outcome.counts == {"passed": 1}, outcome.output


def test_strict_mode_and_every_scope_in_one_module(project: Project) -> None:
    """In strict mode no fixture needs a decorator, and the tests of one module run in loops of
    every scope in turn."""
    project.write(
        test_scopes=f"""
            import pytest
            from models import Item
            from sqlalchemy import func, select

            SCOPES = {SCOPES}

            def make(scope):
                @pytest.mark.asyncio(loop_scope=scope)
                async def test(pg_session, pg_session_maker):
                    assert await pg_session.scalar(select(func.count()).select_from(Item)) == 0
                    async with pg_session_maker.begin() as session:
                        session.add(Item())
                    assert await pg_session.scalar(select(func.count()).select_from(Item)) == 1
                return test

            for number in range(3):
                for scope in SCOPES:
                    globals()[f"test_{{number}}_{{scope}}"] = make(scope)

            @pytest.mark.anyio
            async def test_of_anyio(pg_session):
                assert await pg_session.scalar(select(func.count()).select_from(Item)) == 0

            @pytest.fixture
            def anyio_backend():
                return "asyncio", {{"debug": True}}
        """
    )
    assert project.run("-o", "asyncio_mode=strict").counts == {"passed": 16}


def test_deferred_constraint_at_the_end(user_project: Project) -> None:
    """A test that passes and leaves a violation of a deferred constraint is an error."""
    user_project.write(
        test_inventory="""
            from inventory import Part
            import pytest

            async def test_violation(pg_session):
                pg_session.add(Part(item_id=1))
                await pg_session.flush()

            async def test_failure_is_one_error(pg_session):
                pg_session.add(Part(item_id=1))
                await pg_session.flush()
                assert False

            async def test_what_comes_after(pg_session):
                assert await pg_session.get(Part, 1) is None
        """
    )
    outcome = user_project.run(*ASYNCIO)
    assert outcome.counts == {"passed": 2, "failed": 1, "error": 1}
    assert "ERROR at teardown of test_violation" in outcome.output
    assert 'violates foreign key constraint "part_item_id_fkey"' in outcome.output


def test_transaction_that_the_test_ends_itself(project: Project) -> None:
    """A COMMIT past the session is an error that names the marker."""
    project.write(
        test_commit="""
            from sqlalchemy import text

            async def test_commit(pg_session):
                await pg_session.execute(text("SELECT 1"))
                connection = await pg_session.connection()
                raw = await connection.get_raw_connection()
                await raw.driver_connection.execute("COMMIT")
        """
    )
    outcome = project.run()
    assert outcome.counts == {"passed": 1, "error": 1}
    assert "mark it with pytest.mark.pg_commit" in outcome.output


def test_work_that_a_test_leaves_running(project: Project) -> None:
    """A task that still uses the connection when its test ends is an error of that test only."""
    project.write(
        test_tasks="""
            import asyncio
            import pytest
            from sqlalchemy import text
            from sqlalchemy.exc import DBAPIError

            async def until_running(pg_engine, expected):
                statement = "SELECT pg_sleep(600)"
                running = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query = :query"
                found = not expected
                while found is not expected:
                    async with pg_engine.connect() as connection:
                        rows = await connection.execute(text(running), {"query": statement})
                        found = bool(rows.all())

            async def test_leaves_a_task(pg_session, pg_engine):
                global task
                task = asyncio.create_task(pg_session.execute(text("SELECT pg_sleep(600)")))
                await until_running(pg_engine, True)

            async def test_next(pg_session, pg_engine):
                assert await pg_session.scalar(text("SELECT 1")) == 1
                with pytest.raises(DBAPIError):
                    await task
                await until_running(pg_engine, False)  # PostgreSQL has cancelled the statement
        """
    )
    outcome = project.run("-o", "asyncio_default_test_loop_scope=session")
    assert outcome.counts == {"passed": 2, "error": 1}, outcome.output
    assert "still uses the connection of its sessions" in outcome.output


def test_what_tests_leave_after_real_commits(project: Project) -> None:
    """The restore ignores tables that a test has made; a transaction that is still open is one
    error."""
    project.write(
        test_commits="""
            import pytest
            from models import Item
            from sqlalchemy import func, select, text

            pytestmark = pytest.mark.pg_commit

            async def test_makes_a_table(pg_engine):
                async with pg_engine.begin() as connection:
                    await connection.execute(text("INSERT INTO item (id, name) VALUES (7, '')"))
                    await connection.execute(text("CREATE TABLE mine AS SELECT 7 AS id"))
                    reference = "ALTER TABLE mine ADD FOREIGN KEY (id) REFERENCES item"
                    await connection.execute(text(reference))

            async def test_leaves_a_transaction_open(pg_engine, pg_session):
                global connection
                assert await pg_session.scalar(select(func.count()).select_from(Item)) == 0
                connection = await pg_engine.connect()
                await connection.execute(text("INSERT INTO item (id, name) VALUES (8, '')"))
                pg_session.add(Item())
                await pg_session.commit()

            async def test_next(pg_session):
                assert await pg_session.scalar(select(func.count()).select_from(Item)) == 0
                await connection.invalidate()
                await connection.close()
        """
    )
    outcome = project.run("-o", "asyncio_default_test_loop_scope=session")
    assert outcome.counts == {"passed": 3, "error": 1}, outcome.output
    assert "ERROR at teardown of test_leaves_a_transaction_open" in outcome.output
    assert "LockTimeoutError" in outcome.output


def test_options_of_sessions(project: Project) -> None:
    """A project has sessions of a class of its own by overriding `pg_session_options`."""
    project.write(
        conftest="""
            import pytest
            from sqlalchemy.ext.asyncio import AsyncSession

            class Session(AsyncSession):
                pass

            @pytest.fixture(scope="session")
            def pg_session_options():
                return {"class_": Session, "expire_on_commit": True, "info": {"tenant": 1}}
        """,
        test_options="""
            import pytest
            from models import Item
            from conftest import Session
            from sqlalchemy import inspect

            marked = pytest.param(True, marks=pytest.mark.pg_commit)

            @pytest.mark.parametrize("marked", [False, marked])
            async def test_options(pg_session, pg_session_maker, marked):
                for session in (pg_session, pg_session_maker()):
                    assert isinstance(session, Session) and session.info["tenant"] == 1
                item = Item(name="lamp")
                pg_session.add(item)
                await pg_session.commit()
                assert inspect(item).expired
        """,
    )
    assert project.run().counts == {"passed": 2}


def test_bad_module(project: Project) -> None:
    """A wrong pg_metadata is a usage error of the test that needs it, and the error names it."""
    ini = (project.path / "pytest.ini").read_text().replace("models:Base", "nowhere:Base")
    project.write(test_it="async def test_it(pg_session): ...", pytest_ini=ini)
    outcome = project.run()
    assert outcome.counts == {"error": 1}, outcome.output
    complaint = "pg_metadata = nowhere:Base: importing nowhere failed"
    assert f"UsageError: the ini option {complaint}" in outcome.output


#: A port of the loopback interface on which no server listens, and a password that is not shown.
