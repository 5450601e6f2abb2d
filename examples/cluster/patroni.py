"""Patroni's REST interface: who is what, since when, and a switchover."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from examples.cluster.network import HOST
from examples.cluster.node import Node

#: Seconds between two looks at the nodes.
INTERVAL = 0.2


@dataclass(frozen=True)
class Reign:
    """A primary, and the time that it was one."""

    name: str
    since: float
    until: float | None = None


class Patroni:
    """Asks each node's Patroni whether it is the primary, again and again.

    Attributes:
        reigns: the primaries of the run, in order.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._client = httpx.AsyncClient(timeout=1.0, trust_env=False)
        self.reigns: list[Reign] = []

    @asynccontextmanager
    async def watched(self) -> AsyncIterator["Patroni"]:
        """Look at the nodes while the block runs."""
        async with self._client:
            looks = [asyncio.create_task(self._watch(node)) for node in self._nodes]
            try:
                yield self
            finally:
                for look in looks:
                    look.cancel()
                await asyncio.gather(*looks, return_exceptions=True)

    @property
    def primary(self) -> Node | None:
        """The node that is the primary now."""
        if not self.reigns or self.reigns[-1].until is not None:
            return None
        return next(node for node in self._nodes if node.name == self.reigns[-1].name)

    async def is_whole(self) -> bool:
        """Whether there is a primary, a synchronous standby, and every node follows."""
        primary = self.primary
        if primary is None:
            return False
        try:
            reply = await self._client.get(f"http://{HOST}:{primary.rest}/cluster")
            members = reply.json().get("members", [])
        except (httpx.HTTPError, ValueError):
            return False
        states = sorted((each.get("role"), each.get("state")) for each in members)
        timelines = {each.get("timeline") for each in members}
        return len(timelines) == 1 and states == sorted(
            [("leader", "running"), ("sync_standby", "streaming")]
            + [("replica", "streaming")] * (len(self._nodes) - 2)
        )

    async def switch_over(self) -> None:
        """Make the synchronous standby the primary, in order."""
        primary = self.primary
        assert primary is not None
        reply = await self._client.post(
            f"http://{HOST}:{primary.rest}/switchover", json={"leader": primary.name}, timeout=30.0
        )
        reply.raise_for_status()

    async def _watch(self, node: Node) -> None:
        while True:
            try:
                reply = await self._client.get(f"http://{HOST}:{node.rest}/primary")
                leads = reply.status_code == 200
            except httpx.HTTPError:
                leads = False
            self._note(node, leads=leads)
            await asyncio.sleep(INTERVAL)

    def _note(self, node: Node, *, leads: bool) -> None:
        now = time.monotonic()
        last = self.reigns[-1] if self.reigns else None
        rules = last is not None and last.until is None and last.name == node.name
        if leads and not rules:
            if last is not None and last.until is None:
                self.reigns[-1] = Reign(last.name, last.since, now)
            self.reigns.append(Reign(node.name, now))
        elif rules and not leads:
            assert last is not None
            self.reigns[-1] = Reign(last.name, last.since, now)
