"""The programs of the how-tos, where more can go wrong than their pages show."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import uvloop
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from pgtoolset import LockTimeoutError, RowWatcher, create_db_context, lock_tables
from tests.docs import howtos
from tests.plugin.projects import Project, Warm
from tests.support import Account, Base, plain_url, until

pytestmark = pytest.mark.asyncpg(reason="the snippets of the documentation")

#: A deprecation of the test client of Starlette, and of the policies of asyncio.
QUIET = ("-W", "ignore::DeprecationWarning", "-W", "ignore::UserWarning")

#: Seconds that a program may take on a busy machine.
LIMIT = 60.0


async def test_workers_of_uvicorn(empty_database_url: str, folder: Path) -> None:
    """Each worker process makes an engine of its own, and SIGTERM ends them without a session
    that is left."""
    howtos.write_files("fastapi.md", folder)
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "app:app", "--port", "0", "--workers", "2"),
        cwd=folder,
        stderr=asyncio.subprocess.PIPE,
    )
    lines: list[str] = []
    observer = await asyncpg.connect(plain_url(empty_database_url))
    sessions = """SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()"""
    try:
        assert server.stderr is not None
        async with asyncio.timeout(LIMIT):
            while not any("startup complete" in line for line in lines):
                lines.append((await server.stderr.readline()).decode())
        address = re.search(r"running on (http://[\d.:]+)", "".join(lines))
        assert address is not None, lines
        processes: set[int] = set()

        async def both_have_answered() -> bool:
            async with httpx.AsyncClient(base_url=address[1], timeout=LIMIT) as client:
                answers = [await client.get("/time"), await client.get("/process")]
            assert [each.status_code for each in answers] == [200, 200]
            processes.add(answers[1].json())
            return len(processes) == 2 and await observer.fetchval(sessions) > 0

        await until(both_have_answered)
        server.terminate()
        rest = (await asyncio.wait_for(server.stderr.read(), LIMIT)).decode()
        assert rest.count("Application shutdown complete") == 2, rest
        assert await server.wait() == 0

        async def none_is_left() -> bool:
            return await observer.fetchval(sessions) == 0

        await until(none_is_left)
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()
        await observer.close()


@pytest.fixture
async def a_worker(
    empty_database_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, asyncpg.Connection]:
    """The worker of the how-to, and a connection that holds up its only job."""
    howtos.write_files("workers.md", folder)
    worker, jobs = importlib.import_module("worker"), importlib.import_module("jobs")
    engine = create_async_engine(empty_database_url)
    async with engine.begin() as connection:
        await connection.run_sync(jobs.Base.metadata.create_all)
        await connection.execute(text("INSERT INTO worker_job VALUES (1, 7, false)"))
    await engine.dispose()

    async def handle(session: Any, job: Any) -> None:
        await session.execute(text("SELECT pg_advisory_xact_lock(1)"))

    monkeypatch.setattr(worker, "handle", handle)
    observer = await asyncpg.connect(plain_url(empty_database_url))
    await observer.execute("SELECT pg_advisory_lock(1)")
    return worker, observer


async def stopped(worker: Any, observer: asyncpg.Connection) -> asyncio.Task[None]:
    """Start the worker's program, and send SIGTERM while it works on the job."""
    program = asyncio.create_task(worker.main())

    async def it_works() -> bool:
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        return await observer.fetchval(waits) == 1

    await until(it_works)
    os.kill(os.getpid(), signal.SIGTERM)
    return program


async def test_a_worker_ends_its_job(a_worker: tuple[Any, asyncpg.Connection]) -> None:
    """After SIGTERM the worker completes the job that runs, and ends."""
    worker, observer = a_worker
    program = await stopped(worker, observer)
    await asyncio.sleep(0)
    assert not program.done()
    await observer.execute("SELECT pg_advisory_unlock(1)")
    await asyncio.wait_for(program, LIMIT)
    assert await observer.fetchval("SELECT done FROM worker_job")
    await observer.close()


