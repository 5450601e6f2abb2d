"""One node: PostgreSQL and the Patroni that keeps it, as one machine that can die and freeze."""

import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from examples.cluster.keeper import family
from examples.cluster.network import HOST, Link, free_ports
from examples.cluster.programs import Program, Programs

#: The role of the application, and its database.
ROLE = "app"
DATABASE = "postgres"

#: What Patroni is told. docs/cluster.md explains each line that differs from Patroni's defaults.
CONFIGURATION = Template(
    """\
scope: shop
name: $name
restapi:
  listen: 127.0.0.1:$rest
  connect_address: 127.0.0.1:$rest_of_peers
etcd3:
  hosts: 127.0.0.1:$etcd
  use_proxies: true            # a link that can be cut; Patroni would find the way around it
bootstrap:
  dcs:
    ttl: 20                    # Patroni's least: a primary that is silent for longer is replaced
    loop_wait: 1
    retry_timeout: 3
    synchronous_mode: true     # a commit is acknowledged when a standby has it, too
    synchronous_mode_strict: $strict
    primary_start_timeout: 0   # PostgreSQL has crashed: fail over, do not wait for it to start
    maximum_lag_on_failover: 1048576
    postgresql:
      use_pg_rewind: true
      use_slots: true
      parameters:
        wal_level: replica
        hot_standby: "on"
        max_connections: 100
        max_wal_senders: 10
        wal_keep_size: 256MB
        wal_sender_timeout: 3s     # a standby that is silent for longer holds no commit up
        wal_receiver_timeout: 3s
        tcp_keepalives_idle: 2
        checkpoint_completion_target: 0   # pg_rewind waits for the checkpoint of a promotion
        shared_buffers: 32MB
        fsync: "$fsync"
        log_line_prefix: "%m [%p] %a "
  initdb:
    - encoding: UTF8
    - data-checksums
    - no-sync
postgresql:
  listen: 127.0.0.1:$port
  connect_address: 127.0.0.1:$peers
  data_dir: $directory/data
  bin_dir: $programs
  pgpass: $directory/pgpass
  use_unix_socket: true
  authentication:
    superuser: {username: postgres, password: "$password"}
    replication: {username: replicator, password: "$password"}
    rewind: {username: rewinder, password: "$password"}
  parameters:
    unix_socket_directories: $directory
  pg_hba:
    - local all all trust                                   # in a directory of the owner's alone
    - host replication replicator 127.0.0.1/32 scram-sha-256
    - host all all 127.0.0.1/32 scram-sha-256
  basebackup:
    checkpoint: fast
  remove_data_directory_on_rewind_failure: true
  remove_data_directory_on_diverged_timelines: true
"""
)


@dataclass
class Plan:
    """What the nodes of one cluster have in common."""

    programs: Programs
    directory: Path
    etcd_port: int
    strict: bool = False
    password: str = field(default_factory=lambda: secrets.token_hex(8))


class Node:
    """A machine of the cluster.

    Attributes:
        name: `"node1"` and so on.
        clients: the link that clients take to PostgreSQL.
        peers: the links that the other nodes take to PostgreSQL and to Patroni.
        etcd: the link that its Patroni takes to etcd.
        rest: the port of Patroni's REST interface.
    """

    def __init__(self, number: int, plan: Plan) -> None:
        self.name = f"node{number}"
        self.port, self.rest = free_ports(2)
        self.clients = Link(self.port)
        self.peers = (Link(self.port), Link(self.rest))
        self.etcd = Link(plan.etcd_port)
        self._plan = plan
        self._directory = plan.directory / self.name
        self._patroni = Program(
            [*plan.programs.python, "-m", "patroni", str(self._directory / "patroni.yml")],
            plan.directory / f"{self.name}.log",
            None,  # its command changes the user
            {"HOME": str(self._directory), "PYTHONDONTWRITEBYTECODE": "1"},
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Node"]:
        """Open its links and start it."""
        async with AsyncExitStack() as stack:
            for link in self._links():
                await stack.enter_async_context(link.opened())
            self._write_configuration()
            await self.start()
            yield self

    async def start(self) -> None:
        """Start Patroni, which starts PostgreSQL."""
        await self._patroni.start()

    def url(self, driver: str, role: str = ROLE) -> str:
        """Return the URL of this node's PostgreSQL, through the link of the clients."""
        return f"{driver}://{role}:{self._plan.password}@{HOST}:{self.clients.port}/{DATABASE}"

    def kill_postgres(self) -> None:
        """Kill PostgreSQL; Patroni lives, and sees it."""
        _signal(self._postgres(), signal.SIGKILL)

    async def kill(self) -> None:
        """Kill Patroni and PostgreSQL, as where a machine loses its power."""
        _signal([*family(self._patroni.pid), *self._postgres()], signal.SIGKILL)
        await self._patroni.ended()

    def freeze(self) -> None:
        """Stop Patroni and PostgreSQL: connections stay open, and nothing answers."""
        _signal([*family(self._patroni.pid), *self._postgres()], signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on, as if no time had passed."""
        _signal([*family(self._patroni.pid), *self._postgres()], signal.SIGCONT)

    def cut_off(self) -> None:
        """Cut the node off from clients, from the other nodes and from etcd."""
        for link in self._links():
            link.cut()

    def cut_off_from_peers(self) -> None:
        """Cut the node off from the other nodes and from etcd, and leave its clients to it."""
        for link in (*self.peers, self.etcd):
            link.cut()

    def mend(self) -> None:
        """Mend every link."""
        for link in self._links():
            link.mend()

    def _links(self) -> tuple[Link, ...]:
        return (self.clients, *self.peers, self.etcd)

    def last_words(self) -> str:
        """Return the end of its log."""
        return self._patroni.last_words()

    def _postgres(self) -> list[int]:
        """Return the processes of PostgreSQL, the first of them first."""
        with suppress(OSError, ValueError):
            lines = (self._directory / "data" / "postmaster.pid").read_text().splitlines()
            return family(int(lines[0]))
        return []

    def _write_configuration(self) -> None:
        self._directory.mkdir(mode=0o700)
        path = self._directory / "patroni.yml"
        path.touch(mode=0o600)
        path.write_text(
            CONFIGURATION.substitute(
                name=self.name,
                rest=self.rest,
                etcd=self.etcd.port,
                strict=str(self._plan.strict).lower(),
                fsync="off",
                port=self.port,
                peers=self.peers[0].port,
                rest_of_peers=self.peers[1].port,
                directory=self._directory,
                programs=self._plan.programs.postgres,
                password=self._plan.password,
            )
        )
        if self._plan.programs.user is not None:
            for each in (self._directory, path):
                shutil.chown(each, self._plan.programs.user)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
