"""Runs that are killed, and what the next run finds of them: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.plugin.projects import Project, databases
from tests.support import until
from tests.testing.test_server import running_on

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
        Path(f"asleep.{number}").write_text(pg_server_url)
        await asyncio.sleep(60 if "SLEEP" in os.environ else 0)
"""


@contextmanager
def asleep(project: Project, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run of which every worker is in the middle of a test."""
    project.write(test_sleepers=SLEEPERS)
    with subprocess.Popen(
        project.command(*arguments),
        cwd=project.path,
        env={**project.environment, "SLEEP": "1"},
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
    await until(lambda: all(file.exists() and file.read_text() for file in files), 60)
    return [file.read_text() for file in files]


def is_over(process: subprocess.Popen[bytes]) -> bool:
    """Whether no process of the run is left, the workers included."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_databases_of_a_killed_run(project: Project, server_url: str) -> None:
    """On a server that stays a killed run leaves its databases; the next run drops them."""
    before = await databases(server_url)
    with asleep(project, "-n", "2") as process:
        await all_asleep(project, 2)
        assert len(await databases(server_url) - before) == 2
        os.killpg(process.pid, signal.SIGKILL)
        await until(lambda: is_over(process))
    assert len(await databases(server_url) - before) == 2
    assert project.run("-n", "2").counts == {"passed": 2}
    assert await databases(server_url) == before


@pytest.mark.parametrize("whom", ["everybody", "the controller alone"])
async def test_embedded_server_of_a_killed_run(project: Project, whom: str) -> None:
    """All workers are on one embedded server; it ends with the run, and so do its data and the
    workers."""
    project.server_url = None
    with asleep(project, "-n", "2") as process:
        first, second = await all_asleep(project, 2)
        assert first == second
        directory = Path(str(make_url(first).query["host"]))
        assert running_on(directory)
        if whom == "everybody":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        await until(lambda: not running_on(directory) and not directory.exists(), 20)
        await until(lambda: is_over(process), 30)
    assert project.run("-n", "2").counts == {"passed": 2}


async def test_interrupted_run(project: Project, server_url: str) -> None:
    """Ctrl-C leaves nothing for the next run to drop."""
    before = await databases(server_url)
    with asleep(project) as process:
        await until(lambda: (project.path / "asleep.0").exists(), 60)
        process.send_signal(signal.SIGINT)
        await until(lambda: is_over(process), 20)
    assert await databases(server_url) == before