async def test_a_worker_gives_up_its_job(
    a_worker: tuple[Any, asyncpg.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that goes on for longer than the grace is rolled back, and its lock released."""
    worker, observer = a_worker
    monkeypatch.setattr(worker, "GRACE", 0.05)
    await asyncio.wait_for(await stopped(worker, observer), LIMIT)
    assert not await observer.fetchval("SELECT done FROM worker_job FOR UPDATE NOWAIT")
    await observer.close()


def test_uvloop(database_url: str) -> None:
    """Under uvloop a cancelled commit is completed, a lock times out, and a watcher sees a
    change."""

    async def program() -> None:
        assert type(asyncio.get_running_loop()).__module__ == "uvloop"
        engine = create_async_engine(database_url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(text("DELETE FROM account"))
        session_maker = async_sessionmaker(engine, expire_on_commit=False)
        db_context = create_db_context(session_maker)
        committing = asyncio.Event()

        async def unit() -> None:
            async with db_context() as session:
                session.add(Account(id=1, balance=100))
                await session.flush()
                committing.set()

        task = asyncio.create_task(unit())
        await committing.wait()
        task.cancel()  # its COMMIT is sent, or about to be
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        async with db_context() as session:
            stored = await session.get(Account, 1) is not None
            assert stored == (outcome is None)
            if not stored:
                session.add(Account(id=1, balance=100))
        async with session_maker() as holder, lock_tables(holder, [Account], mode="EXCLUSIVE"):
            async with session_maker() as session:
                with pytest.raises(LockTimeoutError) as caught:
                    async with lock_tables(session, [Account], mode="EXCLUSIVE", timeout="300ms"):
                        raise AssertionError
                assert caught.value.blockers
        async with RowWatcher(engine, interval=0.05) as watcher:
            async with watcher.changes(Account, 1) as changes:
                async with db_context() as session:
                    (await session.get_one(Account, 1)).balance = 90
                async with asyncio.timeout(LIMIT):
                    assert (await anext(changes)).after == {"id": 1, "balance": 90}
        async with engine.begin() as connection:
            await connection.execute(text("DELETE FROM account"))
        await engine.dispose()

    uvloop.run(program())


@pytest.fixture
def project(tmp_path: Path, server_url: str, warm: Warm) -> Project:
    return Project(tmp_path, server_url, warm)


def test_tests_of_an_application(project: Project) -> None:
    """The tests of the how-to pass, in two processes of pytest-xdist."""
    howtos.write_files("pytest.md", project.path)
    outcome = project.run("-n", "2", *QUIET)
    assert outcome.counts == {"passed": 4}, outcome.output


def test_tests_under_uvloop(project: Project) -> None:
    """The fixtures work in a loop of uvloop."""
    howtos.write_files("pytest.md", project.path)
    conftest = (project.path / "conftest.py").read_text()
    howtos.write_files("uvloop.md", project.path)
    loop = (project.path / "conftest.py").read_text()
    project.write(
        conftest=f"{loop}\n{conftest}",
        test_loop="""
            import asyncio

            async def test_loop(client):
                assert type(asyncio.get_running_loop()).__module__ == "uvloop"
        """,
    )
    outcome = project.run(*QUIET)
    assert outcome.counts == {"passed": 5}, outcome.output


def test_tests_with_sqlmodel(project: Project) -> None:
    """The sessions of the fixtures are SQLModel's."""
    howtos.write_files("sqlmodel.md", project.path)
    project.write(
        test_heroes="""
            from app import Hero
            from sqlmodel import select
            from sqlmodel.ext.asyncio.session import AsyncSession

            async def test_heroes(pg_session):
                assert isinstance(pg_session, AsyncSession)
                pg_session.add(Hero(name="Ada"))
                await pg_session.commit()
                assert (await pg_session.exec(select(Hero.name))).all() == ["Ada"]
        """
    )
    outcome = project.run(
        "-o", "pg_metadata=app:SQLModel", "-o", "asyncio_mode=auto", "-o", "pythonpath=."
    )
    assert outcome.counts == {"passed": 1}, outcome.output
