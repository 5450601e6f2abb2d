"""The whole cluster: etcd, three nodes, HAProxy and PgBouncer."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import asyncpg

from examples.cluster.network import HOST
from examples.cluster.node import DATABASE, ROLE, Node, Plan
from examples.cluster.patroni import Patroni
from examples.cluster.programs import find_programs, run_directory
from examples.cluster.services import Etcd, HAProxy, PgBouncer
from examples.cluster.waiting import until

#: Nodes: with a synchronous standby, one may be lost and writes still have a second copy.
NODES = 3

#: Seconds that the cluster may take to start, and to become whole after a fault.
PATIENCE = 90.0


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    plan: Plan
    nodes: list[Node]
    patroni: Patroni
    haproxy: HAProxy
    pgbouncer: PgBouncer

    def urls(self, driver: str) -> dict[str, str]:
        """Return the URL of the primary, by the way that clients take to it."""
        login = f"{driver}://{ROLE}:{self.plan.password}"
        hosts = "&".join(f"host={HOST}:{node.clients.port}" for node in self.nodes)
        return {
            "hosts": f"{login}@/{DATABASE}?{hosts}&target_session_attrs=read-write",
            "haproxy": f"{login}@{HOST}:{self.haproxy.primary}/{DATABASE}",
            "pgbouncer": f"{login}@{HOST}:{self.pgbouncer.port}/{DATABASE}",
        }

    def node(self, name: str) -> Node:
        """Return the node of a name."""
        return next(node for node in self.nodes if node.name == name)

    def mend(self) -> None:
        """Mend every link."""
        for node in self.nodes:
            node.mend()

    async def until_whole(self) -> None:
        """Wait until there is a primary, a synchronous standby, and every node follows."""
        await until(self.patroni.is_whole, PATIENCE, self._last_words)

    async def superuser(self) -> asyncpg.Connection:
        """Connect to the primary past the links, as the superuser."""
        primary = self.patroni.primary
        assert primary is not None
        return await asyncpg.connect(
            host=HOST,
            port=primary.port,
            user="postgres",
            password=self.plan.password,
            database=DATABASE,
        )

    def _last_words(self) -> str:
        logs = "\n".join(f"{node.name}:\n{node.last_words()}" for node in self.nodes)
        return f"{logs}\nThe cluster is not whole"


@asynccontextmanager
async def running_cluster(*, strict: bool = False) -> AsyncIterator[Cluster]:
    """Start a cluster; at the end of the block nothing of it is left.

    Raises:
        MissingProgram: a program is not installed.
        TimeoutError: the cluster did not start; the message has its logs.
    """
    programs = find_programs()
    with run_directory(programs.user) as directory:
        etcd = Etcd(programs, directory)
        await etcd.start()
        plan = Plan(programs, directory, etcd.port, strict)
        nodes = [Node(number, plan) for number in range(1, NODES + 1)]
        async with AsyncExitStack() as stack:
            patroni = await stack.enter_async_context(Patroni(nodes).watched())
            for node in nodes:
                await stack.enter_async_context(node.running())
            haproxy = HAProxy(plan, nodes)
            await haproxy.start()
            pgbouncer = PgBouncer(plan, haproxy)
            await pgbouncer.start()
            cluster = Cluster(plan, nodes, patroni, haproxy, pgbouncer)
            await cluster.until_whole()
            yield cluster
