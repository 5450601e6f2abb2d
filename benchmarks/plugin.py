"""What a test pays for `pg_session`, and how soon the first one runs. Run as `python -m
benchmarks.plugin`.

A project with a hundred tests is written to a folder and tested by pytest itself, in fresh
processes, with no other plugins than pytest-asyncio and this one: those that happen to be installed
here would be timed as well. Each test inserts a row and commits. What is counted is what pytest
reports for the setup and the teardown of a test, the first test left out; the same loop scopes with
fixtures written by hand, as SQLAlchemy's documentation has them, stand beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

from benchmarks._declared import Benchmark, Experiment, Measure, at_most
from benchmarks._harness import TURN_LIMIT, Figures, Spread, Turn, plain
from benchmarks._run import alone

TESTS = 50

FILES = {
    "shop.py": """
        from sqlalchemy import Column, Integer, Table, Text
        from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

        class Base(DeclarativeBase):
            pass

        class Item(Base):
            __tablename__ = "item"

            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]

        for number in range(49):
            key, name = Column("id", Integer, primary_key=True), Column("name", Text)
            Table(f"other_{number}", Base.metadata, key, name)
    """,
    "conftest.py": """
        import json
        import os
        import time
        from collections import defaultdict
        import pytest
        from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

        spent = defaultdict(float)

        def pytest_runtest_logreport(report):
            if report.when != "call":
                spent[report.nodeid] += report.duration

        def pytest_runtest_call(item):
            spent.setdefault("first", time.time())

        def pytest_sessionfinish():
            with open(os.environ["RESULT"], "w") as result:
                first = spent.pop("first", 0)
                json.dump({"first": first, "tests": list(spent.values())[1:]}, result)

        @pytest.fixture
        async def by_hand(pg_database_url):
            engine = create_async_engine(pg_database_url)
            async with engine.connect() as connection:
                transaction = await connection.begin()
                async with AsyncSession(
                    connection, join_transaction_mode="create_savepoint"
                ) as session:
                    yield session
                await transaction.rollback()
            await engine.dispose()
    """,
    "test_shop.py": f"""
        import pytest
        from shop import Item

        @pytest.mark.parametrize("number", range({TESTS}))
        async def test_plugin(pg_session, number):
            pg_session.add(Item(name="lamp"))
            await pg_session.commit()

        @pytest.mark.parametrize("number", range({TESTS}))
        async def test_by_hand(by_hand, number):
            by_hand.add(Item(name="lamp"))
            await by_hand.commit()

        async def test_without_a_database():
            assert Item.__table__.name == "item"

        @pytest.mark.pg_commit
        @pytest.mark.parametrize("number", range({TESTS}))
        async def test_committing(pg_session, number):
            pg_session.add(Item(name="lamp"))
            await pg_session.commit()
    """,
    "pytest.ini": """
        [pytest]
        pythonpath = .
        pg_metadata = shop:Base
    """,
}

#: All plugins that the project has, by the names of their entry points.
PLUGINS = ["-p", "asyncio", "-p", "pgtoolset"]

ASYNCIO = ["-o", "asyncio_mode=auto", "-o"]
SESSION = [
    *ASYNCIO,
    "asyncio_default_fixture_loop_scope=session",
    "-o",
    "asyncio_default_test_loop_scope=session",
]
FUNCTION = [*ASYNCIO, "asyncio_default_fixture_loop_scope=function"]


def run(folder: Path, *options: str) -> Figures:
    """Seconds from the command to the first test, and those in which each of the others was set up
    and torn down."""
    ours = ("DATABASE_URL", "PYTEST_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    result = folder / "result"
    environ |= {"RESULT": str(result), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    start = time.time()
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PLUGINS, *options],
        check=True,
        cwd=folder,
        env=environ,
        stdout=subprocess.DEVNULL,
        timeout=TURN_LIMIT,
    )
    told = json.loads(result.read_text())
    return {"first": told["first"] - start, "test": Spread.of(told["tests"] or [0.0]).median}


@asynccontextmanager
async def contestants(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in FILES.items():
            (folder / file).write_text(dedent(content))
        server = ["--pg-url", plain(url)]

        def project(*options: str) -> Turn:
            return partial(asyncio.to_thread, run, folder, *options)

        first = ["-k", "plugin and 0", "-x"]
        yield {
            "session": project(*server, *SESSION, "-k", "plugin"),
            "function": project(*server, *FUNCTION, "-k", "plugin"),
            "by hand, function": project(*server, *FUNCTION, "-k", "by_hand"),
            "by hand, session": project(*server, *SESSION, "-k", "by_hand"),
            "committing": project(*server, *SESSION, "-k", "committing"),
            "embedded": project(*SESSION, *first),
            "server": project(*server, *SESSION, *first),
            "no database": project(*SESSION, "-k", "without_a_database"),
        }


def milliseconds(name: str, what: str, contestant: str, limit: float | None = None) -> Measure:
    """Setup and teardown of a test."""
    target = None if limit is None else at_most(limit)
    return Measure(name, what, contestant, of="test", unit="ms", scale=1000, target=target)


BY_HAND = "fixtures by hand, an engine for each test"
SETUP = "setup and teardown with `pg_session`"

BENCHMARK = Benchmark(
    title="The pytest plugin",
    about=f"{TESTS} tests that insert a row and commit, in a project with 50 tables.",
    packages=("pytest", "pytest-asyncio"),
    experiments=(
        Experiment(
            "Tests of a project",
            contestants,
            (
                milliseconds("reset", f"{SETUP}, loops of the session", "session", 5),
                milliseconds("reset-function", f"{SETUP}, loops of the function", "function", 5),
                milliseconds("committing", f"{SETUP} and `pg_commit`", "committing"),
                Measure(
                    "reset-by-hand",
                    f"{SETUP}, loops of the session",
                    "session",
                    BY_HAND,
                    "by hand, session",
                    of="test",
                ),
                Measure(
                    "reset-function-by-hand",
                    f"{SETUP}, loops of the function",
                    "function",
                    BY_HAND,
                    "by hand, function",
                    of="test",
                ),
                Measure(
                    "first",
                    "from the command to the first test, embedded server",
                    "embedded",
                    of="first",
                    unit="s",
                    target=at_most(4),
                ),
                Measure(
                    "first-server",
                    "from the command to the first test, a server that is there",
                    "server",
                    of="first",
                    unit="s",
                    target=at_most(4),
                ),
                Measure(
                    "first-no-database",
                    "from the command to the first test, one that needs no database",
                    "no database",
                    of="first",
                    unit="s",
                ),
            ),
            note="A connection of asyncpg belongs to one loop. With a loop for each function, each "
            "test connects again, in 5 to 7 ms on this machine.",
            seconds=25,
            warm_up=0,
        ),
    ),
)

if __name__ == "__main__":
    alone("plugin")
