"""Run `pgtoolset` in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process without what says where PostgreSQL is, and `variables`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PG") and name != "DATABASE_URL"
    }
    return kept | dict(variables)


async def start(*arguments: str, **variables: str) -> asyncio.subprocess.Process:
    """Start a command."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pgtoolset.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(variables),
    )


async def run(*arguments: str, **variables: str) -> tuple[int | None, str, str]:
    """Run a command to its end; return its exit code, output and errors."""
    process = await start(*arguments, **variables)
    async with asyncio.timeout(180):
        output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


@asynccontextmanager
async def running(*arguments: str, **variables: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command that runs until the end of the block."""
    process = await start(*arguments, **variables)
    try:
        async with asyncio.timeout(180):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process: asyncio.subprocess.Process) -> str:
    """Return the next line that a command prints."""
    assert process.stdout is not None
    return (await process.stdout.readline()).decode()
