"""What `import pgtoolset` adds to `import sqlalchemy.ext.asyncio`. Run as `python -m benchmarks.imports`.

Fresh interpreters in alternation import the one, or the one and then the other, and say how long it took from their
first statement. Bytecode is there already, as after an installation.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys

from benchmarks._harness import Spread, alternate, environment, headline, tell

BASE = "sqlalchemy.ext.asyncio"

PROGRAM = """
import time
start = time.perf_counter()
import {modules}
print(time.perf_counter() - start)
"""


async def milliseconds(modules: str) -> float:
    command = [sys.executable, "-c", PROGRAM.format(modules=modules)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    return float(output) * 1000


def slowest(count: int) -> list[str]:
    """The modules that `import pgtoolset` adds and that take longest by themselves, as -X importtime tells them."""
    program = f"import {BASE}, sys; print('--', file=sys.stderr); import pgtoolset"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True, check=True
    )
    lines = [line.removeprefix("import time:").split("|") for line in done.stderr.partition("--\n")[2].splitlines()]
    own = sorted(((int(own), name.strip()) for own, _, name in lines), reverse=True)
    return [f"{microseconds / 1000:6.2f} ms  {name}" for microseconds, name in own[:count]]


async def run(rounds: int) -> None:
    environment("sqlalchemy")
    results = await alternate(
        {
            "sqlalchemy": lambda: milliseconds(BASE),
            "pgtoolset": lambda: milliseconds(f"{BASE}, pgtoolset"),
        },
        rounds=rounds,
    )
    base, both = results["sqlalchemy"], results["pgtoolset"]
    headline("import pgtoolset after import sqlalchemy.ext.asyncio, in milliseconds")
    tell("added by pgtoolset", Spread.of(b - a for a, b in zip(base, both, strict=True)), ("at most", 10))
    tell("sqlalchemy.ext.asyncio", Spread.of(base))
    print("slowest of what is added, one run, tracing included:", *slowest(8), sep="\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
