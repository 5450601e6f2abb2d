"""What `import pgtoolset` adds to what every program has loaded that uses it. Run as `python -m
benchmarks.imports`.

Fresh interpreters import SQLAlchemy, its PostgreSQL dialect, which comes with the first engine and
with pgtoolset, and then pgtoolset, and say what CPU time each took: `import pgtoolset`, then the
names of a program with sessions and transactions, then all the others. Bytecode is there already,
as after an installation: the first of the warm-up writes it, into a folder of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from tempfile import TemporaryDirectory

from benchmarks._harness import Spread, alternate, environment, headline, tell

BASE = "sqlalchemy.ext.asyncio"
DIALECT = "sqlalchemy.dialects.postgresql.asyncpg"

STEPS = (
    f"import {BASE}",
    f"import {DIALECT}",
    "import pgtoolset",
    "from pgtoolset import create_db_dependency, get_transaction",
    "from pgtoolset import *",
)


async def milliseconds(environ: Mapping[str, str]) -> list[float]:
    """The CPU time that each step took, one after the other in one interpreter."""
    program = ["import time", "times = [time.process_time()]"]
    for step in STEPS:
        program += [step, "times.append(time.process_time())"]
    program.append("print(*times)")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "\n".join(program), stdout=subprocess.PIPE, env=environ
    )
    output, _ = await process.communicate()
    times = [float(each) * 1000 for each in output.split()]
    return [after - before for before, after in pairwise(times)]


def slowest(environ: Mapping[str, str], count: int) -> list[str]:
    """The modules of all names that take longest by themselves, as -X importtime tells them."""
    last = STEPS[-1]
    program = f"import {BASE}, {DIALECT}, sys; print('--', file=sys.stderr); {last}"
    command = [sys.executable, "-X", "importtime", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    lines = [
        line.removeprefix("import time:").split("|")
        for line in done.stderr.partition("--\n")[2].splitlines()
    ]
    own = sorted(((int(own), name.strip()) for own, _, name in lines), reverse=True)
    return [f"{microseconds / 1000:6.2f} ms  {name}" for microseconds, name in own[:count]]


async def run(rounds: int) -> None:
    environment("sqlalchemy")
    with TemporaryDirectory() as bytecode:
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        results = await alternate({"all": lambda: milliseconds(environ)}, rounds=rounds)
        modules = slowest(environ, 8)
    base, dialect, ours, some, every = zip(*results["all"], strict=True)
    headline(
        "import pgtoolset / import sqlalchemy.ext.asyncio and the PostgreSQL dialect, CPU time"
    )
    loaded = [one + other for one, other in zip(base, dialect, strict=True)]
    sessions = [one + other for one, other in zip(ours, some, strict=True)]
    names = [one + other for one, other in zip(sessions, every, strict=True)]
    tell(
        "pgtoolset / SQLAlchemy and its dialect", Spread.of_ratios(ours, loaded), ("at most", 0.05)
    )
    tell("with the names of sessions and transactions", Spread.of_ratios(sessions, loaded))
    tell("with every name", Spread.of_ratios(names, loaded))
    headline("in milliseconds")
    tell(STEPS[0], Spread.of(base))
    tell(STEPS[1], Spread.of(dialect))
    tell("import pgtoolset", Spread.of(ours), ("at most", 10))
    tell("with the names of sessions and transactions", Spread.of(sessions))
    tell("with every name", Spread.of(names))
    print("slowest of all names, one run, tracing included:", *modules, sep="\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
