"""What `import pgtoolset` adds to what every program has loaded that uses it. Run as `python -m
benchmarks.imports`.

Fresh interpreters import SQLAlchemy, its PostgreSQL dialect, which comes with the first engine and
with pgtoolset, and then pgtoolset, and say what CPU time each took: `import pgtoolset`, then the
names of a program with sessions and transactions, then all the others. Bytecode is there already,
as after an installation: the first of the warm-up writes it, into a folder of its own.
`python -X importtime -c "from pgtoolset import *"` says which module takes how long.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from tempfile import TemporaryDirectory

from benchmarks._declared import Benchmark, Experiment, Measure, at_most
from benchmarks._harness import Figures, Turn, output_of
from benchmarks._run import alone

STEPS = {
    "base": "import sqlalchemy.ext.asyncio",
    "dialect": "import sqlalchemy.dialects.postgresql.asyncpg",
    "ours": "import pgtoolset",
    "some": "from pgtoolset import create_db_dependency, get_transaction",
    "every": "from pgtoolset import *",
}


async def seconds(environ: Mapping[str, str]) -> Figures:
    """The CPU time that each step took, one after the other in one interpreter."""
    program = ["import time", "times = [time.process_time()]"]
    for step in STEPS.values():
        program += [step, "times.append(time.process_time())"]
    program.append("print(*times)")
    command = [sys.executable, "-c", "\n".join(program)]
    output = await output_of(command, environ)
    times = [float(each) for each in output.split()]
    taken = dict(zip(STEPS, (after - before for before, after in pairwise(times)), strict=True))
    loaded = taken["base"] + taken["dialect"]
    some = taken["ours"] + taken["some"]
    return {
        "milliseconds": taken["ours"] * 1000,
        "ours": taken["ours"] / loaded,
        "some": some / loaded,
        "every": (some + taken["every"]) / loaded,
    }


@asynccontextmanager
async def contestants(url: str) -> AsyncIterator[Mapping[str, Turn]]:
    with TemporaryDirectory() as bytecode:
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        yield {"interpreter": lambda: seconds(environ)}


OF = "of SQLAlchemy's import"

BENCHMARK = Benchmark(
    title="Import",
    about="CPU time of `import pgtoolset` beside that of SQLAlchemy and its PostgreSQL dialect.",
    experiments=(
        Experiment(
            "Fresh interpreters",
            contestants,
            (
                Measure(
                    "import",
                    "`import pgtoolset`",
                    "interpreter",
                    of="ours",
                    unit=OF,
                    target=at_most(0.05),
                ),
                Measure(
                    "import-some",
                    "with the names of sessions and transactions",
                    "interpreter",
                    of="some",
                    unit=OF,
                ),
                Measure("import-every", "with every name", "interpreter", of="every", unit=OF),
                Measure(
                    "import-ms",
                    "`import pgtoolset`",
                    "interpreter",
                    of="milliseconds",
                    unit="ms",
                    target=at_most(10),
                ),
            ),
            seconds=10,
            rounds=60,
        ),
    ),
)

if __name__ == "__main__":
    alone("imports")
