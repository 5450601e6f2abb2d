"""What a test pays for `pg_session`, and how soon the first one runs. Run as `python -m
benchmarks.plugin`.

A project with a hundred tests is written to a folder and tested by pytest itself, in fresh
processes. Each test inserts a row and commits. What is counted is what pytest reports for the setup
and the teardown of a test, the first test left out; the same loop scopes with fixtures written by
hand, as SQLAlchemy's documentation has them, stand beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

from benchmarks._harness import Spread, alternate, environment, headline, tell
from pgtoolset.testing import EmbeddedServer

TESTS = 100

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

ASYNCIO = ["-o", "asyncio_mode=auto", "-o"]
SESSION = [
    *ASYNCIO,
    "asyncio_default_fixture_loop_scope=session",
    "-o",
    "asyncio_default_test_loop_scope=session",
]
FUNCTION = [*ASYNCIO, "asyncio_default_fixture_loop_scope=function"]


def run(folder: Path, *options: str) -> tuple[float, list[float]]:
    """Seconds from the command to the first test, and milliseconds that each of the others was set
    up and torn down."""
    ours = ("DATABASE_URL", "PYTEST_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    result = folder / "result"
    start = time.time()
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        check=True,
        cwd=folder,
        env={**environ, "RESULT": str(result)},
        stdout=subprocess.DEVNULL,
    )
    told = json.loads(result.read_text())
    return told["first"] - start, [1000 * each for each in told["tests"]]


async def measure(rounds: int) -> None:
    environment("sqlalchemy", "asyncpg", "pytest", "pytest-asyncio")
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in FILES.items():
            (folder / file).write_text(dedent(content))
        with EmbeddedServer() as server:
            url = ["--pg-url", server.url()]

            async def reset(test: str, scopes: list[str]) -> float:
                return Spread.of(run(folder, *url, *scopes, "-k", test)[1]).median

            results = await alternate(
                {
                    "session": lambda: reset("plugin", SESSION),
                    "function": lambda: reset("plugin", FUNCTION),
                    "by hand": lambda: reset("by_hand", FUNCTION),
                    "by hand, session": lambda: reset("by_hand", SESSION),
                    "committing": lambda: reset("committing", SESSION),
                },
                rounds=rounds,
                warm_up=1,
            )

            async def first(*options: str) -> float:
                return run(folder, *options, *SESSION, "-k", "plugin and 0", "-x")[0]

            firsts = await alternate(
                {
                    "embedded": lambda: first(),
                    "embedded, two workers": lambda: first("-n", "2"),
                    "server": lambda: first(*url),
                },
                rounds=rounds,
                warm_up=1,
            )
    headline("setup and teardown of a test with pg_session, in milliseconds")
    tell(
        "loops of the session: the connection is kept",
        Spread.of(results["session"]),
        ("at most", 5),
    )
    tell(
        "loops of the function: a connection for each test",
        Spread.of(results["function"]),
        ("at most", 5),
    )
    tell("by hand, an engine for each test", Spread.of(results["by hand"]))
    tell("pg_commit: a connection, and cleanup_tables afterwards", Spread.of(results["committing"]))
    headline("the same, as ratios")
    tell(
        "loops of the session / by hand",
        Spread.of_ratios(results["session"], results["by hand, session"]),
    )
    tell(
        "loops of the function / by hand", Spread.of_ratios(results["function"], results["by hand"])
    )
    headline("from the command to the first test, in seconds, 50 tables")
    tell("embedded server, started for the run", Spread.of(firsts["embedded"]), ("at most", 4))
    tell("server that is there, with the template", Spread.of(firsts["server"]), ("at most", 4))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plugin", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
