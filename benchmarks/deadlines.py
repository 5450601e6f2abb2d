"""What a deadline costs a unit of work. Run as `python -m benchmarks.deadlines`.

One SELECT in `db_context()`, with `deadline=` and without. CPU time is that of the client and of
its backend together, as in `benchmarks.settings`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable

from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from benchmarks.settings import Contestant, Limit
from pgtoolset import create_db_context


class Late(Contestant):
    """A contestant whose units have a deadline."""

    def __init__(self, url: str) -> None:
        super().__init__(url, given=False)
        self.db_context = create_db_context(async_sessionmaker(self.engine), deadline=2)


async def run(rounds: int) -> None:
    environment("sqlalchemy", "asyncpg", "psycopg")
    with database_url() as url:
        contestants = {
            "without": Contestant(url, given=False),
            "deadline": Late(url),
            "control": Contestant(url, given=False),
        }
        rounds_of: dict[str, Callable[[], Awaitable[tuple[float, float]]]] = {
            name: contestant.round for name, contestant in contestants.items()
        }
        results = await alternate(rounds_of, rounds=rounds, warm_up=5)
        for contestant in contestants.values():
            await contestant.engine.dispose()
    is_asyncpg = "+asyncpg" in url
    headline(f"a unit with a deadline / without, {'asyncpg' if is_asyncpg else 'psycopg'}")
    for name, what in (("deadline", "deadline="), ("control", "control: without once more")):
        for number, kind in enumerate(("wall time", "CPU time of client and backend")):
            ours, theirs = (
                [each[number] for each in rows] for rows in (results[name], results["without"])
            )
            limit: Limit | None = None
            if name == "deadline" and is_asyncpg:
                limit = ("at most", 1.10)
            tell(f"{what}, {kind}", Spread.of_ratios(ours, theirs), limit)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deadlines", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
