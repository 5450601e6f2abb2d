"""Clients that follow an order over server-sent events, many of them."""

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import httpx

#: Open files that are needed for everything else, and two for each follower: its socket, and the
#: shop's.
SPARE_FILES = 300


def affordable(followers: int) -> int:
    """So many followers as this process may have sockets for, the soft limit raised where the hard
    one allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * followers + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        except (OSError, ValueError):
            wanted = soft
        return min(followers, (wanted - SPARE_FILES) // 2)
    return followers


class Follower:
    """One such client.

    Attributes:
        heard: when each status was heard of first, by `time.perf_counter()`.
    """

    def __init__(self, url: httpx.URL, order_id: int) -> None:
        self._url = url
        self.order_id = order_id
        self.heard: dict[str, float] = {}

    async def follow(self) -> None:
        """Read events until the task is cancelled."""
        reader, writer = await asyncio.open_connection(self._url.host, self._url.port)
        try:
            host = self._url.netloc.decode()
            writer.write(
                f"GET /orders/{self.order_id}/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
            )
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    self.heard.setdefault(line[6:].decode().strip(), time.perf_counter())
        finally:
            writer.transport.abort()


class Followers:
    """All of them."""

    def __init__(self, base_url: httpx.URL, order_ids: Iterable[int]) -> None:
        self._followers = [Follower(base_url, order_id) for order_id in order_ids]

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """They follow until the block ends, and hang up then."""
        tasks: list[asyncio.Task[None]] = []
        try:
            for number, follower in enumerate(self._followers):
                tasks.append(asyncio.create_task(follower.follow()))
                if (
                    number % 50 == 0
                ):  # a backlog of 1,000 connections is more than some systems have
                    await asyncio.sleep(0.01)
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def heard(self, status: str) -> int:
        """How many have heard of a status."""
        return sum(status in follower.heard for follower in self._followers)

    def moved_from(self, status: str) -> int:
        """How many have heard of any other status."""
        return sum(bool(follower.heard.keys() - {status}) for follower in self._followers)

    def delays(self, status: str, since: dict[int, float]) -> list[float]:
        """Return the seconds from the change of an order to each follower, sorted."""
        return sorted(
            follower.heard[status] - since[follower.order_id] for follower in self._followers
        )
