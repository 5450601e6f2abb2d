"""A contestant in a process of its own, where another version of a package can be imported.

The process runs `python -m benchmarks._worker MODULE:FUNCTION URL`. The function is an async
context manager that takes the URL and yields turns by name; a turn takes numbers. For each line of
JSON `[name, *numbers]` on its standard input, the process runs that turn and answers with its
figures, or with its error, on one line. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks._harness import Described, Figures, Turn, described
from benchmarks._peers import folder_of

ROOT = Path(__file__).resolve().parent.parent

#: Bytes of an answer.
LONGEST = 2**20


class WorkerError(Described):
    """A turn of a worker has failed; the message is the error there."""


class Worker:
    """The starter's end: a process that is started by its first turn.

    Another one is started after a turn that was stopped, but not where the first has ended itself.
    """

    def __init__(self, peer: str, function: str, url: str) -> None:
        self._peer = peer
        self._command = [sys.executable, "-m", "benchmarks._worker", function, url]
        self._process: asyncio.subprocess.Process | None = None
        self._failed = ""

    def turn(self, name: str, *numbers: float) -> Turn:
        """Return a turn of the process."""

        async def run() -> Figures:
            if self._failed:
                raise WorkerError(self._failed)
            if self._process is None:
                await self._start()
            return await self._ask([name, *numbers])

        return run

    async def close(self) -> None:
        """End the process and wait for its end."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    async def _start(self) -> None:
        try:
            folder = await asyncio.to_thread(folder_of, self._peer)
        except Exception as error:
            self._failed = described(error)
            raise
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=LONGEST,
        )
        await self._ask(["ready"])

    async def _ask(self, question: list[Any]) -> Figures:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        answered = False
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
            answered = True
        finally:
            if not answered:  # the answer to this question must not be taken for the next one
                self._process = None
                process.kill()
                await process.wait()
        if not line:
            self._failed = f"the process has ended with {await process.wait()}"
            raise WorkerError(self._failed)
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        figures: Figures = answer
        return figures


@asynccontextmanager
async def workers(
    peers: Iterable[str], function: str, url: str
) -> AsyncIterator[dict[str, Worker]]:
    """Yield a worker for each peer. None is started before its first turn."""
    async with AsyncExitStack() as stack:
        made = {}
        for peer in peers:
            made[peer] = Worker(peer, function, url)
            stack.push_async_callback(made[peer].close)
        yield made


async def answer(turns: dict[str, Callable[..., Awaitable[Figures]]], question: str) -> Any:
    """Return the figures of a turn, or its error."""
    name, *numbers = json.loads(question)
    if name == "ready":
        gc.collect()
        gc.freeze()
        return {}
    gc.collect()
    try:
        return await turns[name](*numbers)
    except Exception as error:
        return {"error": described(error)}


async def serve(function: str, url: str) -> None:
    """Answer questions until there are no more."""
    module, _, name = function.partition(":")
    answers = sys.stdout
    sys.stdout = sys.stderr  # a library that prints must not answer
    async with AsyncExitStack() as stack:
        turns: Any = {}
        failure = ""
        try:
            set_up = getattr(importlib.import_module(module), name)
            turns = await stack.enter_async_context(set_up(url))
        except Exception as error:
            failure = described(error)
        while question := await asyncio.to_thread(sys.stdin.readline):
            reply = {"error": failure} if failure else await answer(turns, question)
            answers.write(json.dumps(reply) + "\n")
            answers.flush()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(*sys.argv[1:]))
