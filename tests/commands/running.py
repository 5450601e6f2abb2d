"""Run `pgtoolset` in a process of its own, or in a thread."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from unittest.mock import patch

from pgtoolset.cli import main
from tests.commands.forked import forked


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process without what says where PostgreSQL is, and `variables`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PG") and name != "DATABASE_URL"
    }
    return kept | dict(variables)


async def start(*arguments: str, **variables: str) -> asyncio.subprocess.Process:
    """Start a command in a process of its own."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pgtoolset.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(variables),
    )


class Terminal(io.TextIOWrapper):
    """An output that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


async def run(
    *arguments: str, answer: str = "", terminal: bool = False, **variables: str
) -> tuple[int, str, str]:
    """Run a command to its end in a thread; return its exit code, output and errors.

    The start of a process of its own takes longer than most commands.
    """
    return await asyncio.to_thread(
        run_here, *arguments, answer=answer, terminal=terminal, **variables
    )


def run_here(
    *arguments: str, answer: str = "", terminal: bool = False, **variables: str
) -> tuple[int, str, str]:
    """Run a command to its end as `run` does, in this thread."""
    kind = Terminal if terminal else io.TextIOWrapper
    output, errors = (kind(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with (
        patch.dict(os.environ, environment(variables), clear=True),
        patch.object(sys, "stdin", io.StringIO(answer)),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            code = main(arguments)
        except SystemExit as exit_:
            code = int(str(exit_.code))
    printed = []
    for each in (output, errors):
        each.flush()
        each.seek(0)
        printed.append(each.read())
    return code, printed[0], printed[1]


@asynccontextmanager
async def running(*arguments: str, **variables: str) -> AsyncIterator[asyncio.StreamReader]:
    """What a command prints that runs, in a process of its own, until the end of the block."""
    async with asyncio.timeout(180), forked(arguments, environment(variables)) as lines:
        yield lines


async def line(lines: asyncio.StreamReader) -> str:
    """Return the next line that a command prints."""
    return (await lines.readline()).decode()
