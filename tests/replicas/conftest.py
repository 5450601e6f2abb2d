"""A primary with two standbys for each worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from pgtoolset import ReadReplicas
from pgtoolset.replicas import _opening, _responses
from tests.nodes import Nodes
from tests.replicas.cluster import LONG, Cluster, restore_second, start_second, stop_second


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that answers is waited for, however slow the machine is: it is not away."""
    for module in (_opening, _responses):
        monkeypatch.setattr(module, "ANSWER_TIMEOUT", float(LONG))
    monkeypatch.setattr(_opening, "GIVE_UP", float(LONG))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def second(node_pair: Nodes) -> AsyncIterator[Nodes]:
    """The second standby of a worker; tests take it through `cluster`."""
    second = await start_second(node_pair)
    try:
        yield second
    finally:
        await asyncio.to_thread(stop_second, second)


@pytest.fixture
async def cluster(nodes: Nodes, second: Nodes) -> AsyncIterator[Cluster]:
    """A primary with two standbys that have caught up, and empty tables."""
    await restore_second(nodes, second)
    cluster = Cluster(nodes, second)
    try:
        yield cluster
    finally:
        await cluster.close()


@pytest.fixture
def replicas(cluster: Cluster) -> ReadReplicas:
    """All three nodes, with a wait that never ends before a standby has caught up."""
    return cluster.replicas()
