"""`pgtoolset` in a process that is forked from one that has imported what it needs.

The imports take ten times as long as what most of the commands do.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

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


class Forked:
    """A command that runs, and what it prints.

    Attributes:
        stdout: what it prints.
    """

    def __init__(self, arguments: tuple[str, ...], variables: dict[str, str]) -> None:
        self.stdout = asyncio.StreamReader()
        self._printed, output = _SERVER.Pipe(duplex=False)
        with output:
            self._process = _SERVER.Process(target=_command, args=(arguments, variables, output))
            self._process.start()

    async def __aenter__(self) -> Forked:
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(os.dup(self._printed.fileno()), "rb", 0)
        self._transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self.stdout), pipe
        )
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._transport.close()
        self._printed.close()
        self._process.kill()
        await asyncio.to_thread(self._process.join)
        self._process.close()
