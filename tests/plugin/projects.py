"""Projects of users, written to a folder and tested by a pytest of their own."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import asyncpg

from tests.support import plain_url

#: Seconds that a run may take on a busy machine.
LIMIT = 300

#: Hypothesis imports itself at the end of every run, which takes longer than the run.
QUICK = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")

USER_PROJECT = Path(__file__).with_name("user_project")

#: Options for pytest-asyncio and for anyio: tests need no marker of either.
ASYNCIO = ("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function")
ASYNCIO_OF_THE_SESSION = (
    *("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=session"),
    *("-o", "asyncio_default_test_loop_scope=session"),
)
ANYIO = ("-p", "no:asyncio", "-o", "anyio_mode=auto")

MODELS = """
    from sqlalchemy import MetaData
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(default="")

    empty = MetaData()
    nothing = None
"""


@dataclass
class Outcome:
    """What a run of pytest printed, and how it ended."""

    code: int
    output: str

    @property
    def counts(self) -> dict[str, int]:
        """`{"passed": 3, "error": 1}`, from the last line."""
        last = self.output.rstrip().rpartition("\n")[2]
        found = re.findall(r"(\d+) (passed|failed|skipped|error|warning)", last)
        return {word: int(number) for number, word in found}


class Warm:
    """A process that runs pytest without starting an interpreter; see warm.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Warm]:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py"))],
            env=outside_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            with process:
                yield cls(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def run(self, folder: Path, arguments: list[str], environment: Mapping[str, str]) -> Outcome:
        """Run pytest in a folder."""
        with tempfile.NamedTemporaryFile("r") as output:
            request = {"folder": str(folder), "arguments": arguments, "output": output.name}
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request | {"environment": {**environment}}) + "\n")
            self._process.stdin.flush()
            readable, _, _ = select.select([self._process.stdout], [], [], LIMIT)
            if not readable:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise AssertionError(f"not over in {LIMIT} s: {output.read()}")
            return Outcome(int(self._process.stdout.readline()), output.read())


def outside_environment() -> dict[str, str]:
    """The environment of this process, without what belongs to this run of pytest.

    A project has no bytecode: a test may write a file twice in the second that tells its versions
    apart.
    """
    ours = ("DATABASE_URL", "PYTEST_", "COV_CORE_")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return outside | {"PYTHONDONTWRITEBYTECODE": "1"}


class Project:
    """A folder with tests.

    Args:
        path: the folder.
        server_url: the server that the tests use; `None` for an embedded one of their own.
        warm: runs them; without it each run starts an interpreter.
    """

    def __init__(self, path: Path, server_url: str | None, warm: Warm | None = None) -> None:
        self.path = path
        self.server_url = server_url
        self._warm = warm

    def write(self, **files: str) -> None:
        """Write `test_x="..."` to test_x.py; the name pytest_ini stands for pytest.ini."""
        for name, content in files.items():
            file = self.path / ("pytest.ini" if name == "pytest_ini" else f"{name}.py")
            file.write_text(dedent(content))

    def arguments(self, *arguments: str) -> list[str]:
        server = ["--pg-url", self.server_url] if self.server_url else []
        return [*QUICK, *server, *arguments]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pytest", *self.arguments(*arguments)]

    def run(self, *arguments: str, **environment: str) -> Outcome:
        """Run the tests, in the warm process where there is one."""
        environ = {**outside_environment(), **environment}
        if self._warm is not None:
            return self._warm.run(self.path, self.arguments(*arguments), environ)
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        return Outcome(done.returncode, done.stdout)


async def databases(server_url: str) -> set[str]:
    """The databases on a server that are not templates."""
    connection = await asyncpg.connect(plain_url(server_url))
    try:
        rows = await connection.fetch("SELECT datname FROM pg_database")
    finally:
        await connection.close()
    return {row["datname"] for row in rows if not row["datname"].startswith("pgtoolset_template_")}
