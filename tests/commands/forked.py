"""`pgtoolset` in a process that is forked from one that has imported what it needs.

The imports take ten times as long as what most of the commands do.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from multiprocessing import get_context
from multiprocessing.connection import Connection

_SERVER = get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "asyncpg",
        "pgtoolset._commands",
        "rich.console",
        "sqlalchemy.dialects.postgresql.asyncpg",
        "tests.commands.forked",
    ]
)


def _command(arguments: tuple[str, ...], variables: dict[str, str], output: Connection) -> None:
    """Run a command, as the main module of this process."""
    os.environ.clear()
    os.environ.update(variables)
    os.dup2(output.fileno(), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv[1:] = arguments
    runpy.run_module("pgtoolset.cli", run_name="__main__", alter_sys=True)


@asynccontextmanager
async def forked(
    arguments: tuple[str, ...], variables: dict[str, str]
) -> AsyncIterator[asyncio.StreamReader]:
    """What a command prints, which runs until the end of the block."""
    printed, output = _SERVER.Pipe(duplex=False)
    with printed, output:
        process = _SERVER.Process(target=_command, args=(arguments, variables, output))
        process.start()
        output.close()
        lines = asyncio.StreamReader()
        pipe = os.fdopen(os.dup(printed.fileno()), "rb", 0)
        try:
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(lines), pipe
            )
            with closing(transport):
                yield lines
        finally:
            pipe.close()
            process.kill()
            await asyncio.to_thread(process.join)
            process.close()
