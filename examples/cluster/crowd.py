"""Writers, readers and a watcher that use the cluster by one way, and note what they are told."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from examples.cluster.ledger import Ledger, Read, Write
from examples.cluster.models import Counter, Entry
from examples.cluster.store import LOCKS
from examples.cluster.ways import Way
from pgtoolset.errors import CommitUnknownError

logger = logging.getLogger("examples.cluster")

#: Seconds between the writes of one writer. The load is a rate, not what the machine can do.
PAUSE = 0.15


class Crowd(ABC):
    """The clients of one way; how they write and read is a subclass's.

    Args:
        way: the way to the cluster.
        ports: the name of each node, by the port of its PostgreSQL.
        has_tokens: whether a reader can ask for what a writer has seen.
    """

    def __init__(self, way: Way, ports: Mapping[int, str], *, has_tokens: bool) -> None:
        self.way = way
        self.ledger = Ledger(way.name, has_tokens)
        self._ports = ports
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None

    @abstractmethod
    async def write_once(self, write: Write) -> str | None:
        """Write in a block, and return the token for reading it."""

    @abstractmethod
    async def write_retried(self, write: Write) -> None:
        """Write in a transaction that is tried again where that is right."""

    @abstractmethod
    async def write_locked(self, write: Write) -> None:
        """Raise a counter under a lock."""

    @abstractmethod
    async def read(self, write: Write, token: str | None) -> tuple[int | None, bool]:
        """Look for a write; return the port of the node, and whether it has the write."""

    @abstractmethod
    async def beat(self, value: int) -> bool:
        """Write a value into the watched row; return whether there is one."""

    @abstractmethod
    async def watch(self) -> None:
        """Note each value of the watched row, until cancelled."""

    def start(self) -> None:
        """Begin to write, read and watch."""
        self._tasks = [asyncio.create_task(self._until_stopped(each)) for each in self._clients()]
        self._watching = asyncio.create_task(self._watch())

    def _clients(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            self._write_and_read,
            self._write_and_read,
            self._write_alone,
            self._write_counters,
            self._write_counters,
            self._beat,
        ]

    async def stop(self) -> None:
        """Let each client end what it does."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    async def end(self) -> None:
        """Cancel what still runs, the watcher first of all."""
        tasks = [*self._tasks, *([] if self._watching is None else [self._watching])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def raise_counter(self, session: AsyncSession, write: Write) -> None:
        """Read a counter, and write it one higher: wrong without a lock."""
        name = write.counter
        value = await session.scalar(select(Counter.value).where(Counter.name == name))
        assert value is not None
        await session.execute(update(Counter).where(Counter.name == name).values(value=value + 1))
        session.add(Entry(write=write.id, counter=name))

    def saw(self, value: int) -> None:
        """Note a value that the watcher reports."""
        self.ledger.seen.append((time.monotonic(), value))

    async def _until_stopped(self, work: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping.is_set():
            await work()
            await asyncio.sleep(PAUSE)

    async def _watch(self) -> None:
        try:
            await self.watch()
        except Exception as error:
            logger.exception("the watcher of the way %s failed", self.way.name)
            self.ledger.watcher_error = f"{type(error).__name__}: {error}"

    async def _noted(self, write: Write, doing: Awaitable[str | None]) -> str | None:
        """Await a write, and note what it says; return its token."""
        token = None
        try:
            token = await doing
        except CommitUnknownError as error:
            write.end("unknown", error)
        except Exception as error:
            write.end("failed", error)
        else:
            write.end("acknowledged")
        return token

    async def _write_and_read(self) -> None:
        write = self.ledger.open()
        token = await self._noted(write, self.write_once(write))
        if write.outcome == "acknowledged":
            await self._noted_read(write, None)
            if token is not None:
                await self._noted_read(write, token)

    async def _noted_read(self, write: Write, token: str | None) -> None:
        try:
            port, found = await self.read(write, token)
        except Exception as error:
            self.ledger.failed_reads[type(error).__name__] += 1
            return
        node = self._ports.get(port or 0, "?")
        self.ledger.reads.append(Read(node, token is not None, not found, time.monotonic()))

    async def _write_alone(self) -> None:
        write = self.ledger.open()
        await self._noted(write, self._without_token(self.write_retried(write)))

    async def _write_counters(self) -> None:
        for kind in LOCKS:
            write = self.ledger.open(f"{self.way.name} {kind}")
            await self._noted(write, self._without_token(self.write_locked(write)))

    async def _without_token(self, doing: Awaitable[None]) -> str | None:
        await doing
        return None

    async def _beat(self) -> None:
        value = self.ledger.beats[-1][1] + 1 if self.ledger.beats else 1
        with suppress(Exception):  # the next one tries the same value
            if await self.beat(value):
                self.ledger.beats.append((time.monotonic(), value))
        await asyncio.sleep(0.2)
