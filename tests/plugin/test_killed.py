"""What a run leaves on a server and on the machine, whether it ends in order or is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.plugin.projects import LIMIT, Project, databases, outside_environment
from tests.support import until
from tests.testing.test_server import running_on

#: Signals, processes and files; the statements that drop databases are tested in test_workers.py.
pytestmark = pytest.mark.once

SLEEPERS = """
    import asyncio
    import os
    from pathlib import Path
    import pytest
    from models import Item

    @pytest.mark.parametrize("number", range(2))
    async def test_sleeps(pg_session, pg_server_url, number):
        pg_session.add(Item())
        await pg_session.commit()
        note = Path(f"asleep.{number}.new")
        note.write_text(pg_server_url)
        note.rename(f"asleep.{number}")
        await asyncio.sleep(600 if "SLEEP" in os.environ else 0)
"""


@contextmanager
def asleep(project: Project, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run of which every worker is in the middle of a test."""
    project.write(test_sleepers=SLEEPERS)
    with subprocess.Popen(
        project.command(*arguments),
        cwd=project.path,
        env={**outside_environment(), "SLEEP": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


async def all_asleep(project: Project, number: int) -> list[str]:
    """The server's URL as each of the workers knows it, once all are in their tests."""
    files = [project.path / f"asleep.{number}" for number in range(number)]
    await until(lambda: all(file.exists() for file in files), LIMIT)
    return [file.read_text() for file in files]


def is_over(process: subprocess.Popen[bytes]) -> bool:
    """Whether no process of the run is left, the workers included."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_databases_of_a_killed_run(
    project: Project, server_url: str, before: set[str]
) -> None:
    """The next run drops the databases that a killed run has left on a server."""
    with asleep(project, "-n", "2") as process:
        await all_asleep(project, 2)
        assert len(await databases(server_url) - before) == 2
        os.killpg(process.pid, signal.SIGKILL)
        await until(lambda: is_over(process), LIMIT)
    assert len(await databases(server_url) - before) == 2
    assert project.run().counts == {"passed": 2}
    assert await databases(server_url) == before


@pytest.mark.parametrize("whom", ["all processes", "the controller alone"])
async def test_embedded_server_of_a_killed_run(project: Project, whom: str) -> None:
    """The embedded server of all workers ends with the run, and so do its data and the workers."""
    project.server_url = None
    with asleep(project, "-n", "2") as process:
        first, second = await all_asleep(project, 2)
        assert first == second
        directory = Path(str(make_url(first).query["host"]))
        assert running_on(directory)
        if whom == "all processes":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        await until(lambda: not directory.exists() and not running_on(directory), LIMIT)
        await until(lambda: is_over(process), LIMIT)
    assert project.run().counts == {"passed": 2}


async def test_interrupted_run(project: Project, server_url: str, before: set[str]) -> None:
    """A run that is interrupted by Ctrl-C leaves no database."""
    with asleep(project) as process:
        await all_asleep(project, 1)
        process.send_signal(signal.SIGINT)
        await until(lambda: is_over(process), LIMIT)
    assert await databases(server_url) == before


#: A project whose own plugins end slowly. xdist kills a worker some time after it has finished.
SLOW_PLUGINS = """
    import asyncio
    import time
    from pathlib import Path

    import asyncpg
    import pytest
    from xdist.workermanage import NodeManager

    NodeManager.EXIT_TIMEOUT = 0.2

    async def names(url):
        connection = await asyncpg.connect(url)
        rows = await connection.fetch("SELECT datname FROM pg_database")
        await connection.close()
        return "\\n".join(row["datname"] for row in rows)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(session):
        if hasattr(session.config, "workerinput"):
            url = session.config.getoption("pg_url").replace("+asyncpg", "").replace("+psycopg", "")
            worker = session.config.workerinput["workerid"]
            Path(f"finished.{worker}").write_text(asyncio.run(names(url)))
            time.sleep(1 if worker == "gw0" else 0)

    def pytest_unconfigure(config):
        if hasattr(config, "workerinput"):
            Path(f"stays.{config.workerinput['workerid']}").touch()
            time.sleep(600)
"""


async def test_slow_plugins_of_a_worker(
    project: Project, server_url: str, before: set[str]
) -> None:
    """A worker has dropped its database before other plugins end their session, so xdist may kill
    it."""
    project.write(conftest=SLOW_PLUGINS, test_sleepers=SLEEPERS)
    outcome = project.run("-n", "2")
    assert outcome.counts == {"passed": 2}, outcome.output
    for worker in ("gw0", "gw1"):
        assert (project.path / f"stays.{worker}").exists()
        seen = set((project.path / f"finished.{worker}").read_text().splitlines()) - before
        assert not [name for name in seen if name.endswith(f"_{worker}")]
    assert await databases(server_url) == before


#: Notes what is on the server at the end, before any plugin hears of it and after all have.
NOTED = """
    import asyncio
    from pathlib import Path

    import asyncpg
    import pytest

    async def names(url):
        connection = await asyncpg.connect(url.replace("+asyncpg", "").replace("+psycopg", ""))
        rows = await connection.fetch("SELECT datname FROM pg_database")
        await connection.close()
        return "\\n".join(row["datname"] for row in rows)

    @pytest.fixture(scope="session")
    def pg_server_url(pg_server_url):
        yield pg_server_url
        Path("server ends").write_text(asyncio.run(names(pg_server_url)))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(session):
        url = session.config.getoption("pg_url")
        Path("session ends").write_text(asyncio.run(names(url)))
"""


@pytest.mark.parametrize("options", [(), ("-x",)], ids=["to the end", "stopped early"])
async def test_dropped_before_the_server_ends(
    project: Project, before: set[str], options: tuple[str, ...]
) -> None:
    """The database is dropped before a fixture of the project stops the server, after a failure
    too."""
    project.write(
        conftest=NOTED,
        test_it="""
            import pytest

            @pytest.mark.parametrize("number", range(2))
            async def test_it(pg_session, number):
                assert number
        """,
    )
    outcome = project.run(*options)
    assert outcome.counts == ({"failed": 1} if options else {"failed": 1, "passed": 1})
    for moment in ("server ends", "session ends"):
        seen = set((project.path / moment).read_text().splitlines())
        assert {name for name in seen if not name.startswith("pgtoolset_template_")} == before


async def test_unused_database(project: Project, before: set[str]) -> None:
    """A database that was made for a test that did not run is dropped as well."""
    project.write(
        conftest=NOTED,
        test_it="""
            def test_fails():
                assert False

            async def test_it(pg_session): ...
        """,
    )
    outcome = project.run("-x")
    assert outcome.counts == {"failed": 1}
    seen = set((project.path / "session ends").read_text().splitlines())
    assert {name for name in seen if not name.startswith("pgtoolset_template_")} == before
