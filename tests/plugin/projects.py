"""Projects of users, written to a folder and tested by a pytest of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import asyncpg

from tests.support import plain_url

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


class Project:
    """A folder with tests, and the server that they use: none means an embedded one of their
    own."""

    def __init__(self, path: Path, server_url: str | None) -> None:
        self.path = path
        self.server_url = server_url

    def write(self, **files: str) -> None:
        """Write `test_x="..."` to test_x.py; the name pytest_ini stands for pytest.ini."""
        for name, content in files.items():
            file = self.path / ("pytest.ini" if name == "pytest_ini" else f"{name}.py")
            file.write_text(dedent(content))

    def command(self, *arguments: str) -> list[str]:
        server = ["--pg-url", self.server_url] if self.server_url else []
        return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *server, *arguments]

    @property
    def environment(self) -> Mapping[str, str]:
        """That of this process, without what it says about this very run."""
        ours = ("DATABASE_URL", "PYTEST_", "COV_CORE_")
        return {name: value for name, value in os.environ.items() if not name.startswith(ours)}

    def run(self, *arguments: str, **environment: str) -> Outcome:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.path,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
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
