"""What `import pgtoolset` adds to `import sqlalchemy.ext.asyncio`. Run as `python -m benchmarks.imports`.

Fresh interpreters in alternation import the one, or the one and then the other, and say how long it took from their
first statement. The difference is small beside what both have in common, and so noisy; the target is about the time
of the second import, in the interpreters that do both, which says the same with less noise. Bytecode is there
already, as after an installation: the first of the warm-up writes it, into a folder of its own.
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


async def milliseconds(environ: Mapping[str, str], *modules: str) -> list[float]:
    """How long each import took, one after the other in one interpreter."""
    program = ["import time", "times = [time.perf_counter()]"]
    for module in modules:
        program += [f"import {module}", "times.append(time.perf_counter())"]
    program.append("print(*times)")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "\n".join(program), stdout=subprocess.PIPE, env=environ
    )
    output, _ = await process.communicate()
    times = [float(each) * 1000 for each in output.split()]
    return [after - before for before, after in pairwise(times)]


def slowest(environ: Mapping[str, str], count: int) -> list[str]:
    """The modules that `import pgtoolset` adds and that take longest by themselves, as -X importtime tells them."""
    program = f"import {BASE}, sys; print('--', file=sys.stderr); import pgtoolset"
    command = [sys.executable, "-X", "importtime", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    lines = [line.removeprefix("import time:").split("|") for line in done.stderr.partition("--\n")[2].splitlines()]
    own = sorted(((int(own), name.strip()) for own, _, name in lines), reverse=True)
    return [f"{microseconds / 1000:6.2f} ms  {name}" for microseconds, name in own[:count]]


async def run(rounds: int) -> None:
    environment("sqlalchemy")
    with TemporaryDirectory() as bytecode:
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        results = await alternate(
            {
                "sqlalchemy": lambda: milliseconds(environ, BASE),
                "both": lambda: milliseconds(environ, BASE, "pgtoolset"),
            },
            rounds=rounds,
        )
        modules = slowest(environ, 8)
    base, both = results["sqlalchemy"], results["both"]
    headline("import pgtoolset after import sqlalchemy.ext.asyncio, in milliseconds")
    added = [sum(together) - sum(alone) for alone, together in zip(base, both, strict=True)]
    tell("added to the time of both imports", Spread.of(added))
    tell("import pgtoolset alone, after the other", Spread.of(second for _, second in both), ("at most", 10))
    tell("import sqlalchemy.ext.asyncio", Spread.of(sum(alone) for alone in base))
    print("slowest of what is added, one run, tracing included:", *modules, sep="\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
