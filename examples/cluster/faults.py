"""What happens to the cluster."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from examples.cluster.cluster import Cluster
from examples.cluster.node import Node
from examples.cluster.waiting import until

#: Seconds for Patroni to name another primary: its `ttl`, and some for a busy machine.
SUCCESSION = 60.0

#: Seconds of peace after a fault.
PEACE = 2.0


@dataclass
class Event:
    """One fault.

    Attributes:
        title: what it is.
        at: when it began.
        whole: when the cluster had a primary and two standbys again; `None` while it was not seen.
    """

    title: str
    at: float
    whole: float | None = None


Fault = Callable[[Cluster], Awaitable[None]]


async def cut_clients(cluster: Cluster) -> None:
    """The network drops every connection to the primary, six times"""
    for _ in range(6):
        _primary(cluster).clients.drop()
        await asyncio.sleep(0.35)


async def switch_over(cluster: Cluster) -> None:
    """An operator makes the synchronous standby the primary"""
    async with _succession(cluster):
        await cluster.patroni.switch_over()


async def kill_postgres(cluster: Cluster) -> None:
    """SIGKILL: PostgreSQL of the primary"""
    async with _succession(cluster) as primary:
        primary.kill_postgres()


async def kill_node(cluster: Cluster) -> None:
    """SIGKILL: the machine of the primary"""
    async with _succession(cluster) as primary:
        await primary.kill()
    await primary.start()


async def freeze_node(cluster: Cluster) -> None:
    """SIGSTOP: the machine of the primary; SIGCONT after it was replaced"""
    async with _succession(cluster) as primary:
        primary.freeze()
    await asyncio.sleep(PEACE)  # clients write to the new one, and then the old one is back
    primary.thaw()


async def cut_off(cluster: Cluster) -> None:
    """The machine of the primary is cut off from everything"""
    async with _succession(cluster) as primary:
        primary.cut_off()
    primary.mend()


async def cut_off_from_peers(cluster: Cluster) -> None:
    """The primary is cut off from etcd and its standbys, and clients still reach it"""
    async with _succession(cluster) as primary:
        primary.cut_off_from_peers()
    primary.mend()


async def freeze_standby(cluster: Cluster) -> None:
    """SIGSTOP: one of the standbys, for 5 seconds"""
    standby = _standbys(cluster)[0]
    standby.freeze()
    await asyncio.sleep(5)
    standby.thaw()


async def kill_standbys(cluster: Cluster) -> None:
    """SIGKILL: the machines of both standbys, for 5 seconds"""
    standbys = _standbys(cluster)
    for each in standbys:
        await each.kill()
    await asyncio.sleep(5)
    for each in standbys:
        await each.start()


#: All of them, in the order of a run.
FAULTS: tuple[Fault, ...] = (
    cut_clients,
    kill_postgres,
    freeze_node,
    switch_over,
    cut_off_from_peers,
    freeze_standby,
    kill_node,
    kill_standbys,
    cut_off,
)

#: Those of the short form: one of each kind, and one wait for the ttl of Patroni.
SHORT: tuple[Fault, ...] = (cut_clients, switch_over, kill_postgres, freeze_node)


def title_of(fault: Fault) -> str:
    """Return what a fault is, in one line."""
    return (fault.__doc__ or "").splitlines()[0]


async def inflict(fault: Fault, cluster: Cluster, events: list[Event]) -> None:
    """Let a fault happen to a cluster that is whole."""
    event = Event(title_of(fault), time.monotonic())
    events.append(event)
    await fault(cluster)
    await asyncio.sleep(PEACE)


async def until_whole(cluster: Cluster, events: list[Event]) -> None:
    """Wait until the cluster is whole, and note that it was after the last fault."""
    await cluster.until_whole()
    if events:
        events[-1].whole = time.monotonic()


def _primary(cluster: Cluster) -> Node:
    primary = cluster.patroni.primary
    assert primary is not None
    return primary


def _standbys(cluster: Cluster) -> list[Node]:
    primary = _primary(cluster)
    return [node for node in cluster.nodes if node is not primary]


@asynccontextmanager
async def _succession(cluster: Cluster) -> AsyncIterator[Node]:
    """Yield the primary; at the end of the block, wait until there is another one."""
    primary, reigns = _primary(cluster), len(cluster.patroni.reigns)
    yield primary

    def is_succeeded() -> bool:
        return any(reign.name != primary.name for reign in cluster.patroni.reigns[reigns:])

    await until(is_succeeded, SUCCESSION, lambda: f"nobody succeeds {primary.name}")
