"""What `import pgtoolset` adds to what every program has loaded that uses it. Run as `python -m
benchmarks.imports`.

Fresh interpreters import SQLAlchemy, its PostgreSQL dialect, which comes with the first engine and
with pgtoolset, and then pgtoolset, and say what CPU time each took. Bytecode is there already, as
after an installation: the first of the warm-up writes it, into a folder of its own.
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


async def milliseconds(environ: Mapping[str, str], *modules: str) -> list[float]:
    """The CPU time that each import took, one after the other in one interpreter."""
    program = ["import time", "times = [time.process_time()]"]
    for module in modules:
        program += [f"import {module}", "times.append(time.process_time())"]
    program.append("print(*times)")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "\n".join(program), stdout=subprocess.PIPE, env=environ
    )
    output, _ = await process.communicate()
    times = [float(each) * 1000 for each in output.split()]
    return [after - before for before, after in pairwise(times)]


def slowest(environ: Mapping[str, str], count: int) -> list[str]:
    """The modules that `import pgtoolset` adds and that take longest by themselves, as -X
    importtime tells them."""
    program = f"import {BASE}, {DIALECT}, sys; print('--', file=sys.stderr); import pgtoolset"
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
        results = await alternate(
            {"all": lambda: milliseconds(environ, BASE, DIALECT, "pgtoolset")}, rounds=rounds
        )
        modules = slowest(environ, 8)
    base, dialect, ours = zip(*results["all"], strict=True)
    headline(
        "import pgtoolset / import sqlalchemy.ext.asyncio and the PostgreSQL dialect, CPU time"
    )
    loaded = [one + other for one, other in zip(base, dialect, strict=True)]
    tell("pgtoolset / SQLAlchemy and its dialect", Spread.of_ratios(ours, loaded))
    headline("in milliseconds")
    tell(f"import {BASE}", Spread.of(base))
    tell(f"import {DIALECT}", Spread.of(dialect))
    tell("import pgtoolset", Spread.of(ours), ("at most", 10))
    print("slowest of what is added, one run, tracing included:", *modules, sep="\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
